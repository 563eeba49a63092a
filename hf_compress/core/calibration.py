"""Statistics of layer inputs over a few batches, accumulated while they stream by.

Memory does not depend on the number of samples: a statistic is a matrix of the layer's width. Padding never counts.

Letters: B batch, S padded length, N live tokens, F width of the layer input.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.core.layers import STATE, LiveTokens, carries_state
from hf_compress.core.modes import evaluating


logger = logging.getLogger(__name__)

# Rows in double precision at a time: enough for matrix products near the machine's peak, few enough for its caches.
_ROWS = 1024
# Columns a block of the symmetric product; smaller blocks waste less, larger ones run nearer to the machine's peak.
_BLOCK = 384


def forward_names(module: nn.Module) -> list[str]:
    """The arguments that a module's `forward` names; `**kwargs` does not count as naming."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, entry in inspect.signature(module.forward).parameters.items() if entry.kind not in kinds]


def accepted_arguments(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a module's `forward` names."""
    named = set(forward_names(module))
    return {name: value for name, value in batch.items() if name in named}


class Statistic(Protocol):
    """Something that eats rows and remembers less."""

    def update(self, rows: Tensor) -> None: ...


def _in_double(rows: Tensor) -> Iterator[Tensor]:
    """The rows in double precision, a bounded chunk at a time; each chunk overwrites the one before it.

    A copy of everything would be the largest tensor of the whole run, and fresh memory for every chunk costs as much
    time as the conversion.
    """
    buffer = torch.empty(min(_ROWS, len(rows)), rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in rows.split(_ROWS):
        yield buffer[: len(chunk)].copy_(chunk)


def add_gram_(gram: Tensor, rows: Tensor) -> None:
    """Add `rows.T @ rows` to the upper triangle of `gram`; what is below it afterwards means nothing.

    Args:
        gram: [F, F] float64, contiguous.
        rows: [N, F] float64, on the same device.
    """
    if gram.device.type == "cpu":
        # The symmetric product of BLAS, which torch does not offer, does only the half that is needed. BLAS stores by
        # columns: to it, both arrays are the transposes of what they are here, and upper is lower.
        dsyrk(1.0, rows.numpy().T, beta=1.0, c=gram.numpy().T, lower=1, overwrite_c=1)
    else:
        add_gram_by_blocks_(gram, rows)


def add_gram_by_blocks_(gram: Tensor, rows: Tensor) -> None:
    """`add_gram_` in general matrix products, for devices that BLAS does not reach."""
    for start in range(0, gram.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        gram[block, start:].addmm_(rows[:, block].T, rows[:, start:])


class SecondMoments:
    """Sum of outer products, sum, and number of the rows seen so far.

    Args:
        width: F.
        device: Where to accumulate; devices without float64 are replaced by the CPU.

    Example:
        >>> moments = SecondMoments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> moments.gram.tolist()
        [[10.0, 14.0], [14.0, 20.0]]
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        device = torch.device("cpu") if torch.device(device).type == "mps" else device
        self._upper = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.num_rows = 0

    def update(self, rows: Tensor) -> None:
        for chunk in _in_double(rows.detach().to(self._upper.device)):
            add_gram_(self._upper, chunk)
            self.total += chunk.sum(0)
            self.num_rows += len(chunk)

    @property
    def gram(self) -> Tensor:
        """[F, F] float64, `X^T X`."""
        return self._upper.triu() + self._upper.triu(1).T

    def centred_gram(self) -> Tensor:
        """[F, F] float64, the Gram matrix of the rows minus their mean."""
        return self.gram - torch.outer(self.total, self.total) / self.num_rows

    @property
    def mean(self) -> Tensor:
        return self.total / self.num_rows


class _Stop(Exception):
    """Raised by the last hook: the rest of the forward pass is not needed."""


def _batches(data: Iterable[Mapping[str, Any]], description: str) -> Iterator[Mapping[str, Any]]:
    total = len(data) if hasattr(data, "__len__") else None
    yield from tqdm(data, total=total, desc=description, leave=False, disable=not logger.isEnabledFor(logging.INFO))


def live_tokens(batch: Mapping[str, Any]) -> Tensor:
    """[B, S] bool, True where the attention mask of a batch keeps a token (everywhere when there is no mask)."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(batch["input_ids"].shape[:2], dtype=torch.bool, device=batch["input_ids"].device)
    return mask.bool()


def require_data(data: Iterable[Mapping[str, Any]] | None, passes: int) -> Iterable[Mapping[str, Any]]:
    """Check that calibration data can be read as often as a method needs it.

    Raises:
        ValueError: If there is none, or if it is an iterator that can be read once and more passes are needed.
    """
    if data is None:
        raise ValueError(
            "data must be given: this method looks at a few hundred examples (an iterable of input dicts)."
        )
    if isinstance(data, Mapping):
        raise ValueError("data must be an iterable of input dicts, got one dict: put it into a list.")
    if passes > 1 and iter(data) is data:
        raise ValueError(
            f"data must be readable {passes} times for these settings, got a one-shot {type(data).__name__}. "
            "Pass a list or a DataLoader."
        )
    return data


def on_device(module: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch that a model's `forward` names, on its device."""
    return {k: v.to(module.device) for k, v in accepted_arguments(module, batch).items() if torch.is_tensor(v)}


def base_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the base model takes of a batch, on its device; choices [B, C, S] become examples [B C, S].

    Raises:
        ValueError: If the batch is not a dict with `input_ids`.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"data must be an iterable of dicts of tensors, got {type(batch).__name__} in it.")
    if not torch.is_tensor(batch.get("input_ids")):
        raise ValueError(f"data must hold dicts with input_ids, got the keys {sorted(batch)}.")
    inputs, choices = on_device(model.base_model, batch), batch["input_ids"].ndim == 3
    return {k: v.flatten(0, 1) if choices and v.ndim >= 3 else v for k, v in inputs.items()}


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    model.base_model(**inputs, **({STATE: LiveTokens(whole=True)} if carries_state(model) else {}))


def _rows(key: Hashable, states: Tensor, tokens: int, may_be_packed: bool) -> tuple[Tensor, bool]:
    """The input of a layer as rows, and whether they are live tokens only.

    Layers that drop tokens hand on rows of live tokens only, without the axis of examples.
    """
    if may_be_packed and states.ndim == 2:
        return states, True
    rows = states.reshape(-1, states.shape[-1])
    if len(rows) != tokens:
        raise ValueError(
            f"Calibration needs layers that see one row a token, got {len(rows)} rows for {tokens} tokens at {key}. "
            "Exclude it."
        )
    return rows, False


@torch.no_grad()
def call_order(
    model: PreTrainedModel, modules: Mapping[Hashable, nn.Module], batch: Mapping[str, Any]
) -> list[tuple[Hashable, int]]:
    """Every call of some modules in one forward pass, in order.

    Args:
        model: Runs in eval mode and is left in the mode it had.
        modules: Key -> module. Those that the base model does not call are not in the answer.
        batch: Model inputs; labels are ignored.

    Returns:
        Key and number of the input: calls that follow each other on the very same tensor share a number.

    Raises:
        ValueError: If the batch has no `input_ids`, or a module sees something else than one row a token.
    """
    calls: list[tuple[Hashable, int]] = []
    last: list[Tensor] = []
    inputs_of_base, drops_tokens = base_inputs(model, batch), carries_state(model)
    num_tokens = live_tokens(inputs_of_base).numel()

    def observer(key: Hashable) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _rows(key, inputs[0], num_tokens, drops_tokens)
            same = bool(last) and last[0] is inputs[0]
            # Held on to: the next tensor cannot take the place of this one and pass for it.
            last[:] = [inputs[0]]
            calls.append((key, calls[-1][1] + (not same) if calls else 0))

        return hook

    handles = [module.register_forward_pre_hook(observer(key)) for key, module in modules.items()]
    try:
        with evaluating(model):
            _run(model, inputs_of_base)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def collect_inputs(
    model: PreTrainedModel,
    modules: Mapping[Hashable, nn.Module],
    statistics: Mapping[Hashable, Statistic],
    data: Iterable[Mapping[str, Any]],
    on_batch: Callable[[Mapping[str, Any]], None] | None = None,
    description: str = "calibration",
    whole: bool = False,
) -> None:
    """Feed the live-token inputs of some modules to statistics, one forward pass a batch.

    The pass stops after the deepest of the modules. The model runs in eval mode and is left in the mode it had.

    Args:
        model: Runs on the device it is on; batches are moved there.
        modules: Key -> module whose first positional input is observed, at every call.
        statistics: Key -> statistic, for the same keys.
        data: Model-input dicts of tensors. Labels and arguments that the base model does not take are ignored.
        on_batch: Called with each batch (after the move).
        whole: Run the base model to its end: for modules that it calls more than once, or perhaps never.

    Raises:
        ValueError: If the data is empty, has no `input_ids`, drives a module to a non-finite input, or if a module
            sees something else than one row a token.
    """
    drops_tokens = carries_state(model)
    live: dict[str, Tensor] = {}
    pending: set[Hashable] = set()

    def observer(key: Hashable) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows, packed = _rows(key, inputs[0], len(live["tokens"]), drops_tokens)
            rows = rows if packed else rows[live["tokens"]]
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(
                    f"Activations must be finite, got NaN or infinity at {key} in {rows.dtype}. Check the weights, or "
                    "calibrate in a dtype with a larger range."
                )
            statistics[key].update(rows)
            pending.discard(key)
            if not pending and not whole:
                raise _Stop

        return hook

    handles = [module.register_forward_pre_hook(observer(key)) for key, module in modules.items()]
    seen = 0
    try:
        with evaluating(model):
            for batch in _batches(data, description):
                moved = base_inputs(model, batch)
                live["tokens"] = live_tokens(moved).flatten()
                pending.update(modules)
                seen += 1
                if on_batch is not None:
                    on_batch(moved)
                try:
                    _run(model, moved)
                except _Stop:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("data must hold at least one batch, got none.")
