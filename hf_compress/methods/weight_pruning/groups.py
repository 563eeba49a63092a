"""Selects the weights of a model that a config prunes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.expressions import matches
from hf_compress.core.projections import HEAD_ROLES, Role
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.patterns import HeadPattern, HeadUnits
from hf_compress.methods.weight_pruning.prunable import PrunableWeight, WeightGroup


def _bodies(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of the names of modules outside the task head."""
    if getattr(model, "base_model", model) is not model:
        return (f"{model.base_model_prefix}.",)
    # T5 with a head has no base model inside, but an encoder and a decoder that are models themselves.
    stacks = tuple(f"{name}." for name, child in model.named_children() if isinstance(child, PreTrainedModel))
    return stacks or ("",)


def _word_weights(model: nn.Module) -> set[nn.Parameter | None]:
    """Weights of embeddings, which a linear module may share, and of the module that scores words."""
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if isinstance(model, PreTrainedModel):
        scorer = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
        modules += [scorer] if isinstance(scorer, nn.Module) else []
    return {module._parameters.get("weight") for module in modules}


def _select(model: nn.Module, config: WeightPruningConfig, taken: set[nn.Parameter]) -> list[PrunableWeight]:
    everything = config.op_names is None and config.excluded_op_names is None
    bodies, words = _bodies(model), _word_weights(model)
    found = []
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        # A parametrised weight is computed, not stored: zeros in it would not last.
        weight = module._parameters.get("weight")
        if kinds.isdisjoint(config.pruning_op_types) or weight is None or weight.ndim < 2 or weight in taken:
            continue
        # Of a sublayer that structured pruning removed altogether.
        if not weight.numel():
            continue
        if config.op_names is not None and not matches(name, config.op_names):
            continue
        if matches(name, config.excluded_op_names or ()):
            continue
        if everything and ("pooler" in name or not name.startswith(bodies)):
            continue
        # Embeddings are pruned only if their class is named, and never as a linear module that shares them.
        if everything and weight in words and not isinstance(module, nn.Embedding):
            continue
        taken.add(weight)
        found.append(PrunableWeight(name, weight, isinstance(module, Conv1D)))
    return found


def _heads_of(layer: TransformerLayer) -> dict[str, HeadUnits]:
    """Path of each module of a layer's attention -> the rows or columns of each attention unit."""
    slices: dict[str, list[tuple[int, int]]] = {}
    for role, projection in layer.projections.items():
        if role in HEAD_ROLES:
            size = layer.head_size if role in (Role.KEY, Role.VALUE) else layer.unit_size
            slices.setdefault(projection.path, []).append((projection.start, size))
    heads = {path: HeadUnits(layer.num_units, tuple(found)) for path, found in slices.items()}
    heads[layer.attention_out.path] = HeadUnits(layer.num_units, ((0, layer.unit_size),), columns=True)
    return heads


def _select_heads(model: nn.Module, config: WeightPruningConfig, taken: set[nn.Parameter]) -> list[PrunableWeight]:
    """The weights of every attention where the names of all of its modules are selected."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"pattern='mha' needs a model of transformers, got {type(model).__name__}.")
    names = {module: name for name, module in model.named_modules()}
    found = []
    for layer in layers_of(model):
        if not layer.num_units:
            continue
        heads, inside = _heads_of(layer), layer.modules
        modules = {path: inside[path] for path in heads}
        if config.op_names is not None and not all(matches(names[m], config.op_names) for m in modules.values()):
            continue
        if any(matches(names[module], config.excluded_op_names or ()) for module in modules.values()):
            continue
        weights = {path: module.get_parameter("weight") for path, module in modules.items()}
        if taken.isdisjoint(weights.values()):
            taken.update(weights.values())
            found += [
                PrunableWeight(names[module], weights[path], isinstance(module, Conv1D), heads[path], layer.index)
                for path, module in modules.items()
            ]
    return found


def selected(model: nn.Module, config: WeightPruningConfig) -> list[WeightGroup]:
    """The weights that a config selects: one group for each local config; no weight is in two, and one may be empty.

    Raises:
        ValueError: If the model holds adapters, or has no heads that can be pruned.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model must not hold adapters, got a PEFT model. Merge them (merge_and_unload) first.")
    taken: set[nn.Parameter] = set()
    groups = []
    for entry in config.resolved():
        find = _select_heads if isinstance(entry.parsed_pattern, HeadPattern) else _select
        groups.append(WeightGroup(entry, find(model, entry, taken)))
    return groups


def groups_of(model: nn.Module, config: WeightPruningConfig) -> list[WeightGroup]:
    """The weights that a config selects for pruning.

    Raises:
        ValueError: If a group is empty, or the config is the record of a model that `slim` made smaller.
    """
    if config.heads_per_layer is not None:
        # The record of such a training would not describe this model.
        raise ValueError(
            f"heads_per_layer and neurons_per_layer must be None before pruning (slim fills them in), got "
            f"{config.heads_per_layer} and {config.neurons_per_layer}."
        )
    groups = selected(model, config)
    for group in groups:
        if not group.weights:
            raise ValueError(_selects_nothing(model, group.config))
    return groups


def _selects_nothing(model: nn.Module, config: WeightPruningConfig) -> str:
    names = f"op_names={list(config.op_names)}" if config.op_names is not None else "The config"
    without = f", excluded_op_names={list(config.excluded_op_names)}" if config.excluded_op_names else ""
    held = {type(m).__name__ for m in model.modules() if getattr(m._parameters.get("weight"), "ndim", 0) >= 2}
    others = ", ".join(sorted(held - {"Embedding", *config.pruning_op_types})) or "no other class"
    return (
        f"{names}{without} must select a layer of {', '.join(config.pruning_op_types)} (pruning_op_types), and "
        "selects none: there is none, an earlier local config owns it, or it is a head or a pooler, which is pruned "
        f"only when it is named. The model also holds weights in modules of {others}; pruning_op_types can name them."
    )
