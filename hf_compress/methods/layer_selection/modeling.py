"""Drops layers of a live model, and checks that a skeleton has as many as a record says."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.architectures import architecture_of, layers_of
from hf_compress.core.data_needs import Data
from hf_compress.methods.layer_selection.config import LayerSelectionConfig


# Fields of model configs with one entry for each layer. Others may have as many entries by chance.
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def check(model: PreTrainedModel, config: LayerSelectionConfig) -> None:
    """Refuse layers that the model has not, or that stock transformers would build otherwise at their new place.

    Raises:
        ValueError: Names the layer, what it lacks and what to do.
    """
    modules = [layer.module for layer in layers_of(model, adapted=True)]
    kept = config.chosen_of(len(modules))
    for place, index in enumerate(kept):
        ours, stock = _shapes(modules[index]), _shapes(modules[place])
        if ours != stock:
            name = sorted(ours.items() ^ stock.items())[0][0]
            raise ValueError(
                f"layers must keep layer {place} at its place, got {kept}: as layer {place} of a "
                f"{model.config.model_type}, layer {index} has another {name}."
            )
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False) and kept != list(range(len(kept))):
        raise ValueError(
            f"layers must be 'first' for a model with scale_attn_by_inverse_layer_idx, got {config.layers!r}: its "
            "attention depends on the layer's index."
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def compress(model: PreTrainedModel, config: LayerSelectionConfig, data: Data | None) -> LayerSelectionConfig:
    """Drop all layers but the chosen ones; the model's config then says how many there are and of what types."""
    modules = [layer.module for layer in layers_of(model, adapted=True)]
    kept = config.chosen_of(len(modules))
    parent, _, name = architecture_of(model).layers.rpartition(".")
    stack: Any = model.base_model.get_submodule(parent)
    setattr(stack, name, nn.ModuleList(modules[index] for index in kept))
    if hasattr(stack, "n_layers"):
        # DistilBERT counts its layers once more.
        stack.n_layers = len(kept)
    for place, index in enumerate(kept):
        for module in modules[index].modules():
            # Where a layer finds its keys and values in a cache.
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010  # mypy takes attributes of modules for tensors
    _keep_state_weights_(model, [0, *(index + 1 for index in kept)])
    _cut_config_(model.config, kept)
    return dataclasses.replace(config, num_layers=len(kept), kept_layers=kept)


def _keep_state_weights_(model: PreTrainedModel, states: list[int]) -> None:
    """Cut the weights of a head that reads all hidden states, as those for sounds may (`use_weighted_layer_sum`)."""
    weights = model._parameters.get("layer_weights")
    if weights is not None:
        kept = weights.detach()[torch.tensor(states, device=weights.device)].clone()
        model.layer_weights = nn.Parameter(kept, requires_grad=weights.requires_grad)


def _cut_config_(config: PretrainedConfig, kept: list[int]) -> None:
    lists = {name: getattr(config, name, None) for name in _LAYER_LISTS}
    config.num_hidden_layers = len(kept)
    for name, entries in lists.items():
        if entries is not None:
            setattr(config, name, [entries[index] for index in kept])


def rebuild(model: PreTrainedModel, config: LayerSelectionConfig) -> None:
    """Check a skeleton: its config alone gives it the right layers.

    Raises:
        ValueError: If it has another number of layers.
    """
    if config.kept_layers is None:
        raise ValueError("kept_layers must be recorded, got a config that was never applied.")
    found = len(layers_of(model, adapted=True))
    if found != len(config.kept_layers):
        raise ValueError(
            f"The model must have {len(config.kept_layers)} layers, those that the record keeps, got {found}: leave "
            "num_hidden_layers as config.json has it."
        )


def plain(model: PreTrainedModel, config: LayerSelectionConfig) -> dict[str, Any]:
    """Nothing to add: the model's config says all already."""
    return {}
