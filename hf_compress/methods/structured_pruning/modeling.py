"""How structured pruning enters a model: collect moments, rank, allocate, cut, correct; and the shapes back again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
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
from hf_compress.methods.structured_pruning.allocation import Sublayer, allocate, check_budget
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.correction import (
    cut_,
    cut_by_sketch_,
    gram_matrix,
    observed_projections,
    scaled_columns,
)
from hf_compress.methods.structured_pruning.fisher import fisher_selection
from hf_compress.methods.structured_pruning.selection import Ranking, rank_heads, rank_neurons
from hf_compress.methods.structured_pruning.sketch import CountSketch


logger = logging.getLogger(__name__)


class _Lengths:
    """Counts sequences and the real tokens of their layers while batches go by."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.sequences = self.tokens = 0

    def __call__(self, batch: Mapping[str, Any]) -> None:
        live = seen_tokens(self._model, batch)
        self.sequences += len(live)
        self.tokens += int(live.sum())

    @property
    def mean(self) -> float:
        return self.tokens / self.sequences


def check(model: PreTrainedModel, config: StructuredPruningConfig) -> None:
    """Refuse what can be known to be impossible without looking at data.

    Raises:
        ValueError: Unsupported architecture, a budget below the minima, or centring without biases to fold into.
    """
    blocks = layers_of(model)
    for block in blocks:
        if config.min_heads > block.num_units or config.min_neurons > block.num_neurons:
            raise ValueError(
                f"min_heads and min_neurons must be at most what layer {block.index} has "
                f"({block.num_units} and {block.num_neurons}), got {config.min_heads} and {config.min_neurons}."
            )
        if config.center and (block.attention_out.bias is None or block.ffn_out.bias is None):
            raise ValueError(f"center must be False for {model.config.model_type}: its projections have no bias.")
    ones = [([1.0] * block.num_units, [1.0] * block.num_neurons) for block in blocks]
    # The share of attention grows with the length, so only a given length allows a verdict before data is seen.
    if config.seq_len is not None and config.mac_ratio < 1:
        sublayers = _sublayers(blocks, ones, config, config.seq_len)
        check_budget(sublayers, config.mac_ratio * _full(sublayers))


def data_needs(config: StructuredPruningConfig) -> DataNeeds:
    """How `compress` reads its data."""
    if config.mac_ratio == 1:
        return DataNeeds()
    several = config.route == "sketch" or config.selection == "fisher"
    return DataNeeds(2 if several else 1, labels=config.selection == "fisher")


def compress(model: PreTrainedModel, config: StructuredPruningConfig, data: Data | None) -> StructuredPruningConfig:
    """Remove heads and neurons from a live model.

    Args:
        model: Supported architecture; changed in place, on the device it is on.
        config: What to reach.
        data: Batches of inputs; labels only for `selection="fisher"`.

    Returns:
        The config with the resulting sizes.

    Raises:
        ValueError: If the budget cannot be met, there is too little data, or it cannot be read often enough. The
            model is unchanged then.
    """
    blocks = layers_of(model)
    _warn_of_filled_zeros(config, blocks)
    if config.mac_ratio == 1:
        return _completed(config, blocks, config.seq_len, 0.0)
    assert data is not None
    if config.selection == "fisher":
        return _compress_by_fisher(model, config, data)
    lengths = _Lengths(model)
    projections = observed_projections(blocks)
    if config.route == "sketch":
        statistics: dict[Any, Any] = {
            key: CountSketch(m.in_features, config.sketch_rows, config.seed, m.weight.device)
            for key, m in projections.items()
        }
    else:
        statistics = {key: SecondMoments(m.in_features, m.weight.device) for key, m in projections.items()}
    modules = {key: projection.module for key, projection in projections.items()}
    walk = None
    if config.order == "sequential":
        walk = _walk(model, blocks, data, modules, statistics, lengths)
    else:
        collect_inputs(model, modules, statistics, data, lengths, "layer statistics")
    _require_rows(statistics, projections, config)
    grams = {key: gram_matrix(statistics.pop(key), config) for key in modules} if config.route == "sketch" else None
    gram: Callable[[Any], Tensor] = grams.__getitem__ if grams else lambda key: gram_matrix(statistics[key], config)

    generator = torch.Generator().manual_seed(config.seed)
    rankings: dict[Any, Ranking] = {}
    for block in blocks:
        rankings[block.index, "heads"] = rank_heads(block, gram((block.index, "heads")), config.selection, generator)
        rankings[block.index, "neurons"] = rank_neurons(
            block, gram((block.index, "neurons")), config.selection, generator
        )
    seq_len = config.seq_len or lengths.mean
    priorities = [(rankings[b.index, "heads"].priorities, rankings[b.index, "neurons"].priorities) for b in blocks]
    sublayers = _sublayers(blocks, priorities, config, seq_len)
    sizes, tolerance = allocate(sublayers, config.mac_ratio * _full(sublayers))
    kept = {(s.layer, s.kind): size for s, size in zip(sublayers, sizes, strict=True)}

    if walk is not None:
        for index in walk:
            block = blocks[index]
            for kind in ("heads", "neurons"):
                fresh = _remeasured(walk, block, kind)
                rank = rank_heads if kind == "heads" else rank_neurons
                ranking = rank(block, gram_matrix(fresh, config), config.selection, generator)
                cut_(block, kind, ranking, kept[block.index, kind], config, fresh)
    elif config.route == "sketch":
        cut_by_sketch_(model, blocks, rankings, kept, config, data)
    else:
        for block in blocks:
            for kind in ("heads", "neurons"):
                key = (block.index, kind)
                cut_(block, kind, rankings[key], kept[key], config, statistics.pop(key))
    return _completed(config, blocks, seq_len, tolerance**0.5)


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


def _warn_of_filled_zeros(config: StructuredPruningConfig, blocks: list[TransformerLayer]) -> None:
    projections = [linear for block in blocks for linear in (block.attention_out, block.ffn_out)]
    if (
        config.correction
        and config.mac_ratio < 1
        and any(
            # A pretrained weight may be zero by chance.
            float((linear.weight == 0).float().mean()) > 0.01
            for linear in projections
        )
    ):
        logger.warning(
            "The correction of structured pruning fills zeros of the output projections again: prune weights "
            "afterwards, or set correction=False."
        )


def _require_rows(
    statistics: Mapping[Any, Any], projections: Mapping[Any, Projection], config: StructuredPruningConfig
) -> None:
    rows = min(statistic.num_rows for statistic in statistics.values())
    width = max(projection.in_features for projection in projections.values())
    if config.correction and config.ridge == 0 and rows < 2 * width:
        raise ValueError(
            f"data must hold at least {2 * width} tokens for layers of width {width} (the correction would fit "
            f"noise), got {rows}. Give more examples or set ridge above 0."
        )


def _sublayers(
    blocks: list[TransformerLayer],
    priorities: list[tuple[list[float], list[float]]],
    config: StructuredPruningConfig,
    seq_len: float,
) -> list[Sublayer]:
    result = []
    for block, (heads, neurons) in zip(blocks, priorities, strict=True):
        if config.allocation == "uniform":
            heads, neurons = ([1 - rank / len(units) for rank in range(len(units))] for units in (heads, neurons))
        least_heads = config.min_heads if config.prune_heads else len(heads)
        least_neurons = config.min_neurons if config.prune_neurons else len(neurons)
        result.append(Sublayer(block.index, "heads", heads, block.macs_per_unit(seq_len), least_heads))
        per_neuron = block.macs_per_neuron(seq_len)
        result.append(Sublayer(block.index, "neurons", neurons, per_neuron, least_neurons, config.round_to))
    return result


def _full(sublayers: list[Sublayer]) -> float:
    return sum(len(s.priorities) * s.macs for s in sublayers)


def _walk(
    model: PreTrainedModel,
    blocks: list[TransformerLayer],
    data: Data,
    modules: Mapping[Any, nn.Module],
    statistics: Mapping[Any, Any],
    lengths: _Lengths,
) -> LayerWalk:
    """A walk along the layers; the intact model is measured on the way."""
    layers = [block.module for block in blocks]
    try:
        return LayerWalk(model, layers, data, modules=modules, statistics=statistics, on_batch=lengths)
    except NotWalkable as error:
        raise ValueError(
            f"order='sequential' cannot be used with {model.config.model_type}: {error}. Use order='one_shot'."
        ) from error


def _remeasured(walk: LayerWalk, block: TransformerLayer, kind: str) -> SecondMoments:
    out = block.attention_out if kind == "heads" else block.ffn_out
    fresh = SecondMoments(out.in_features, out.weight.device)
    walk.observe({kind: out.module}, {kind: fresh})
    return fresh


def _compress_by_fisher(
    model: PreTrainedModel, config: StructuredPruningConfig, data: Data
) -> StructuredPruningConfig:
    blocks = layers_of(model)
    lengths = _Lengths(model)
    for batch in data:
        lengths(base_inputs(model, batch))
    seq_len = config.seq_len or lengths.mean
    ones = [([1.0] * block.num_units, [1.0] * block.num_neurons) for block in blocks]
    sublayers = _sublayers(blocks, ones, config, seq_len)
    check_budget(sublayers, config.mac_ratio * _full(sublayers))
    layers = fisher_selection(
        model,
        blocks,
        data,
        seq_len=seq_len,
        mac_ratio=config.mac_ratio,
        min_heads=config.min_heads,
        min_neurons=config.min_neurons,
        prune_heads=config.prune_heads,
        prune_neurons=config.prune_neurons,
        tune=config.correction,
    )
    for block, layer in zip(blocks, layers, strict=True):
        columns = unit_columns(layer.units, block.unit_size)
        scales = layer.unit_scales.repeat_interleave(block.unit_size)
        keep_heads_(block, layer.units, scaled_columns(block.attention_out, columns, scales))
        keep_neurons_(block, layer.neurons, scaled_columns(block.ffn_out, layer.neurons, layer.neuron_scales))
    return _completed(config, blocks, seq_len, None)


def _completed(
    config: StructuredPruningConfig, blocks: list[TransformerLayer], seq_len: float | None, tolerance: float | None
) -> StructuredPruningConfig:
    done = dataclasses.replace(
        config,
        seq_len=seq_len,
        tolerance=tolerance,
        heads_per_layer=[block.num_units for block in blocks],
        neurons_per_layer=[block.num_neurons for block in blocks],
    )
    logger.info("Heads left in each layer: %s; neurons: %s.", done.heads_per_layer, done.neurons_per_layer)
    return done
