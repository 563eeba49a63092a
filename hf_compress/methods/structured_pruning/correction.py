"""From a ranking to smaller layers: keep the first units and fold what the others carried into the next projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.moments import SecondMoments
from hf_compress.core.projections import Projection
from hf_compress.core.surgery import keep_heads_, keep_neurons_, unit_columns
from hf_compress.methods.structured_pruning.allocation import KINDS, Kind
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.decomposition import check_conditioning, interpolation_matrix
from hf_compress.methods.structured_pruning.selection import Ranking


def output_projection(layer: TransformerLayer, kind: Kind) -> Projection:
    """The projection that reads what heads or neurons compute."""
    return layer.attention_out if kind == "heads" else layer.ffn_out


def output_projections(layers: Sequence[TransformerLayer]) -> dict[tuple[int, Kind], Projection]:
    """(layer index, kind) -> the projection whose input is measured."""
    return {(layer.index, kind): output_projection(layer, kind) for layer in layers for kind in KINDS}


def gram_matrix(moments: SecondMoments, center: bool) -> Tensor:
    """[n, n] float64 Gram matrix of the rows seen, or of their deviations from the mean."""
    return moments.centred_gram() if center else moments.gram


def cut_(
    layer: TransformerLayer,
    kind: Kind,
    ranking: Ranking,
    size: int,
    config: StructuredPruningConfig,
    moments: SecondMoments,
) -> None:
    """Keep the first `size` units of a ranking and fold the rest into the output projection.

    Args:
        layer: Changed in place.
        kind: What its units are.
        ranking: All units, most important first.
        size: How many stay.
        config: Whether and how to correct.
        moments: Of the input of the output projection.
    """
    if size == len(ranking.order):
        return
    out = output_projection(layer, kind)
    units = sorted(ranking.order[:size])
    columns = unit_columns(units, layer.unit_size) if kind == "heads" else torch.tensor(units)
    weight = bias = None
    if config.correction:
        if ranking.columns is not None:
            check_conditioning(ranking.columns, size)
        columns = columns.to(moments.total.device)
        matrix = interpolation_matrix(gram_matrix(moments, config.center), columns, config.ridge)
        wide = out.weight.detach().to(matrix)
        weight = wide @ matrix.T
        if config.center:
            # `check` has refused projections without a bias.
            assert out.bias is not None
            bias = out.bias.detach().to(matrix) + wide @ (moments.mean - matrix.T @ moments.mean[columns])
    if kind == "heads":
        keep_heads_(layer, units, weight, bias)
    else:
        keep_neurons_(layer, torch.tensor(units), weight, bias)


def scaled_columns(out: Projection, columns: Tensor, scales: Tensor) -> Tensor:
    """[out, k] float64: the given columns of a projection, each times its scale."""
    weight = out.weight.detach()[:, columns.to(out.weight.device)].double()
    return weight * scales.to(weight)
