"""Sparse kernels for inference: used where weights fit one and where it measures faster."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.batches import accepted_arguments
from hf_compress.core.timing import time_in_turns
from hf_compress.methods.weight_pruning.kernels import (
    Format,
    Original,
    Pack,
    PackedLinear,
    format_for,
    set_pack_,
    unpack_,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate_for_inference` decided.

    Args:
        format: `csr` or `2:4`.
        packed: Names of the layers that use it.
        dense: Name -> reason, for every linear layer that does not.
        dense_seconds, packed_seconds: Of the example batch, fastest round; None when nothing was measured.
    """

    format: str
    packed: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    dense_seconds: float | None = None
    packed_seconds: float | None = None

    @property
    def speedup(self) -> float | None:
        """Dense over packed time, whatever was decided; None when it was not measured."""
        return self.dense_seconds / self.packed_seconds if self.dense_seconds and self.packed_seconds else None


def _fastest(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    before: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Seconds of the fastest round of each run, as other load on the machine can only add to them."""
    lists, devices = {name: [run] for name, run in runs.items()}, dict.fromkeys(runs, device)
    taken = time_in_turns(lists, devices, repeats, warmup=2, before=before)
    return {name: min(seconds) for name, seconds in taken.items()}


def _shapes(model: nn.Module, linears: Mapping[str, nn.Linear], inputs: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The largest input each layer gets in one forward pass; layers that do not run are missing."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in shapes or args[0].numel() > shapes[name].numel():
                shapes[name] = args[0].shape

        return hook

    hooks = [linear.register_forward_pre_hook(note(name)) for name, linear in linears.items()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


@torch.inference_mode()
def _measured_linear(linear: nn.Linear, pack: Pack, shape: torch.Size, repeats: int) -> float:
    """Dense over packed time of one layer."""
    inputs = torch.randn(shape, dtype=linear.weight.dtype, device=linear.weight.device)
    runs = {
        "dense": lambda: F.linear(inputs, linear.weight, linear.bias),
        "packed": lambda: pack.form.linear(inputs, pack.matrix, linear.bias),
    }
    taken = _fastest(runs, inputs.device, repeats)
    return taken["dense"] / taken["packed"]


def _eligible(linears: Mapping[str, nn.Linear], form: Format) -> tuple[dict[str, Pack], dict[str, str]]:
    packs: dict[str, Pack] = {}
    reasons: dict[str, str] = {}
    for name, linear in linears.items():
        weight = linear.weight
        reason = "its weight was made in inference mode" if weight.is_inference() else form.obstacle(weight)
        if reason is None:
            try:
                packs[name] = Pack(form, form.pack(weight), Original(weight), form.max_rows or math.inf)
            except RuntimeError as error:
                reason = f"torch refuses it: {(str(error).splitlines() or [type(error).__name__])[0]}"
        if reason is not None:
            reasons[name] = reason
    return packs, reasons


def _zeros(linear: nn.Linear) -> float:
    return 1 - int(linear.weight.count_nonzero()) / linear.weight.numel()


def accelerate_for_inference(
    model: nn.Module, batch: Mapping[str, Any] | None = None, repeats: int = 20, min_speedup: float = 1.05
) -> Acceleration:
    """Let pruned linear layers run on sparse kernels: 2:4 weights on CUDA, mostly zero weights on the CPU.

    With a batch, dense and sparse take turns, layer by layer and then as a whole model; what is not faster stays
    dense. The model is put in evaluation mode; sparse kernels run without gradients only (`torch.no_grad()` or
    `torch.inference_mode()`), on inputs up to the batch's number of tokens or 128 on the CPU. Weights stay as they
    are, so `save_pretrained` writes the ordinary model; call this again after loading, moving, casting or changing
    them, and last: surgery wants plain linear layers. Calling it again decides anew. A layer whose weight was moved,
    cast or changed runs dense; only single values written through `.data` or NumPy (on a GPU: anything written so)
    go unnoticed.

    Args:
        model: Where it will run, in the dtype it will run in: float16 or bfloat16 on CUDA, float32 on the CPU.
        batch: Inputs like those to come, `labels` allowed. None: nothing is measured, all that fits is used.
        repeats: Timed rounds.
        min_speedup: Dense over sparse time from which a layer, and the model, counts as faster.

    Returns:
        What was decided, and why.

    Raises:
        ValueError: If no layer fits: device, dtype, shape, or zeros. The model is unchanged then.

    Source:
        `torch.sparse.to_sparse_semi_structured` (not run here on a GPU); on the CPU MKL's CSR product.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> accelerate_for_inference(model)
        Traceback (most recent call last):
            ...
        ValueError: No layer can be accelerated on the CPU; of the sparsest one, '0', at least 0.85 ... got 0.00.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    kinds = (nn.Linear, PackedLinear)
    linears = {name: m for name, m in model.named_modules() if type(m) in kinds and m.weight.numel()}
    if not linears:
        raise ValueError(f"model must have plain torch.nn.Linear layers, got {type(model).__name__} without any.")
    device = next(iter(linears.values())).weight.device
    form = format_for(device)
    packs, reasons = _eligible(linears, form)
    if not packs:
        name = max(linears, key=lambda name: _zeros(linears[name]))
        where = "the CPU" if device.type == "cpu" else device.type
        raise ValueError(f"No layer can be accelerated on {where}; of the sparsest one, {name!r}, {reasons[name]}.")
    for linear in linears.values():
        unpack_(linear)
    model.eval()
    if batch is None:
        taken: dict[str, float] = {}
    else:
        tensors = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value) and key != "labels"}
        packs, slow, taken = _measure(model, linears, packs, accepted_arguments(model, tensors), repeats, min_speedup)
        reasons = {**slow, **reasons}
    for name, pack in packs.items():
        set_pack_(linears[name], pack)
    result = Acceleration(form.name, list(packs), reasons, taken.get("dense"), taken.get("packed"))
    logger.log(logging.INFO if packs else logging.WARNING, "%s", _sentence(result, len(linears)))
    return result


def _measure(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    packs: dict[str, Pack],
    inputs: Mapping[str, Tensor],
    repeats: int,
    min_speedup: float,
) -> tuple[dict[str, Pack], dict[str, str], dict[str, float]]:
    """The packs that pay, why the others do not, and the seconds of the whole model."""
    slow: dict[str, str] = {}
    faster: dict[str, Pack] = {}
    with torch.inference_mode():
        shapes = _shapes(model, {name: linears[name] for name in packs}, inputs)
    for name, pack in packs.items():
        if name not in shapes:
            slow[name] = "it does not run on the example batch"
            continue
        ratio = _measured_linear(linears[name], pack, shapes[name], repeats)
        if ratio < min_speedup:
            slow[name] = f"measured {ratio:.2f} times as fast as dense on inputs of shape {tuple(shapes[name])}"
        else:
            pack.max_rows = max(pack.max_rows, math.prod(shapes[name][:-1]))
            faster[name] = pack
    if not faster:
        return {}, slow, {}

    def switch(name: str) -> None:
        for fast, pack in faster.items():
            set_pack_(linears[fast], pack if name == "packed" else None)

    with torch.inference_mode():
        runs = dict.fromkeys(("dense", "packed"), lambda: model(**inputs))
        taken = _fastest(runs, next(iter(packs.values())).matrix.device, repeats, before=switch)
    for name in faster:
        unpack_(linears[name])
    ratio = taken["dense"] / taken["packed"]
    if ratio < min_speedup:
        slow.update(dict.fromkeys(faster, f"the whole model measured {ratio:.2f} times as fast as dense"))
        return {}, slow, taken
    return faster, slow, taken


def _sentence(result: Acceleration, number: int) -> str:
    measured = "not measured" if result.speedup is None else f"measured {result.speedup:.2f} times as fast as dense"
    if not result.packed:
        # Measured ones come first.
        name, reason = next(iter(result.dense.items()))
        return f"All {number} linear layers stay dense: sparse kernels are not faster here ({name}: {reason})."
    return f"{len(result.packed)} of {number} linear layers use {result.format}; {measured}."
