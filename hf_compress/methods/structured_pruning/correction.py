"""Cuts a sublayer to the first units of a ranking, and folds the others into its output projection."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.moments import SecondMoments
from hf_compress.core.projections import Projection
from hf_compress.core.surgery import keep_heads_, keep_neurons_, unit_columns
from hf_compress.methods.structured_pruning.allocation import UNIT_KINDS, UnitKind
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.decomposition import check_conditioning, interpolation_matrix
from hf_compress.methods.structured_pruning.selection import Ranking


logger = logging.getLogger(__name__)

# Pretrained weights may be zero by chance; a larger fraction of zeros comes from pruning.
_CHANCE_ZEROS = 0.01


def output_projection(layer: TransformerLayer, kind: UnitKind) -> Projection:
    """The projection whose inputs are the heads or the neurons."""
    return layer.attention_out if kind == "heads" else layer.ffn_out


def output_projections(layers: Sequence[TransformerLayer]) -> dict[tuple[int, UnitKind], Projection]:
    """(layer index, kind) -> the projection whose input is measured."""
    return {(layer.index, kind): output_projection(layer, kind) for layer in layers for kind in UNIT_KINDS}


def gram_matrix(moments: SecondMoments, center: bool) -> Tensor:
    """[n, n] float64 Gram matrix of the rows seen, or of their deviations from the mean."""
    return moments.centred_gram() if center else moments.gram


def cut_(
    layer: TransformerLayer,
    kind: UnitKind,
    ranking: Ranking,
    size: int,
    config: StructuredPruningConfig,
    moments: SecondMoments,
) -> None:
    """Keep the first `size` units of a ranking and fold the rest into the output projection.

    Args:
        layer: Changed in place.
        kind: Which of its sublayers is cut.
        ranking: All units, most important first.
        size: How many units stay.
        config: Whether and how to correct.
        moments: Those of the output projection's input.
    """
    if size == len(ranking.order):
        return
    out = output_projection(layer, kind)
    units = sorted(ranking.order[:size])
    columns = unit_columns(units, layer.unit_size) if kind == "heads" else torch.tensor(units, dtype=torch.int64)
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
        keep_neurons_(layer, torch.tensor(units, dtype=torch.int64), weight, bias)


def scaled_columns(out: Projection, columns: Tensor, scales: Tensor) -> Tensor:
    """[outputs, k] float64: the given columns of a projection, each multiplied by its scale."""
    weight = out.weight.detach()[:, columns.to(out.weight.device)].double()
    return weight * scales.to(weight)


def warn_of_filled_zeros(config: StructuredPruningConfig, layers: Sequence[TransformerLayer]) -> None:
    """Warn if the correction would fill zeros that weight pruning has left in the output projections."""
    outputs = output_projections(layers).values()
    if config.correction and any(float((out.weight == 0).float().mean()) > _CHANCE_ZEROS for out in outputs):
        logger.warning(
            "The correction of structured pruning fills zeros of the output projections again: prune weights "
            "afterwards, or set correction=False."
        )


def require_tokens(layers: Sequence[TransformerLayer], config: StructuredPruningConfig, tokens: int) -> None:
    """Refuse calibration data with too few tokens for the correction.

    Args:
        layers: Those of the model.
        config: The target and how to reach it.
        tokens: Number of live tokens in the data.

    Raises:
        ValueError: If there are fewer than two tokens for each input of the widest projection.
    """
    if config.selection == "fisher" or not config.correction or config.ridge > 0 or config.mac_ratio == 1:
        return
    width = max(out.in_features for out in output_projections(layers).values())
    if tokens < 2 * width:
        raise ValueError(
            f"data must hold at least {2 * width} tokens for layers of width {width} (the correction would fit "
            f"noise), got {tokens}. Give more examples, or set ridge above 0 (0.001, for instance)."
        )
