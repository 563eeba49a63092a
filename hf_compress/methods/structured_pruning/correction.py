"""From a ranking to smaller layers: keep the first units and fold what the others carried into the next layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.calibration import collect_inputs
from hf_compress.core.moments import SecondMoments
from hf_compress.core.projections import Projection
from hf_compress.core.surgery import keep_heads_, keep_neurons_, unit_columns
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.decomposition import check_conditioning, gram_of, interpolation_matrix
from hf_compress.methods.structured_pruning.selection import Ranking
from hf_compress.methods.structured_pruning.sketch import CountSketch


Data = Iterable[Mapping[str, Any]]


def observed_projections(layers: list[TransformerLayer]) -> dict[tuple[int, str], Projection]:
    """(layer, kind) -> the output projection whose input is measured."""
    return {
        (layer.index, kind): projection
        for layer in layers
        for kind, projection in (("heads", layer.attention_out), ("neurons", layer.ffn_out))
    }


def gram_matrix(statistic: Any, config: StructuredPruningConfig) -> Tensor:
    """[n, n] float64 Gram matrix of a statistic, centred or sketched as the config says."""
    if isinstance(statistic, CountSketch):
        return gram_of(statistic.rows)
    return statistic.centred_gram() if config.center else statistic.gram


class _Cross:
    """`A[:, keep]^T A`, accumulated: what the correction needs when the full moments do not fit."""

    def __init__(self, width: int, keep: Tensor, device: torch.device) -> None:
        self.keep = keep.to(device)
        self.sum = torch.zeros(len(keep), width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        for chunk in rows.split(8192):
            wide = chunk.double()
            self.sum.addmm_(wide[:, self.keep].T, wide)


def _columns(layer: TransformerLayer, kind: str, units: list[int]) -> Tensor:
    return unit_columns(units, layer.unit_size) if kind == "heads" else torch.tensor(units)


def cut_(
    layer: TransformerLayer,
    kind: str,
    ranking: Ranking,
    size: int,
    config: StructuredPruningConfig,
    moments: SecondMoments,
) -> None:
    """Keep the first `size` units of a ranking and fold the rest into the output projection."""
    if size == len(ranking.order):
        return
    out = layer.attention_out if kind == "heads" else layer.ffn_out
    units = sorted(ranking.order[:size])
    columns = _columns(layer, kind, units).to(moments.total.device)
    weight = bias = None
    if config.correction:
        if ranking.columns is not None:
            check_conditioning(ranking.columns, size)
        matrix = interpolation_matrix(gram_matrix(moments, config), columns, config.ridge)
        wide = out.weight.detach().to(matrix)
        weight = wide @ matrix.T
        if config.center:
            bias = out.bias.detach().to(matrix) + wide @ (moments.mean - matrix.T @ moments.mean[columns])
    _apply(layer, kind, units, weight, bias)


def _apply(layer: TransformerLayer, kind: str, units: list[int], weight: Tensor | None, bias: Tensor | None) -> None:
    if kind == "heads":
        keep_heads_(layer, units, weight, bias)
    else:
        keep_neurons_(layer, torch.tensor(units), weight, bias)


def cut_by_sketch_(
    model: PreTrainedModel,
    layers: list[TransformerLayer],
    rankings: Mapping[Any, Ranking],
    kept: Mapping[Any, int],
    config: StructuredPruningConfig,
    data: Data,
) -> None:
    """Second exact pass for the chosen columns only: coefficients from a sketch are several times worse."""
    projections = observed_projections(layers)
    units = {key: sorted(rankings[key].order[: kept[key]]) for key in projections}
    crosses = {
        key: _Cross(out.in_features, _columns(layers[key[0]], key[1], units[key]), out.weight.device)
        for key, out in projections.items()
        if kept[key] < len(rankings[key].order)
    }
    if config.correction and crosses:
        modules = {key: projections[key].module for key in crosses}
        collect_inputs(model, modules, crosses, data, description="correction")
    for key, cross in crosses.items():
        weight = None
        if config.correction:
            matrix = interpolation_matrix(cross.sum, cross.keep, config.ridge, cross=cross.sum)
            weight = projections[key].weight.detach().to(matrix) @ matrix.T
        _apply(layers[key[0]], key[1], units[key], weight, None)


def scaled_columns(out: Projection, columns: Tensor, scales: Tensor) -> Tensor:
    """[out, k] float64: the given columns of a projection, each times its scale."""
    weight = out.weight.detach()[:, columns.to(out.weight.device)].double()
    return weight * scales.to(weight)
