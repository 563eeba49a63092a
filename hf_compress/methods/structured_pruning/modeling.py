"""How structured pruning enters a model: measure, rank, allocate, cut and correct; and the shapes back again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.batches import base_inputs, seen_tokens
from hf_compress.core.calibration import collect_inputs
from hf_compress.core.data_needs import Data, DataNeeds
from hf_compress.core.driver import LayerWalk
from hf_compress.core.layer_calls import NotWalkable
from hf_compress.core.moments import SecondMoments
from hf_compress.core.projections import Projection
from hf_compress.core.surgery import keep_heads_, keep_neurons_, plain_sizes, resize_layers_, unit_columns
from hf_compress.methods.structured_pruning.allocation import KINDS, Kind, Sublayer, allocate, check_budget, full_cost
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.correction import (
    cut_,
    gram_matrix,
    output_projection,
    output_projections,
    scaled_columns,
)
from hf_compress.methods.structured_pruning.fisher import fisher_selection
from hf_compress.methods.structured_pruning.selection import rank


logger = logging.getLogger(__name__)

# A pretrained weight may be zero by chance; more zeros than this fraction were put there on purpose.
_CHANCE_ZEROS = 0.01


def check(model: PreTrainedModel, config: StructuredPruningConfig) -> None:
    """Refuse what can be known to be impossible without looking at data.

    Raises:
        ValueError: Unsupported architecture, a budget below the minima, or centring without biases to fold into.
    """
    layers = layers_of(model)
    for layer in layers:
        if config.min_heads > layer.num_units or config.min_neurons > layer.num_neurons:
            raise ValueError(
                f"min_heads and min_neurons must be at most what layer {layer.index} has "
                f"({layer.num_units} and {layer.num_neurons}), got {config.min_heads} and {config.min_neurons}."
            )
        if config.center and (layer.attention_out.bias is None or layer.ffn_out.bias is None):
            raise ValueError(f"center must be False for {model.config.model_type}: its projections have no bias.")
    # The share of attention grows with the length, so only a given length allows a verdict before data is seen.
    if config.seq_len is not None:
        _check_budget(layers, config, config.seq_len)


def data_needs(config: StructuredPruningConfig) -> DataNeeds:
    """How `compress` reads its data."""
    if config.mac_ratio == 1:
        return DataNeeds()
    fisher = config.selection == "fisher"
    return DataNeeds(passes=2 if fisher else 1, labels=fisher)


def compress(model: PreTrainedModel, config: StructuredPruningConfig, data: Data | None) -> StructuredPruningConfig:
    """Remove heads and neurons from a live model.

    Args:
        model: Supported architecture; changed in place, on the device it is on.
        config: What to reach.
        data: Batches of inputs, as `data_needs` asks for them.

    Returns:
        The config with the resulting sizes.

    Raises:
        ValueError: If the budget cannot be met, there is too little data, or the layers of the model cannot be treated
            one after the other.
    """
    layers = layers_of(model)
    if config.mac_ratio == 1:
        return _completed(config, layers, config.seq_len, 0.0)
    assert data is not None
    _warn_of_filled_zeros(config, layers)
    if config.selection == "fisher":
        return _compress_by_fisher(model, layers, config, data)
    return _compress_by_activations(model, layers, config, data)


def rebuild(model: PreTrainedModel, config: StructuredPruningConfig) -> None:
    """Give a dense skeleton the sizes of a completed config.

    Raises:
        ValueError: If the config is not completed or its sizes do not fit the model.
    """
    if config.heads_per_layer is None or config.neurons_per_layer is None:
        raise ValueError(
            "heads_per_layer and neurons_per_layer must be recorded, got a config that was never applied."
        )
    resize_layers_(model, config.heads_per_layer, config.neurons_per_layer)


def plain(model: PreTrainedModel, config: StructuredPruningConfig) -> dict[str, Any]:
    """The ordinary config fields of a model whose layers all have the same sizes.

    Raises:
        ValueError: Names the layer that stock transformers cannot build.
    """
    return plain_sizes(model)


class _Lengths:
    """Counts examples and the real tokens of their layers while batches go by."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._examples = self._tokens = 0

    def __call__(self, inputs: Mapping[str, Any]) -> None:
        live = seen_tokens(self._model, inputs)
        self._examples += len(live)
        self._tokens += int(live.sum())

    @property
    def mean(self) -> float:
        return self._tokens / self._examples


def _compress_by_activations(
    model: PreTrainedModel, layers: Sequence[TransformerLayer], config: StructuredPruningConfig, data: Data
) -> StructuredPruningConfig:
    moments = {key: _moments(out) for key, out in output_projections(layers).items()}
    lengths = _Lengths(model)
    walk = _measure(model, layers, config, data, moments, lengths)
    require_tokens(layers, config, min(found.num_rows for found in moments.values()))
    generator = torch.Generator().manual_seed(config.seed)
    rankings = {
        (index, kind): rank(layers[index], kind, gram_matrix(found, config.center), config.selection, generator)
        for (index, kind), found in moments.items()
    }
    seq_len = config.seq_len or lengths.mean
    sublayers = _sublayers(layers, config, seq_len, {key: ranking.priorities for key, ranking in rankings.items()})
    sizes, tolerance = allocate(sublayers, config.mac_ratio * full_cost(sublayers))
    kept = dict(zip(rankings, sizes, strict=True))
    if walk is None:
        for key, ranking in rankings.items():
            cut_(layers[key[0]], key[1], ranking, kept[key], config, moments.pop(key))
    else:
        # Every sublayer is measured anew: the memory is better used there.
        moments.clear()
        _cut_along(walk, layers, config, kept, generator)
    return _completed(config, layers, seq_len, tolerance**0.5)


def _moments(out: Projection) -> SecondMoments:
    return SecondMoments(out.in_features, out.weight.device)


def _measure(
    model: PreTrainedModel,
    layers: Sequence[TransformerLayer],
    config: StructuredPruningConfig,
    data: Data,
    moments: Mapping[tuple[int, Kind], SecondMoments],
    lengths: _Lengths,
) -> LayerWalk | None:
    """Measure the intact model; where layers are to be treated in order, the way to walk along them afterwards."""
    modules = {key: out.module for key, out in output_projections(layers).items()}
    if config.order == "one_shot":
        collect_inputs(model, modules, moments, data, lengths, "layer statistics")
        return None
    try:
        within = [layer.module for layer in layers]
        return LayerWalk(model, within, data, modules=modules, statistics=moments, on_batch=lengths)
    except NotWalkable as error:
        raise ValueError(
            f"order='sequential' cannot be used with {model.config.model_type}: {error}. Use order='one_shot'."
        ) from error


def _cut_along(
    walk: LayerWalk,
    layers: Sequence[TransformerLayer],
    config: StructuredPruningConfig,
    kept: Mapping[tuple[int, Kind], int],
    generator: torch.Generator,
) -> None:
    """Measure, rank and cut once more, each sublayer with everything before it cut already."""
    for index in walk:
        for kind in KINDS:
            out = output_projection(layers[index], kind)
            moments = _moments(out)
            walk.observe({kind: out.module}, {kind: moments})
            ranking = rank(layers[index], kind, gram_matrix(moments, config.center), config.selection, generator)
            cut_(layers[index], kind, ranking, kept[index, kind], config, moments)


def _compress_by_fisher(
    model: PreTrainedModel, layers: Sequence[TransformerLayer], config: StructuredPruningConfig, data: Data
) -> StructuredPruningConfig:
    lengths = _Lengths(model)
    for batch in data:
        lengths(base_inputs(model, batch))
    seq_len = config.seq_len or lengths.mean
    _check_budget(layers, config, seq_len)
    found = fisher_selection(
        model,
        layers,
        data,
        seq_len=seq_len,
        mac_ratio=config.mac_ratio,
        min_heads=config.min_heads,
        min_neurons=config.min_neurons,
        prune_heads=config.prune_heads,
        prune_neurons=config.prune_neurons,
        tune=config.correction,
    )
    for layer, stays in zip(layers, found, strict=True):
        columns = unit_columns(stays.units, layer.unit_size)
        scales = stays.unit_scales.repeat_interleave(layer.unit_size)
        keep_heads_(layer, stays.units, scaled_columns(layer.attention_out, columns, scales))
        keep_neurons_(layer, stays.neurons, scaled_columns(layer.ffn_out, stays.neurons, stays.neuron_scales))
    return _completed(config, layers, seq_len, None)


def _warn_of_filled_zeros(config: StructuredPruningConfig, layers: Sequence[TransformerLayer]) -> None:
    outputs = output_projections(layers).values()
    if config.correction and any(float((out.weight == 0).float().mean()) > _CHANCE_ZEROS for out in outputs):
        logger.warning(
            "The correction of structured pruning fills zeros of the output projections again: prune weights "
            "afterwards, or set correction=False."
        )


def require_tokens(layers: Sequence[TransformerLayer], config: StructuredPruningConfig, tokens: int) -> None:
    """Refuse calibration data that is too little for the correction.

    Args:
        layers: Of the model.
        config: What to reach.
        tokens: Live tokens in the data.

    Raises:
        ValueError: If there are fewer than two tokens for each input of the widest projection.
    """
    if config.selection == "fisher" or not config.correction or config.ridge > 0 or config.mac_ratio == 1:
        return
    width = max(out.in_features for out in output_projections(layers).values())
    if tokens < 2 * width:
        raise ValueError(
            f"data must hold at least {2 * width} tokens for layers of width {width} (the correction would fit "
            f"noise), got {tokens}. Give more examples or set ridge above 0."
        )


def _sublayers(
    layers: Sequence[TransformerLayer],
    config: StructuredPruningConfig,
    seq_len: float,
    priorities: Mapping[tuple[int, Kind], Sequence[float]],
) -> list[Sublayer]:
    result = []
    for layer in layers:
        for kind in KINDS:
            values = priorities[layer.index, kind]
            if config.allocation == "uniform":
                values = [1 - position / len(values) for position in range(len(values))]
            heads = kind == "heads"
            macs = layer.macs_per_unit(seq_len) if heads else layer.macs_per_neuron(seq_len)
            least = config.min_heads if heads else config.min_neurons
            if not (config.prune_heads if heads else config.prune_neurons):
                least = len(values)
            result.append(Sublayer(layer.index, kind, values, macs, least, 1 if heads else config.round_to))
    return result


def _check_budget(layers: Sequence[TransformerLayer], config: StructuredPruningConfig, seq_len: float) -> None:
    """Check that what may not be removed fits into the budget, before anything is ranked."""
    units = {(b.index, kind): b.num_units if kind == "heads" else b.num_neurons for b in layers for kind in KINDS}
    sublayers = _sublayers(layers, config, seq_len, {key: [1.0] * number for key, number in units.items()})
    check_budget(sublayers, config.mac_ratio * full_cost(sublayers))


def _completed(
    config: StructuredPruningConfig, layers: Sequence[TransformerLayer], seq_len: float | None, tolerance: float | None
) -> StructuredPruningConfig:
    done = dataclasses.replace(
        config,
        seq_len=seq_len,
        tolerance=tolerance,
        heads_per_layer=[layer.num_units for layer in layers],
        neurons_per_layer=[layer.num_neurons for layer in layers],
    )
    logger.info("Heads left in each layer: %s; neurons: %s.", done.heads_per_layer, done.neurons_per_layer)
    return done
