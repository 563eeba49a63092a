"""Masks on attention units and neurons, and their tuning: one least-squares scale for each unit that stays.

Letters: B batches, H attention units, D hidden, F neurons, n units or neurons of a layer, k kept ones, N rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.batches import live_tokens, on_device
from hf_compress.core.modes import evaluating
from hf_compress.core.moments import SecondMoments
from hf_compress.core.surgery import unit_columns


logger = logging.getLogger(__name__)

# Which hidden state the feed-forward block's output is added to: its own input, or the input of the norm before it.
_POST_NORM = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
_PRE_NORM = ("modernbert", "llama", "opt")
_LARGEST_SCALE = 10.0

Data = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Masks:
    """What every unit of a model is multiplied by.

    Args:
        units: For each layer [H]; bool (True stays), or float64 after tuning (0 for removed units).
        neurons: For each layer [F], likewise.
    """

    units: list[Tensor]
    neurons: list[Tensor]


@contextmanager
def masked(blocks: Sequence[TransformerLayer], masks: Masks) -> Iterator[None]:
    """Multiply the inputs of the output projections while the context is open."""

    def multiply(mask: Tensor, size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] * mask.to(inputs[0]).repeat_interleave(size), *inputs[1:])

        return hook

    handles = []
    try:
        for block, units, neurons in zip(blocks, masks.units, masks.neurons, strict=True):
            handles.append(block.attention_out.register_forward_pre_hook(multiply(units, block.unit_size)))
            handles.append(block.ffn_out.register_forward_pre_hook(multiply(neurons, 1)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Raised by the last hook: the rest of the forward pass is not needed."""


def adds_own_input(model: PreTrainedModel) -> bool:
    """Whether the feed-forward output is added to that block's own input (post-norm) or to the norm's (pre-norm).

    Raises:
        ValueError: If the model type is not known to the tuning.
    """
    kind = model.config.model_type
    if kind not in _POST_NORM + _PRE_NORM:
        raise ValueError(
            f"model_type must be one of {', '.join(_POST_NORM + _PRE_NORM)} for the tuning of masks, got {kind!r}. "
            "Set correction=False."
        )
    return kind in _POST_NORM or not getattr(model.config, "do_layer_norm_before", True)


def _sublayer(
    model: PreTrainedModel, block: TransformerLayer, part: str, inputs: Mapping[str, Tensor], rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of an output projection and what the model adds to it: [N, n], [N, D], [N, D] of given rows."""
    seen: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["entry"] = args[0] if args else kwargs["hidden_states"]

    def before_ffn(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["ffn_in"] = args[0]

    def leave(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen["in"], seen[name] = args[0], output
            if name == part:
                raise _Stop

        return hook

    handles = [
        block.layer.register_forward_pre_hook(enter, with_kwargs=True),
        block.attention_out.register_forward_hook(leave("attention")),
        block.linear(block.architecture.ffn_in[0]).register_forward_pre_hook(before_ffn),
        block.ffn_out.register_forward_hook(leave("ffn")),
    ]
    try:
        model.base_model(**inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if part == "attention":
        residual = seen["entry"]
    else:
        residual = seen["ffn_in"] if adds_own_input(model) else seen["entry"] + seen["attention"]
    found = (seen["in"], seen[part], residual)
    return tuple(t.reshape(-1, t.shape[-1])[rows.flatten().to(t.device)] for t in found)


def _fitted_rows(model: PreTrainedModel, inputs: Mapping[str, Tensor], pooled: bool) -> Tensor:
    """[batch, S] bool: the live tokens, or the one that a sequence classifier looks at."""
    live = live_tokens(inputs)
    if not pooled or getattr(model.config, "classifier_pooling", "cls") != "cls":
        return live
    place = torch.arange(live.shape[1], device=live.device)
    causal = model.config.model_type in ("llama", "opt")
    chosen = torch.where(live, place, -1).argmax(1, keepdim=True) if causal else 0
    return place.expand(live.shape) == chosen


def normal_equations(
    model: PreTrainedModel,
    blocks: Sequence[TransformerLayer],
    data: Data,
    layer: int,
    part: Literal["attention", "ffn"],
    teacher: Masks,
    student: Masks,
) -> tuple[Tensor, Tensor]:
    """Least squares for the scales with which a pruned sublayer imitates the teacher's, accumulated over batches.

    The rows to explain are the teacher's sublayer output with its residual, less the student's residual and the bias.
    The teacher's feed-forward block is complete in the layer at hand; before it, and in attention, masks hold.

    Args:
        data: Input dicts, read once; padding is left out, and the last feed-forward block of a sequence classifier is
            fitted to the pooled token alone.
        layer: Index into `blocks`.
        teacher, student: Masks of all layers; the student's nonzero entries in this layer are the unknowns.

    Returns:
        `A^T A` [k, k] and `A^T b` [k], float64. Attention has one more unknown, an intercept, in the last place.
    """
    block, attention = blocks[layer], part == "attention"
    linear, size = (block.attention_out, block.unit_size) if attention else (block.ffn_out, 1)
    if not attention:
        neurons = [torch.ones_like(m) if i == layer else m for i, m in enumerate(teacher.neurons)]
        teacher = Masks(teacher.units, neurons)
    kept = (student.units if attention else student.neurons)[layer].nonzero().flatten().cpu()
    columns = unit_columns(kept.tolist(), size)
    pooled = not attention and layer == len(blocks) - 1 and type(model).__name__.endswith("SequenceClassification")
    moments = SecondMoments(len(columns), linear.weight.device)
    device = moments.total.device
    weight = linear.weight.detach().to(device).double()[:, columns.to(device)]
    bias = 0.0 if linear.bias is None else linear.bias.detach().to(device).double()
    cross, target_sum = torch.zeros_like(moments.total), 0.0
    with torch.no_grad(), evaluating(model):
        for batch in data:
            inputs = on_device(model.base_model, batch)
            rows = _fitted_rows(model, inputs, pooled)
            with masked(blocks, teacher):
                _, output, residual = _sublayer(model, block, part, inputs, rows)
            with masked(blocks, student):
                context, _, own_residual = _sublayer(model, block, part, inputs, rows)
            output, residual, own_residual = (t.to(device).double() for t in (output, residual, own_residual))
            target = output + residual - bias - own_residual
            context = context.to(device)[:, columns.to(device)]
            moments.update(context)
            cross += ((target @ weight) * context).sum(0)
            target_sum += float(target.sum())
    gram = (moments.gram * (weight.T @ weight)).view(len(kept), size, len(kept), size).sum((1, 3))
    cross = cross.view(-1, size).sum(1)
    if not attention:
        return gram.cpu(), cross.cpu()
    sums = (moments.total * weight.sum(0)).view(-1, size).sum(1)
    corner = sums.new_tensor([moments.num_rows * block.hidden_size])
    gram = torch.cat([torch.cat([gram, sums[:, None]], 1), torch.cat([sums, corner])[None]])
    return gram.cpu(), torch.cat([cross, cross.new_tensor([target_sum])]).cpu()


def _solve(gram: Tensor, cross: Tensor) -> Tensor | None:
    """Scales [k] near 1, or None where the solver did not converge."""
    ones = torch.ones_like(cross)
    found = lsmr(gram.numpy(), (cross - gram @ ones).numpy(), damp=1.0, maxiter=5 * len(cross))
    return ones + torch.from_numpy(found[0]) if found[1] < 3 else None


def tune_masks(
    model: PreTrainedModel, blocks: Sequence[TransformerLayer], data: Data, teacher: Masks, student: Masks
) -> Masks:
    """Scale what is left so that every layer, from the first to the last, comes close to the teacher's.

    Memory is that of one batch and two matrices of a layer's width; the data is read twice a layer.

    Args:
        data: Input dicts that can be read many times; labels are not used.
        teacher: Bool masks of a less pruned model.
        student: Bool masks. Not changed.

    Returns:
        The student's masks as float64 on the CPU, times the scales. Attention of the first layer stays as it is. If
        a layer's system does not converge or asks for a scale above 10, this and all later ones stay as they are.

    Raises:
        ValueError: If the model type is not known to the tuning.

    Source:
        Section 4.3 of the paper as released: unknowns are deviations from 1 (the intercept's too, which is then
        dropped), damped by 1, with LSMR on the normal equations and at most 5 k iterations.
    """
    adds_own_input(model)
    tuned = Masks([m.cpu().double() for m in student.units], [m.cpu().double() for m in student.neurons])
    for layer in range(len(blocks)):
        for part, mask in (("attention", tuned.units[layer]), ("ffn", tuned.neurons[layer])):
            if not mask.any() or (part == "attention" and layer == 0):
                continue
            scales = _solve(*normal_equations(model, blocks, data, layer, part, teacher, tuned))
            kept = mask != 0
            if scales is None or scales[: int(kept.sum())].abs().max() > _LARGEST_SCALE:
                logger.warning("Mask tuning stopped at layer %d (%s): no trustworthy scales there.", layer, part)
                return tuned
            mask[kept] = scales[: int(kept.sum())]
    return tuned
