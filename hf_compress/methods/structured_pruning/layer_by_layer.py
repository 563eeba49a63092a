"""Structured pruning of a model whose layers are in memory one at a time: first ranked, then cut in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from hf_compress.core.layer_passes import LayerPasses
from hf_compress.core.surgery import resize_
from hf_compress.methods.structured_pruning.allocation import UNIT_KINDS, UnitKind, allocate, full_cost
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.correction import (
    gram_matrix,
    output_projection,
    require_tokens,
    warn_of_filled_zeros,
)
from hf_compress.methods.structured_pruning.measuring import Lengths, empty_moments
from hf_compress.methods.structured_pruning.modeling import check, completed, cut_in_order, ranked_sublayers
from hf_compress.methods.structured_pruning.selection import rank


def compress_layers(passes: LayerPasses, config: StructuredPruningConfig) -> StructuredPruningConfig:
    """Remove heads and neurons as `compress` does where it walks from layer to layer; each is loaded twice.

    Raises:
        ValueError: If the config needs the whole model at once, the budget cannot be met, or there is too little data.
    """
    layers = passes.layers
    if config.fold_norms:
        raise ValueError(
            "fold_norms must be false layer by layer: it measures the whole model. Open it, and use compress."
        )
    if config.mac_ratio == 1:
        for _ in passes.visit("copied"):
            pass
        return completed(config, layers, config.seq_len, 0.0)
    if not config.walks:
        raise ValueError(
            f"order must be 'sequential' layer by layer, got {config.order!r}: the layers before each are cut already "
            "when it is loaded. Set order='sequential' (or target='dense')."
        )
    if config.allocation == "divergence":
        raise ValueError(
            "allocation must be 'tolerance' or 'uniform' layer by layer, got 'divergence': it needs the "
            "outputs of the whole model."
        )
    lengths, generator = Lengths(passes.model), torch.Generator().manual_seed(config.seed)
    priorities = _ranked(passes, config, lengths, generator)
    seq_len = config.seq_len or lengths.mean
    sublayers = ranked_sublayers(layers, config, seq_len, priorities)
    sizes, tolerance = allocate(sublayers, config.mac_ratio * full_cost(sublayers))
    kept = dict(zip(priorities, sizes, strict=True))
    walk = passes.walk("cut", changes=True, two_streams=config.target == "dense")
    for layer in layers[: walk.first]:
        _skip_draws(passes, layer.index, config, generator)
        resize_(layer, kept[layer.index, "heads"], kept[layer.index, "neurons"])
    pre_norm = layers[0].architecture.normalises_first(passes.model.config)
    cut_in_order(walk, layers, config, kept, generator, pre_norm)
    return completed(config, layers, seq_len, tolerance**0.5)


def _ranked(
    passes: LayerPasses, config: StructuredPruningConfig, lengths: Lengths, generator: torch.Generator
) -> Mapping[tuple[int, UnitKind], list[float]]:
    """Priorities of the units of each sublayer in the intact model, which are noted for a later start."""
    layers = passes.layers
    walk = passes.walk("ranked", changes=False, on_batch=lengths)
    # The budget shows before any layer is loaded whether the units that must stay fit.
    check(passes.model, dataclasses.replace(config, seq_len=config.seq_len or lengths.mean))
    for index in range(walk.first):
        _skip_draws(passes, index, config, generator)
    for index in walk:
        if index == 0:
            warn_of_filled_zeros(config, layers[:1])
        outputs = {kind: output_projection(layers[index], kind) for kind in UNIT_KINDS}
        moments = {kind: empty_moments(out) for kind, out in outputs.items()}
        walk.observe({kind: out.module for kind, out in outputs.items()}, moments)
        require_tokens(layers, config, min(measured.num_rows for measured in moments.values()))
        found = {}
        for kind in UNIT_KINDS:
            gram = gram_matrix(moments.pop(kind), config.center)
            found[kind] = rank(layers[index], kind, gram, config.selection, generator).priorities
        passes.note(f"ranked-{index}", found)
    return {
        (layer.index, kind): passes.noted(f"ranked-{layer.index}")[kind] for layer in layers for kind in UNIT_KINDS
    }


def _skip_draws(passes: LayerPasses, index: int, config: StructuredPruningConfig, generator: torch.Generator) -> None:
    """Leave a generator as it was after the units of a dense layer were ranked."""
    if config.selection == "random":
        for units in passes.noted(f"ranked-{index}").values():
            torch.randperm(len(units), generator=generator)
