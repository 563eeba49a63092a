"""Which weights of a model may be pruned, as matrices, and how much of them is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.architectures import layers_of
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.expressions import matches
from hf_compress.methods.weight_pruning.patterns import BlockPattern, HeadPattern, NMPattern


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight that may be pruned, seen as a matrix with outputs as rows.

    Args:
        name: Qualified module name.
        weight: The live parameter.
        transposed: The module stores inputs as rows (GPT-2's `Conv1D`).
        heads: Of an attention projection that loses heads: the rows or columns of one.
        block: Of such a projection: which layer of the model it belongs to.
    """

    name: str
    weight: nn.Parameter
    transposed: bool = False
    heads: BlockPattern | None = None
    block: int | None = None

    def pattern(self, config: WeightPruningConfig) -> BlockPattern | NMPattern:
        """What is pruned together in this matrix."""
        return self.heads or config.parsed_pattern

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [outputs, inputs]; a convolution's inputs run with its positions."""
        if self.transposed:
            return tensor.T
        return tensor if tensor.ndim == 2 else tensor.movedim(1, -1).flatten(1)

    def like_weight(self, matrix: Tensor) -> Tensor:
        """The way back from `matrix`."""
        if self.transposed:
            return matrix.T.contiguous()
        shape = self.weight.shape
        return matrix if len(shape) == 2 else matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share one config."""

    config: WeightPruningConfig
    layers: list[PrunableWeight]

    @property
    def num_units(self) -> int:
        return sum(unit_counts(self.config, self.layers))


def tied(layers: Sequence[PrunableWeight]) -> list[list[int]]:
    """Positions of layers that lose the same units: the projections of one attention block, else each alone."""
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault((layer.block, None if layer.heads else index), []).append(index)
    return list(found.values())


def unit_counts(config: WeightPruningConfig, layers: Sequence[PrunableWeight]) -> list[int]:
    """How many units each set of tied layers has."""
    firsts = [layers[together[0]] for together in tied(layers)]
    return [len(layer.pattern(config).pruned_units(nothing_pruned(layer))) for layer in firsts]


def nothing_pruned(layer: PrunableWeight) -> Tensor:
    """All False in the shape of the layer's matrix."""
    return torch.zeros(layer.matrix(layer.weight).shape, dtype=torch.bool, device=layer.weight.device)


def _bodies(model: nn.Module) -> tuple[str, ...]:
    """How the names of modules begin that are not part of a task head."""
    if getattr(model, "base_model", model) is not model:
        return (f"{model.base_model_prefix}.",)
    # T5 with a head has no base model inside, but an encoder and a decoder that are models themselves.
    stacks = tuple(f"{name}." for name, child in model.named_children() if isinstance(child, PreTrainedModel))
    return stacks or ("",)


def _word_weights(model: nn.Module) -> set[nn.Parameter | None]:
    """Weights of embeddings, which a layer may share, and of the layer that scores words."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if isinstance(model, PreTrainedModel) and isinstance(model.get_output_embeddings(), nn.Module):
        modules.append(model.get_output_embeddings())
    return {module._parameters.get("weight") for module in modules}


def _select(model: nn.Module, config: WeightPruningConfig, taken: set[nn.Parameter]) -> list[PrunableWeight]:
    everything = config.op_names is None and config.excluded_op_names is None
    bodies, words = _bodies(model), _word_weights(model)
    layers = []
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        # A parametrised weight is computed, not stored: zeros in it would not last.
        weight = module._parameters.get("weight")
        if kinds.isdisjoint(config.pruning_op_types) or weight is None or weight.ndim < 2 or weight in taken:
            continue
        if config.op_names is not None and not matches(name, config.op_names):
            continue
        if matches(name, config.excluded_op_names or ()):
            continue
        if everything and ("pooler" in name or not name.startswith(bodies)):
            continue
        # Embeddings are pruned only where their class is asked for, and never as a layer that shares their weight.
        if everything and weight in words and not isinstance(module, nn.Embedding):
            continue
        taken.add(weight)
        layers.append(PrunableWeight(name, weight, isinstance(module, Conv1D)))
    return layers


def _select_heads(model: nn.Module, config: WeightPruningConfig, taken: set[nn.Parameter]) -> list[PrunableWeight]:
    """The four projections of every attention block whose names are all selected."""
    names = {module: name for name, module in model.named_modules()}
    layers = []
    for block in layers_of(model):
        row = block.architecture
        if row.fused_attention:
            raise ValueError(
                f"pattern must be another one than 'mha' for {type(model).__name__}: its queries, keys and values "
                "are one matrix. StructuredPruningConfig removes its heads."
            )
        rows = {row.queries: block.unit_size, row.keys: block.head_size, row.values: block.head_size}
        blocks = {path: BlockPattern(size, None) for path, size in rows.items()}
        blocks[row.attention_out] = BlockPattern(None, block.unit_size)
        found = {path: names[block.linear(path)] for path in blocks}
        if config.op_names is not None and not all(matches(name, config.op_names) for name in found.values()):
            continue
        if any(matches(name, config.excluded_op_names or ()) for name in found.values()):
            continue
        weights = [block.linear(path).weight for path in blocks]
        if taken.isdisjoint(weights):
            taken.update(weights)
            layers += [
                PrunableWeight(found[path], weight, heads=blocks[path], block=block.index)
                for path, weight in zip(blocks, weights, strict=True)
            ]
    return layers


def selected(model: nn.Module, config: WeightPruningConfig) -> list[Group]:
    """The sets of layers that a config selects; no layer is in two, and a set may be empty.

    Raises:
        ValueError: If the model cannot be looked at in this way.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model must not hold adapters, got a PEFT model. Merge them (merge_and_unload) first.")
    taken: set[nn.Parameter] = set()
    return [
        Group(
            entry, (_select_heads if isinstance(entry.parsed_pattern, HeadPattern) else _select)(model, entry, taken)
        )
        for entry in config.resolved()
    ]


def groups_of(model: nn.Module, config: WeightPruningConfig) -> list[Group]:
    """What `selected` finds, for pruning it.

    Raises:
        ValueError: If a set is empty, or the config was read off a model that is slim already.
    """
    if config.heads_per_layer is not None:
        # A copy of a finished step: what training would record of it says nothing about this model.
        raise ValueError(
            f"heads_per_layer and neurons_per_layer must be None before pruning (slim fills them in), got "
            f"{config.heads_per_layer} and {config.neurons_per_layer}."
        )
    groups = selected(model, config)
    for group in groups:
        entry = group.config
        if not group.layers:
            raise ValueError(_selects_nothing(model, entry))
    return groups


def _selects_nothing(model: nn.Module, config: WeightPruningConfig) -> str:
    names = f"op_names={list(config.op_names)}" if config.op_names is not None else "op_names"
    without = f", excluded_op_names={list(config.excluded_op_names)}" if config.excluded_op_names else ""
    held = {type(m).__name__ for m in model.modules() if getattr(m._parameters.get("weight"), "ndim", 0) >= 2}
    others = ", ".join(sorted(held - {"Embedding", *config.pruning_op_types})) or "no other class"
    return (
        f"{names}{without} must select a layer of {', '.join(config.pruning_op_types)} (pruning_op_types) that no "
        f"earlier local config owns, got none; heads and poolers need to be named. The model also holds weights in "
        f"layers of {others}."
    )


def require_pattern(
    config: WeightPruningConfig, layer: PrunableWeight, mask: Tensor | None, scores: Tensor | None
) -> None:
    """Refuse what a checkpoint holds of a layer when it was made with another pattern.

    Args:
        config: How pruning goes on.
        layer: Which layer.
        mask: Of the weight's shape, True for zero; None when nothing was pruned.
        scores: In the form that `Pattern.reduce` gives; None when there are none.

    Raises:
        ValueError: If they do not fit.
    """
    pattern = layer.pattern(config)
    reduced = pattern.reduce(layer.matrix(layer.weight.detach()), config.criterion_reduce_type)
    fits = scores is None or scores.shape == reduced.shape
    # In the stages of a progressive update, units are zero in part.
    if fits and mask is not None and not config.progressive:
        matrix = layer.matrix(mask)
        whole = pattern.spread(pattern.pruned_units(matrix), reduced, nothing_pruned(layer))
        fits = int(whole.sum()) == int(matrix.sum())
    if not fits:
        raise ValueError(
            f"resume_from_checkpoint was written with another pattern than {config.pattern!r}: what was pruned of "
            f"{layer.name} is of another form. Go on with that pattern, or begin anew."
        )


def pruned_units(group: Group) -> tuple[int, int]:
    """How many of a group's units are zero in the live weights, and how many it has."""
    units = [
        layer.pattern(group.config).pruned_units(layer.matrix(layer.weight.detach() == 0)) for layer in group.layers
    ]
    sets = [torch.stack([units[i] for i in together]).all(0) for together in tied(group.layers)]
    return sum(int(gone.sum()) for gone in sets), sum(len(gone) for gone in sets)


def sparsity_of(groups: Sequence[Group]) -> float:
    """Pruned units over all units, times N/M for N:M; groups count by their weights."""
    weights = [sum(layer.weight.numel() for layer in group.layers) for group in groups]
    total = 0.0
    for group, weight in zip(groups, weights, strict=True):
        gone, units = pruned_units(group)
        total += weight * group.config.parsed_pattern.ceiling * gone / units
    return total / sum(weights)


def sparsity_by_layer(model: nn.Module, config: WeightPruningConfig) -> dict[str, float]:
    """Pruned units over units of each layer that a config selects (times N/M for N:M), by module name."""
    return {
        layer.name: sparsity_of([Group(group.config, [layer])])
        for group in selected(model, config)
        for layer in group.layers
    }


def element_sparsity(model: nn.Module) -> float:
    """Zeros over elements of all linear and convolution weights, never pruned heads included, each weight once.

    Source:
        The "element-wise" ratio that the original reports.
    """
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = {module.weight for module in model.modules() if isinstance(module, kinds)}
    return 1 - sum(int(w.count_nonzero()) for w in weights) / max(sum(w.numel() for w in weights), 1)
