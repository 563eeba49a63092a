"""Quantises the layers of a model in order, and rebuilds their shapes.

Letters: C inputs of a module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.data_needs import Data, DataNeeds
from hf_compress.core.driver import LayerWalk
from hf_compress.core.forward_state import carries_state
from hf_compress.core.layer_calls import NotWalkable
from hf_compress.core.moments import PairedMoments, SecondMoments
from hf_compress.core.projections import PackedWeight, matrix_of, module_inputs
from hf_compress.methods.weight_quantization.config import WeightQuantizationConfig
from hf_compress.methods.weight_quantization.packed import (
    PackedModule,
    pack_,
    pack_shapes_,
    storage_of,
    unpack_,
)
from hf_compress.methods.weight_quantization.rounding import (
    RoundingOptions,
    prepare_inputs,
    round_by_inputs,
    round_to_nearest,
)
from hf_compress.methods.weight_quantization.selection import (
    chosen_modules,
    layers_to_quantise,
    reads_positions,
    shared_inputs,
)


def check(model: PreTrainedModel, config: WeightQuantizationConfig) -> None:
    """Refuse a config that is impossible for the model.

    Raises:
        ValueError: If the architecture is not supported, no projection is selected, or `correction` needs inputs of
            the dense model that there are none of.
    """
    layers = layers_to_quantise(model, config)
    if config.correction == "dense" and carries_state(model):
        raise ValueError(
            "correction must be 'none' for a model that drops tokens, got 'dense': its dense inputs are of others."
        )
    if config.correction == "dense" and any(reads_positions(layer) for layer in layers):
        raise ValueError(
            f"correction must be 'none' for {model.config.model_type}, got 'dense': its projections also read "
            "embeddings of positions."
        )


def data_needs(config: WeightQuantizationConfig) -> DataNeeds:
    """Say how `compress` reads its data."""
    if config.algorithm == "rtn":
        return DataNeeds()
    return DataNeeds(passes=1, setting="algorithm='gptq'", adds_up=True)


def completed(model: PreTrainedModel, config: WeightQuantizationConfig) -> WeightQuantizationConfig:
    """The config with the order of the columns decided."""
    if config.act_order is not None:
        return config
    gated = layers_of(model)[0].architecture.gated and layers_of(model)[0].architecture.causal
    return dataclasses.replace(config, act_order=gated and config.algorithm == "gptq")


def compress(model: PreTrainedModel, config: WeightQuantizationConfig, data: Data | None) -> WeightQuantizationConfig:
    """Quantise the projections of a live model.

    Args:
        model: Supported architecture; changed in place, on the device it is on.
        config: How.
        data: Batches of inputs, read once; none for `algorithm="rtn"`.

    Returns:
        The config with the order of the columns decided.

    Raises:
        ValueError: If layers do not run one after the other, or inputs are not finite or too few.
    """
    config = completed(model, config)
    layers = layers_to_quantise(model, config)
    if config.algorithm == "rtn":
        for layer in layers:
            round_layer_(layer, config, model.base_model_prefix)
        return config
    assert data is not None
    try:
        walk = LayerWalk(model, [layer.module for layer in layers], data, two_streams=config.correction == "dense")
    except NotWalkable as error:
        raise ValueError(
            f"algorithm must be 'rtn' for {model.config.model_type}: {error}, so its layers cannot be quantised one "
            "after the other."
        ) from error
    quantize_in_order(walk, layers, config, model.base_model_prefix)
    return config


def round_layer_(layer: TransformerLayer, config: WeightQuantizationConfig, prefix: str) -> None:
    """Round the weights of one layer to nearest, and pack them."""
    for module in chosen_modules(layer, config, prefix).values():
        rounded = round_to_nearest(matrix_of(module).detach(), _options(config, module))
        pack_(module, rounded, storage_of(config))


def quantize_in_order(
    walk: LayerWalk, layers: Sequence[TransformerLayer], config: WeightQuantizationConfig, prefix: str
) -> None:
    """Quantise each layer when a walk comes to it, with the inputs that the quantised layers before it compute.

    Args:
        walk: Along these layers; with `correction="dense"` it carries the dense stream.
        layers: Only the walk's current one is looked into.
        config: Completed: `act_order` is decided.
        prefix: What the base model is called inside a model with a head.

    Raises:
        ValueError: If inputs are not finite, or too few for the damping; names the layer.
    """
    for index in walk:
        layer = layers[index]
        modules = chosen_modules(layer, config, prefix)
        sharing = shared_inputs(layer, list(modules))
        # All inputs at once, or those of modules that run together, after the ones before them were quantised.
        for part in [[paths] for paths in sharing] if config.true_sequential else [sharing]:
            for paths, moments in _observed(walk, layer, modules, part, config):
                _quantise_(layer, {path: modules[path] for path in paths}, moments, config, walk.num_sequences)


def _observed(
    walk: LayerWalk,
    layer: TransformerLayer,
    modules: Mapping[str, nn.Linear | Conv1D],
    part: Sequence[list[str]],
    config: WeightQuantizationConfig,
) -> Iterator[tuple[list[str], SecondMoments | PairedMoments]]:
    """The moments of each shared input; each is freed when the next one is asked for."""
    found: dict[str, SecondMoments | PairedMoments] = {}
    observed = {paths[0]: modules[paths[0]] for paths in part}
    widths = {path: (module_inputs(module), module.weight.device) for path, module in observed.items()}
    if observed and config.correction == "dense":
        pairs = {path: PairedMoments(width, width, device) for path, (width, device) in widths.items()}
        walk.observe_both(pairs)
        found.update(pairs)
    elif observed:
        moments = {path: SecondMoments(width, device) for path, (width, device) in widths.items()}
        walk.observe(observed, moments, repeated=reads_positions(layer))
        found.update(moments)
    for paths in part:
        yield paths, found.pop(paths[0])


def _quantise_(
    layer: TransformerLayer,
    modules: Mapping[str, nn.Linear | Conv1D],
    moments: SecondMoments | PairedMoments,
    config: WeightQuantizationConfig,
    num_sequences: int,
) -> None:
    """Quantise modules that read the same input."""
    first = next(iter(modules))
    own = moments.own if isinstance(moments, PairedMoments) else moments
    if not own.num_rows:
        raise ValueError(f"Layer {layer.index} {first} must run to be calibrated, but no token reaches it.")
    # The published scale, which matters where inputs are always zero.
    scale, device = 2 / num_sequences, modules[first].weight.device
    hessian = (own.gram * scale).to(device, torch.float32)
    difference = None
    if isinstance(moments, PairedMoments):
        difference = ((moments.cross - own.gram) * scale).to(device, torch.float32)
    del moments, own
    try:
        inputs = prepare_inputs(hessian, _options(config, modules[first]), difference)
    except ValueError as error:
        raise ValueError(f"Layer {layer.index} {first}: {error}") from error
    del hessian, difference
    for module in modules.values():
        # Zeros are what pruning left: they stay. Others are too few to matter.
        options = _options(config, module)
        rounded = round_by_inputs(matrix_of(module).detach(), inputs, options, hold_zeros=True)
        pack_(module, rounded, storage_of(config))


def _options(config: WeightQuantizationConfig, module: nn.Linear | Conv1D) -> RoundingOptions:
    return RoundingOptions(
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        act_order=bool(config.act_order),
        static_groups=config.static_groups,
        percdamp=config.percdamp,
        stored_in=module.weight.dtype,
    )


def rebuild(model: PreTrainedModel, config: WeightQuantizationConfig) -> None:
    """Give a skeleton the packed modules of a completed config.

    Raises:
        ValueError: If the config is not completed or does not fit the model.
    """
    if config.act_order is None:
        raise ValueError("act_order must be recorded, got a config that was never applied.")
    rebuild_layers(layers_to_quantise(model, config), config, model.base_model_prefix)


def rebuild_layers(layers: Sequence[TransformerLayer], config: WeightQuantizationConfig, prefix: str) -> None:
    """Give some layers of a skeleton their packed modules."""
    for layer in layers:
        for module in chosen_modules(layer, config, prefix).values():
            pack_shapes_(module, storage_of(config))


def compute_weights(model: PreTrainedModel) -> None:
    """Compute the weights of a model that was opened from its packed integers."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.compute_()


def plain(model: PreTrainedModel, config: WeightQuantizationConfig) -> dict[str, Any]:
    """Stock transformers needs no fields for the ordinary weights that `make_plain` leaves."""
    return {}


def make_plain(model: PreTrainedModel) -> None:
    """Turn packed weights into ordinary ones."""
    for module in list(model.modules()):
        if isinstance(module, PackedWeight):
            unpack_(module)
