"""Statistics of layer inputs over a few batches, accumulated while they stream by.

Memory does not depend on the number of samples: a statistic is a matrix of the layer's width. Padding never counts.

Letters: B batch, S padded length, N live tokens, F width of the layer input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.core.batches import base_inputs, token_masks
from hf_compress.core.data_needs import require_batches
from hf_compress.core.forward_state import carries_state, forward_state
from hf_compress.core.modes import evaluating
from hf_compress.core.processes import Addable, added_up, is_first_process
from hf_compress.core.watching import Before, Stop, watched


logger = logging.getLogger(__name__)

# The caller's name for a module, also used in messages.
Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class Observer(Protocol):
    """Looks at rows."""

    def update(self, rows: Tensor) -> None: ...


class Statistic(Observer, Addable, Protocol):
    """Accumulates rows into something smaller than the rows, which adds up over several processes."""


def with_progress(data: Iterable[Item], description: str) -> Iterator[Item]:
    """The items, with a progress bar where the program logs what it does to a terminal."""
    total = len(data) if isinstance(data, Sized) else None
    # None: tqdm looks whether it writes to a terminal.
    hidden = None if logger.isEnabledFor(logging.INFO) and is_first_process() else True
    yield from tqdm(data, total=total, desc=description, leave=False, disable=hidden)


def run_base(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Run the base model once; layers that drop tokens compute the rows of all live tokens."""
    model.base_model(**inputs, **forward_state(model))


def live_rows(key: Hashable, states: Tensor, masks: list[Tensor], may_be_packed: bool) -> Tensor:
    """The input of a module as rows, without padding.

    Layers that drop tokens pass on rows of live tokens only, without the batch axis. An input whose number of rows is
    not that of the tokens and that has no batch axis (embeddings of relative positions) has no padding.

    Args:
        key: Names the module in messages.
        states: [..., F], the input.
        masks: The masks of the batch, as `token_masks` gives them.
        may_be_packed: Whether layers may have dropped tokens and padding already.

    Raises:
        ValueError: If it is unclear which rows are padding.
    """
    if may_be_packed and states.ndim == 2:
        return states
    rows = states.flatten(0, -2)
    fitting = [mask for mask in masks if mask.numel() == len(rows)]
    if len(fitting) > 1 and not torch.equal(fitting[0].flatten(), fitting[1].flatten()):
        raise ValueError(
            f"Calibration cannot tell whose padding {key} sees: inputs and targets are padded to one length. "
            "Pad them to different lengths, or use batches without padding."
        )
    if fitting:
        return rows[fitting[0].flatten()]
    if masks and states.shape[0] == len(masks[0]):
        raise ValueError(
            f"Calibration needs layers that see one row a token, got {len(rows)} rows for {masks[0].numel()} tokens "
            f"at {key}. Exclude it (excluded_op_names), or leave out an attention_mask that is not of these rows."
        )
    return rows


@contextmanager
def feeding(
    modules: Mapping[Key, nn.Module],
    statistics: Mapping[Key, Observer],
    masks: list[Tensor],
    may_be_packed: bool = False,
    whole: bool = False,
) -> Iterator[None]:
    """Feed the live-token inputs of some modules to statistics while a batch runs inside the `with` statement.

    Args:
        modules: Key -> module whose first positional input is observed, at every call.
        statistics: Key -> statistic, for the same keys.
        masks: The masks of the batch, as `token_masks` gives them.
        may_be_packed: Whether layers may have dropped tokens and padding already.
        whole: Do not end the forward pass once all modules have been seen.

    Raises:
        ValueError: If an input is not finite or not one row a token.
    """
    pending = set(modules)

    def observer(key: Key) -> Before:
        def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = live_rows(key, args[0], masks, may_be_packed)
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(
                    f"Activations must be finite, got NaN or infinity at {key} in {rows.dtype}. Check the weights, or "
                    "calibrate in a dtype with a larger range."
                )
            statistics[key].update(rows)
            pending.discard(key)
            if not (pending or whole):
                raise Stop

        return look

    with watched(before=[(module, observer(key)) for key, module in modules.items()]):
        yield


@torch.no_grad()
def call_order(
    model: PreTrainedModel, modules: Mapping[Key, nn.Module], batch: Mapping[str, Any]
) -> list[tuple[Key, int]]:
    """Record every call of some modules in one forward pass, in order.

    Args:
        model: Runs in eval mode and is left in the mode it had.
        modules: Key -> module. Those that the base model does not call are missing in the result.
        batch: Model inputs; labels are ignored.

    Returns:
        Key and number of the input of each call: consecutive calls on the very same tensor share a number.

    Raises:
        ValueError: If the batch lacks the model's main input, or a module sees something else than one row a token.
    """
    calls: list[tuple[Key, int]] = []
    last: list[Tensor] = []
    inputs_of_base, drops_tokens = base_inputs(model, batch), carries_state(model)
    masks = token_masks(model, inputs_of_base)

    def observer(key: Key) -> Before:
        def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            live_rows(key, args[0], masks, drops_tokens)
            same = bool(last) and last[0] is args[0]
            # Kept alive, so that no later tensor gets the address of this one.
            last[:] = [args[0]]
            calls.append((key, calls[-1][1] + (not same) if calls else 0))

        return look

    with evaluating(model), watched(before=[(module, observer(key)) for key, module in modules.items()]):
        run_base(model, inputs_of_base)
    return calls


@torch.no_grad()
def collect_inputs(
    model: PreTrainedModel,
    modules: Mapping[Key, nn.Module],
    statistics: Mapping[Key, Statistic],
    data: Iterable[Mapping[str, Any]],
    on_batch: Callable[[Mapping[str, Any]], None] | None = None,
    description: str = "calibration",
    whole: bool = False,
) -> None:
    """Feed the live-token inputs of some modules to statistics, one forward pass a batch.

    The pass stops after the deepest of the modules. The model runs in eval mode and is left in the mode it had. Where
    several processes compress together, the statistics are those of all at the end.

    Args:
        model: Runs on the device it is on; batches are moved there.
        modules: Key -> module whose first positional input is observed, at every call.
        statistics: Key -> statistic, for the same keys.
        data: Model-input dicts of tensors. Labels and arguments that the base model does not take are ignored.
        on_batch: Called with each batch (after the move).
        whole: Run the base model to its end: for modules that it calls more than once, or perhaps never.

    Raises:
        ValueError: If the data is empty, lacks the model's main input, drives a module to a non-finite input, or if a
            module sees something else than one row a token.
    """
    drops_tokens, seen = carries_state(model), 0
    with evaluating(model), added_up(*statistics.values()):
        for batch in with_progress(data, description):
            moved, seen = base_inputs(model, batch), seen + 1
            if on_batch is not None:
                on_batch(moved)
            with feeding(modules, statistics, token_masks(model, moved), drops_tokens, whole):
                run_base(model, moved)
    require_batches(seen)
