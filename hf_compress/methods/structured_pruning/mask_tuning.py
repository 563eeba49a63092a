"""Masks on attention units and neurons, and their tuning: one least-squares scale for each unit that stays.

Letters: B batches, H attention units, D hidden, F neurons, n units or neurons of a layer, k kept ones, N rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer, architecture_of
from hf_compress.core.batches import on_device, seen_tokens
from hf_compress.core.data_needs import Data
from hf_compress.core.modes import evaluating
from hf_compress.core.moments import SecondMoments
from hf_compress.core.processes import added_up
from hf_compress.core.projections import Role
from hf_compress.core.surgery import unit_columns
from hf_compress.core.watching import After, Stop, watched


logger = logging.getLogger(__name__)

_LARGEST_SCALE = 10.0
# Endings of the names of classes that give one answer for each input, not for each token.
_CLASSIFIERS = ("SequenceClassification", "ImageClassification")

Part: TypeAlias = Literal["attention", "ffn"]


@dataclass(frozen=True)
class Masks:
    """The factors of all units of a model.

    Args:
        units: [H] for each layer; bool (True for units that stay), or float64 after tuning (0 for removed units).
        neurons: [F] for each layer, likewise.
    """

    units: list[Tensor]
    neurons: list[Tensor]


@dataclass(frozen=True)
class _Targets:
    """What a sublayer's targets contribute to its normal equations.

    Args:
        cross: [columns] float64, the products of the columns' outputs with the targets.
        total: [1] float64, the sum of the targets.
    """

    cross: Tensor
    total: Tensor

    def sums(self) -> list[Tensor]:
        return [self.cross, self.total]


@contextmanager
def masked(layers: Sequence[TransformerLayer], masks: Masks) -> Iterator[None]:
    """Multiply the inputs of the output projections by masks inside a `with` statement."""

    def multiply(mask: Tensor, size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] * mask.to(inputs[0]).repeat_interleave(size), *inputs[1:])

        return hook

    handles = []
    try:
        for layer, units, neurons in zip(layers, masks.units, masks.neurons, strict=True):
            handles.append(layer.attention_out.module.register_forward_pre_hook(multiply(units, layer.unit_size)))
            handles.append(layer.ffn_out.module.register_forward_pre_hook(multiply(neurons, 1)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sublayer_signals(
    model: PreTrainedModel, layer: TransformerLayer, part: Part, inputs: Mapping[str, Tensor], rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Input [N, n] and output [N, D] of an output projection and the residual [N, D] added to it, for given rows."""
    seen: dict[str, Tensor] = {}

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["entry"] = args[0] if args else kwargs["hidden_states"]

    def enter_ffn(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["ffn_in"] = args[0]

    def leaving(name: Part) -> After:
        def leave(args: tuple[Any, ...], output: Tensor) -> None:
            seen["in"], seen[name] = args[0], output
            if name == part:
                raise Stop

        return leave

    before = [(layer.module, enter), (layer.projection(Role.FFN_IN).module, enter_ffn)]
    after = [(layer.attention_out.module, leaving("attention")), (layer.ffn_out.module, leaving("ffn"))]
    with watched(before, after):
        model.base_model(**inputs)
    if part == "attention":
        residual = seen["entry"]
    else:
        # A pre-norm sublayer is added to what came before the norm, a post-norm one to its own input.
        pre_norm = layer.architecture.normalises_first(model.config)
        residual = seen["entry"] + seen["attention"] if pre_norm else seen["ffn_in"]
    context, output, residual = (
        t.flatten(0, -2)[rows.flatten().to(t.device)] for t in (seen["in"], seen[part], residual)
    )
    return context, output, residual


def _fitted_rows(model: PreTrainedModel, inputs: Mapping[str, Tensor], pooled: bool) -> Tensor:
    """[batch, S] bool: the live tokens, or only the one that a classifier of whole inputs reads."""
    live, row = seen_tokens(model, inputs), architecture_of(model)
    if not pooled or row.mean_pooled or getattr(model.config, "classifier_pooling", "cls") != "cls":
        return live
    positions = torch.arange(live.shape[1], device=live.device)
    chosen = torch.where(live, positions, -1).argmax(1, keepdim=True) if row.causal else 0
    return positions.expand(live.shape) == chosen


def normal_equations(
    model: PreTrainedModel,
    layers: Sequence[TransformerLayer],
    data: Data,
    index: int,
    part: Part,
    teacher: Masks,
    student: Masks,
) -> tuple[Tensor, Tensor]:
    """Accumulate the normal equations of the scales with which a pruned sublayer best imitates the teacher's.

    The target is the teacher's sublayer output plus its residual, minus the student's residual and the bias. For a
    feed-forward sublayer, the teacher's own one is unmasked in this layer; everywhere else its masks apply.

    Args:
        data: Input dicts, read once; padding is left out, and the last feed-forward sublayer of a sequence classifier
            is fitted to the pooled token alone.
        index: Index in `layers`.
        teacher, student: Masks of all layers; the student's nonzero entries in this layer are the unknowns.

    Returns:
        `A^T A` [k, k] and `A^T b` [k], float64. For attention, an intercept is the last unknown.
    """
    layer, attention = layers[index], part == "attention"
    out, size = (layer.attention_out, layer.unit_size) if attention else (layer.ffn_out, 1)
    if not attention:
        neurons = [torch.ones_like(m) if i == index else m for i, m in enumerate(teacher.neurons)]
        teacher = Masks(teacher.units, neurons)
    kept = (student.units if attention else student.neurons)[index].nonzero().flatten().cpu()
    columns = unit_columns(kept.tolist(), size)
    pooled = not attention and index == len(layers) - 1 and type(model).__name__.endswith(_CLASSIFIERS)
    moments = SecondMoments(len(columns), out.weight.device)
    device = moments.total.device
    weight = out.weight.detach().to(device).double()[:, columns.to(device)]
    bias = 0.0 if out.bias is None else out.bias.detach().to(device).double()
    targets = _Targets(torch.zeros_like(moments.total), torch.zeros_like(moments.total[:1]))
    base = cast(PreTrainedModel, model.base_model)
    with torch.no_grad(), evaluating(model), added_up(moments, targets):
        for batch in data:
            inputs = on_device(base, batch)
            rows = _fitted_rows(model, inputs, pooled)
            with masked(layers, teacher):
                _, output, residual = _sublayer_signals(model, layer, part, inputs, rows)
            with masked(layers, student):
                context, _, own_residual = _sublayer_signals(model, layer, part, inputs, rows)
            output, residual, own_residual = (t.to(device).double() for t in (output, residual, own_residual))
            target = output + residual - bias - own_residual
            context = context.to(device)[:, columns.to(device)]
            moments.update(context)
            targets.cross.add_(((target @ weight) * context).sum(0))
            targets.total.add_(target.sum())
    gram = (moments.gram * (weight.T @ weight)).view(len(kept), size, len(kept), size).sum((1, 3))
    cross = targets.cross.view(-1, size).sum(1)
    if not attention:
        return gram.cpu(), cross.cpu()
    sums = (moments.total * weight.sum(0)).view(-1, size).sum(1)
    corner = sums.new_tensor([moments.num_rows * layer.hidden_size])
    gram = torch.cat([torch.cat([gram, sums[:, None]], 1), torch.cat([sums, corner])[None]])
    return gram.cpu(), torch.cat([cross, targets.total]).cpu()


def _solve(gram: Tensor, cross: Tensor) -> Tensor | None:
    """Solve for scales [k] near 1; None if the solver does not converge."""
    ones = torch.ones_like(cross)
    found = lsmr(gram.numpy(), (cross - gram @ ones).numpy(), damp=1.0, maxiter=5 * len(cross))
    return ones + torch.from_numpy(found[0]) if found[1] < 3 else None


def tune_masks(
    model: PreTrainedModel, layers: Sequence[TransformerLayer], data: Data, teacher: Masks, student: Masks
) -> Masks:
    """Scale the kept units so that each layer, from the first to the last, comes close to the teacher's.

    It needs the memory of one batch and of two matrices of a layer's width, and reads the data twice per layer.

    Args:
        data: Input dicts that can be read many times; labels are not used.
        teacher: Bool masks of a less pruned model.
        student: Bool masks. Not changed.

    Returns:
        The student's masks times the scales, float64 on the CPU. The first layer's attention is not scaled. If the
        equations of a sublayer do not converge or give a scale above 10, it and all later ones are not scaled.

    Source:
        Section 4.3 of the paper as released: unknowns are deviations from 1 (the intercept's too, which is then
        dropped), damped by 1, with LSMR on the normal equations and at most 5 k iterations.
    """
    tuned = Masks([m.cpu().double() for m in student.units], [m.cpu().double() for m in student.neurons])
    for index in range(len(layers)):
        masks: list[tuple[Part, Tensor]] = [("attention", tuned.units[index]), ("ffn", tuned.neurons[index])]
        for part, mask in masks:
            if not mask.any() or (part == "attention" and index == 0):
                continue
            scales = _solve(*normal_equations(model, layers, data, index, part, teacher, tuned))
            kept = mask != 0
            if scales is None or scales[: int(kept.sum())].abs().max() > _LARGEST_SCALE:
                logger.warning(
                    "Mask tuning stopped at layer %d (%s): its least squares gave no usable scales.", index, part
                )
                return tuned
            mask[kept] = scales[: int(kept.sum())]
    return tuned
