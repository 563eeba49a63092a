"""Applies structured pruning to a model (measure, rank, allocate, cut, correct), and rebuilds its shapes."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.batches import base_inputs
from hf_compress.core.data_needs import Data, DataNeeds
from hf_compress.core.driver import LayerWalk
from hf_compress.core.folded_norms import fold_norms_, folds_of, remove_, require_foldable
from hf_compress.core.forward_state import carries_state
from hf_compress.core.processes import added_up
from hf_compress.core.shared_passes import measured_once
from hf_compress.core.surgery import keep_heads_, keep_neurons_, plain_sizes, resize_layers_, unit_columns
from hf_compress.methods.structured_pruning.allocation import (
    UNIT_KINDS,
    Sublayer,
    UnitKind,
    allocate,
    check_budget,
    full_cost,
    shared_cost,
)
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.correction import (
    cut_,
    gram_matrix,
    output_projection,
    scaled_columns,
    warn_of_filled_zeros,
)
from hf_compress.methods.structured_pruning.cut_together import nearest_sizes
from hf_compress.methods.structured_pruning.divergence import divergence_priorities
from hf_compress.methods.structured_pruning.fisher import fisher_selection
from hf_compress.methods.structured_pruning.fitting import fit_layer_
from hf_compress.methods.structured_pruning.measuring import Lengths, Measured, empty_moments, measure_and_rank
from hf_compress.methods.structured_pruning.selection import rank


logger = logging.getLogger(__name__)


def check(model: PreTrainedModel, config: StructuredPruningConfig) -> None:
    """Refuse a config that is impossible for the model, as far as that is known without data.

    Raises:
        ValueError: Unsupported architecture, a budget below the minima, or centring without biases to fold into.
    """
    layers = layers_of(model)
    if config.fold_norms:
        require_foldable(model)
    if not config.min_heads and carries_state(model):
        raise ValueError("min_heads must be at least 1 for a model that drops tokens: heads say which, got 0.")
    for layer in layers:
        # What an earlier step removed altogether does not come back.
        if 0 < layer.num_units < config.min_heads or 0 < layer.num_neurons < config.min_neurons:
            raise ValueError(
                f"min_heads and min_neurons must be at most {layer.num_units} and {layer.num_neurons}, the sizes of "
                f"layer {layer.index}, got {config.min_heads} and {config.min_neurons}."
            )
        sublayers = (layer.num_units, layer.attention_out), (layer.num_neurons, layer.ffn_out)
        if config.center and any(units and out.bias is None for units, out in sublayers):
            raise ValueError(f"center must be False for {model.config.model_type}: its projections have no bias.")
    # The share of attention grows with the length, so only a given length allows a verdict before data is seen.
    if config.seq_len is not None:
        _check_budget(layers, config, config.seq_len)


def data_needs(config: StructuredPruningConfig) -> DataNeeds:
    """Say how `compress` reads its data."""
    if config.mac_ratio == 1:
        return DataNeeds(passes=1, setting="fold_norms=True", adds_up=True) if config.fold_norms else DataNeeds()
    fisher = config.selection == "fisher"
    passes = 2 if fisher or config.allocation == "divergence" else 1
    return DataNeeds(passes=min(2, passes + config.fold_norms), labels=fisher, adds_up=True)


def compress(model: PreTrainedModel, config: StructuredPruningConfig, data: Data | None) -> StructuredPruningConfig:
    """Remove heads and neurons from a live model.

    Args:
        model: Supported architecture; changed in place, on the device it is on.
        config: The target and how to reach it.
        data: Batches of inputs, as `data_needs` asks for them.

    Returns:
        The config with the resulting sizes.

    Raises:
        ValueError: If the budget cannot be met, if there is too little data, or if `order="sequential"` is not
            possible for the model.
    """
    layers = layers_of(model)
    if config.mac_ratio == 1:
        done = completed(config, layers, config.seq_len, 0.0)
    else:
        assert data is not None
        warn_of_filled_zeros(config, layers)
        by = _compress_by_fisher if config.selection == "fisher" else _compress_by_activations
        done = by(model, layers, config, data)
    if config.fold_norms:
        assert data is not None
        fold_norms_(model, data)
    return done


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
    if config.fold_norms:
        remove_(folds_of(model))


def plain(model: PreTrainedModel, config: StructuredPruningConfig) -> dict[str, Any]:
    """Give the ordinary config fields of a model whose layers all have the same sizes.

    Raises:
        ValueError: Names the layer that stock transformers cannot build.
    """
    return plain_sizes(model)


def _compress_by_activations(
    model: PreTrainedModel, layers: Sequence[TransformerLayer], config: StructuredPruningConfig, data: Data
) -> StructuredPruningConfig:
    measure = partial(measure_and_rank, model, layers, config, data)
    if not config.walks:
        # A walk is part of what was measured, and goes on through this model.
        settings = config.selection, config.center, config.seed, config.correction, config.ridge
        measured = measured_once("activations", settings, model, data, measure)
    else:
        measured = measure()
    rankings = measured.rankings
    seq_len = config.seq_len or measured.mean_length
    kept, tolerance = _sizes(model, layers, config, measured, data, seq_len)
    if measured.walk is None:
        for key, ranking in rankings.items():
            cut_(layers[key[0]], key[1], ranking, kept[key], config, measured.moments[key])
    else:
        # Every sublayer is measured again, so the moments of the intact model only take up memory.
        measured.moments.clear()
        pre_norm = layers[0].architecture.normalises_first(model.config)
        cut_in_order(measured.walk, layers, config, kept, measured.generator, pre_norm)
    # Priorities of a decomposition are shares of squared norms; the record holds a ratio of norms.
    return completed(config, layers, seq_len, None if config.allocation == "divergence" else tolerance**0.5)


def _sizes(
    model: PreTrainedModel,
    layers: Sequence[TransformerLayer],
    config: StructuredPruningConfig,
    measured: Measured,
    data: Data,
    seq_len: float,
) -> tuple[Mapping[tuple[int, UnitKind], int], float]:
    """(layer index, kind) -> units that stay, and the highest priority of a unit that goes."""
    rankings = measured.rankings
    ready = model, layers, rankings, measured.moments, data, measured.mean_length
    divergent = config.allocation == "divergence"
    if divergent:
        # Before all those passes.
        _check_budget(layers, config, seq_len)
        settings = config.selection, config.center, config.seed, config.walks
        priorities = measured_once("divergence", settings, model, data, partial(divergence_priorities, *ready))
    else:
        priorities = {key: each.priorities for key, each in rankings.items()}

    def allocated(factor: float) -> tuple[dict[tuple[int, UnitKind], int], float]:
        settings = config if factor < math.inf else dataclasses.replace(config, prune_heads=False)
        weighed = {
            key: [value * factor for value in values] if key[1] == "heads" and factor < math.inf else values
            for key, values in priorities.items()
        }
        sublayers = ranked_sublayers(layers, settings, seq_len, weighed)
        sizes, tolerance = allocate(sublayers, config.mac_ratio * full_cost(sublayers))
        return dict(zip(rankings, sizes, strict=True)), tolerance

    if divergent and config.prune_heads and config.prune_neurons:
        return nearest_sizes(*ready, lambda factor: allocated(factor)[0]), 0.0
    return allocated(1.0)


def cut_in_order(
    walk: LayerWalk,
    layers: Sequence[TransformerLayer],
    config: StructuredPruningConfig,
    kept: Mapping[tuple[int, UnitKind], int],
    generator: torch.Generator,
    pre_norm: bool,
) -> None:
    """Measure, rank and cut each sublayer of a walk, in a model whose earlier sublayers are cut already."""
    for index in walk:
        if config.target == "dense":
            sizes = {kind: kept[index, kind] for kind in UNIT_KINDS}
            fit_layer_(walk, layers[index], config, sizes, generator, pre_norm)
            continue
        for kind in UNIT_KINDS:
            out = output_projection(layers[index], kind)
            moments = empty_moments(out)
            walk.observe({kind: out.module}, {kind: moments})
            ranking = rank(layers[index], kind, gram_matrix(moments, config.center), config.selection, generator)
            cut_(layers[index], kind, ranking, kept[index, kind], config, moments)


def _compress_by_fisher(
    model: PreTrainedModel, layers: Sequence[TransformerLayer], config: StructuredPruningConfig, data: Data
) -> StructuredPruningConfig:
    lengths = Lengths(model)
    with added_up(lengths):
        for batch in data:
            lengths(base_inputs(model, batch))
    seq_len = config.seq_len or lengths.mean
    _check_budget(layers, config, seq_len)
    selected = fisher_selection(
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
    for layer, kept in zip(layers, selected, strict=True):
        columns = unit_columns(kept.units, layer.unit_size)
        scales = kept.unit_scales.repeat_interleave(layer.unit_size)
        keep_heads_(layer, kept.units, scaled_columns(layer.attention_out, columns, scales))
        keep_neurons_(layer, kept.neurons, scaled_columns(layer.ffn_out, kept.neurons, kept.neuron_scales))
    return completed(config, layers, seq_len, None)


def ranked_sublayers(
    layers: Sequence[TransformerLayer],
    config: StructuredPruningConfig,
    seq_len: float,
    priorities: Mapping[tuple[int, UnitKind], Sequence[float]],
) -> list[Sublayer]:
    result = []
    full = sum(x.num_units * x.macs_per_unit(seq_len) + x.num_neurons * x.macs_per_neuron(seq_len) for x in layers)
    fixed = config.sublayer_cost * full / (len(layers) * len(UNIT_KINDS))
    for layer in layers:
        for kind in UNIT_KINDS:
            values = priorities[layer.index, kind]
            if config.allocation == "uniform":
                values = [1 - position / len(values) for position in range(len(values))]
            heads = kind == "heads"
            macs = layer.macs_per_unit(seq_len) if heads else layer.macs_per_neuron(seq_len)
            if config.allocation == "divergence":
                # What a unit is worth for its cost; decompositions compare shares, whatever a unit costs.
                values = shared_cost(values, macs, fixed)
            least = config.min_heads if heads else config.min_neurons
            if not (config.prune_heads if heads else config.prune_neurons):
                least = len(values)
            result.append(Sublayer(layer.index, kind, values, macs, least, 1 if heads else config.round_to))
    return result


def _check_budget(layers: Sequence[TransformerLayer], config: StructuredPruningConfig, seq_len: float) -> None:
    """Check that the units that must stay fit into the budget, before anything is ranked."""
    units = {(x.index, kind): x.num_units if kind == "heads" else x.num_neurons for x in layers for kind in UNIT_KINDS}
    sublayers = ranked_sublayers(layers, config, seq_len, {key: [1.0] * number for key, number in units.items()})
    check_budget(sublayers, config.mac_ratio * full_cost(sublayers))


def completed(
    config: StructuredPruningConfig, layers: Sequence[TransformerLayer], seq_len: float | None, tolerance: float | None
) -> StructuredPruningConfig:
    done = dataclasses.replace(
        config,
        seq_len=seq_len,
        tolerance=tolerance,
        heads_per_layer=[layer.num_units for layer in layers],
        neurons_per_layer=[layer.num_neurons for layer in layers],
    )
    logger.info("Heads kept in each layer: %s; neurons: %s.", done.heads_per_layer, done.neurons_per_layer)
    return done
