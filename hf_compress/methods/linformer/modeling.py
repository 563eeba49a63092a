"""Gives a model linear attention, and rebuilds its modules."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer, architecture_of, layers_of
from hf_compress.core.attention import attach_core_, use_cores_
from hf_compress.core.data_needs import Data
from hf_compress.core.positions import extend_positions_, patch_positions, position_offset, usual_tokens
from hf_compress.core.projections import Role
from hf_compress.methods.linformer.config import LinformerConfig
from hf_compress.methods.linformer.deferred import defer_
from hf_compress.methods.linformer.projection import LinformerCore, TimeProjection


# Name of the one projection of share="layer" in the base model.
_SHARED = "linformer_projection"


def _global_layers(model: PreTrainedModel) -> list[TransformerLayer]:
    """The layers whose attention sees every token; attention in a window is linear already, and so is none at all."""
    return [layer for layer in layers_of(model) if layer.window is None and layer.num_units]


def _stride(config: LinformerConfig, length: int) -> int:
    """The number of tokens that a slot averages at the start."""
    if config.slot_stride is not None:
        return config.slot_stride
    return math.ceil(length / config.projected_length) if config.initialization == "pooling" else 1


def check(model: PreTrainedModel, config: LinformerConfig) -> None:
    """Refuse models that cannot have linear attention.

    Raises:
        ValueError: If the architecture is not supported or is causal, or if `max_tokens` is unknown, larger than the
            model reads, or larger than the slots reach.
    """
    if not architecture_of(model).attention_interface:
        raise ValueError(
            f"model must compute attention through transformers' attention functions, and {model.config.model_type} "
            "has attention code of its own: linear attention cannot take its place."
        )
    for layer in layers_of(model):
        if getattr(layer.attention, "is_causal", False) or getattr(model.config, "is_decoder", False):
            raise ValueError(
                f"model must be a bidirectional encoder, got causal attention in layer {layer.index} of "
                f"{model.config.model_type}: slots would mix in later tokens."
            )
    if config.max_tokens is None and usual_tokens(model) is None:
        raise ValueError(
            f"max_tokens must be given for {model.config.model_type}, which reads inputs of any length: the number of "
            "tokens (of sounds, frames of the feature encoder) of the longest input."
        )
    patches = patch_positions(model)
    if patches is not None and (config.max_tokens or 0) > patches:
        raise ValueError(f"max_tokens must be at most {patches}, the tokens of an image, got {config.max_tokens}.")
    length = config.max_tokens or usual_tokens(model) or 1
    if config.initialization == "pooling" and (stride := _stride(config, length)) * config.projected_length < length:
        raise ValueError(
            f"slot_stride must be at least {math.ceil(length / config.projected_length)} for {length} tokens and "
            f"{config.projected_length} slots, got {stride}: the last tokens would reach no slot."
        )


def compress(model: PreTrainedModel, config: LinformerConfig, data: Data | None) -> LinformerConfig:
    """Replace softmax attention by attention over learned slots; everything else keeps its weights.

    Args:
        model: A bidirectional encoder; changed in place.
        config: The number of slots and their initial values.
        data: Not read.

    Returns:
        The config with `max_tokens` and `slot_stride`.
    """
    offset = position_offset(model)
    length = config.max_tokens or usual_tokens(model)
    assert length is not None
    completed = dataclasses.replace(config, max_tokens=length, slot_stride=_stride(config, length))
    if length > (usual_tokens(model) or length):
        extend_positions_(model, length + offset)
    rebuild(model, completed)
    return completed


def rebuild(model: PreTrainedModel, config: LinformerConfig) -> None:
    """Give a dense skeleton the modules of a converted model, with their initial values.

    Raises:
        ValueError: If the config was never completed.
    """
    if config.max_tokens is None or config.slot_stride is None:
        raise ValueError("max_tokens and slot_stride must be recorded, got a config that was never applied.")
    # One row for each position, including those of special offsets, as published.
    rows = config.max_tokens + position_offset(model)
    generator = torch.Generator().manual_seed(config.seed)
    shared: TimeProjection | None = None
    for layer in _global_layers(model):
        attention, projection = layer.attention, shared
        if projection is None:
            weight = layer.attention_out.weight
            projection = TimeProjection(
                rows, config.projected_length, config.share == "none", device=weight.device, dtype=weight.dtype
            )
            _initialize(projection, config, generator)
        if config.share == "layer" and shared is None:
            shared = projection
            model.base_model.add_module(_SHARED, projection)
        deferrable = _deferrable(layer)
        core = LinformerCore(
            projection,
            owned=config.share != "layer",
            max_tokens=config.max_tokens,
            head_size=layer.head_size,
            queries_per_key=layer.queries_per_unit,
            deferrable=deferrable,
            slot_mask=config.slot_mask,
            slot_stride=config.slot_stride,
            length_scaling=config.length_scaling,
        )
        attach_core_(attention, core)
        for name in deferrable or ():
            defer_(getattr(attention, name), attention)
    use_cores_(model)


def _deferrable(layer: TransformerLayer) -> tuple[str, str] | None:
    """The names of the key and value projections if they can be deferred; empty otherwise."""
    keys, values = layer.projection(Role.KEY), layer.projection(Role.VALUE)
    row = layer.architecture
    if keys.fused or values.fused or row.rotary or row.counts_heads:
        return None
    return keys.path.rpartition(".")[2], values.path.rpartition(".")[2]


def _initialize(projection: TimeProjection, config: LinformerConfig, generator: torch.Generator) -> None:
    for parameter in (projection.keys, projection.values):
        if parameter is None or parameter.is_meta:
            continue
        start = _normal if config.initialization == "normal" else _pooling
        parameter.data.copy_(start(parameter, config, generator))


def _normal(parameter: nn.Parameter, config: LinformerConfig, generator: torch.Generator) -> Tensor:
    return torch.randn(parameter.shape, generator=generator)


def _pooling(parameter: nn.Parameter, config: LinformerConfig, generator: torch.Generator) -> Tensor:
    assert config.max_tokens is not None
    assert config.slot_stride is not None
    rows, slots = parameter.shape
    positions = torch.arange(rows)
    inside = positions[:, None] // config.slot_stride == torch.arange(slots)
    # The forward pass divides by the root of the number of tokens; this factor cancels it on the longest input.
    scale = config.max_tokens**0.5 if config.length_scaling else 1.0
    return inside * (scale / config.slot_stride)
