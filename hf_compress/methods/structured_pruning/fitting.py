"""Cuts the sublayers of one layer of a walk, and fits what stays to the dense model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.driver import LayerWalk
from hf_compress.core.surgery import keep_heads_, keep_neurons_, unit_columns
from hf_compress.methods.structured_pruning.allocation import UNIT_KINDS, UnitKind
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig
from hf_compress.methods.structured_pruning.correction import output_projection
from hf_compress.methods.structured_pruning.decomposition import interpolation_matrix
from hf_compress.methods.structured_pruning.dense_target import DenseSums, fitted
from hf_compress.methods.structured_pruning.elimination import eliminated_last
from hf_compress.methods.structured_pruning.selection import rank


def fit_layer_(
    walk: LayerWalk,
    layer: TransformerLayer,
    config: StructuredPruningConfig,
    kept: Mapping[UnitKind, int],
    generator: torch.Generator,
    pre_norm: bool,
) -> None:
    """Cut both sublayers of a layer and fit them to the dense model, the attention first.

    Args:
        walk: At this layer, with two streams.
        layer: Changed in place.
        config: How units are chosen.
        kept: How many units of each sublayer stay.
        generator: For the selection `random`.
        pre_norm: Whether the model's sublayers normalise their input.
    """
    sums = DenseSums(walk, layer, pre_norm)
    for kind in UNIT_KINDS:
        out = output_projection(layer, kind)
        moments = sums.moments(kind)
        gram = moments.inputs.gram
        if out.bias is not None:
            # What is the same for all tokens goes into the bias.
            gram = moments.inputs.centred_gram()
        wide = out.weight.detach().to(gram)
        units = _chosen(layer, kind, gram, wide, kept[kind], config, generator)
        columns = unit_columns(units, layer.unit_size if kind == "heads" else 1).to(wide.device)
        own = wide @ interpolation_matrix(gram, columns, config.ridge).T
        found = fitted(out, columns, own, moments)
        if kind == "heads":
            keep_heads_(layer, units, found.weight, found.bias)
        else:
            keep_neurons_(layer, columns, found.weight, found.bias)


def _chosen(
    layer: TransformerLayer,
    kind: UnitKind,
    gram: Tensor,
    wide: Tensor,
    number: int,
    config: StructuredPruningConfig,
    generator: torch.Generator,
) -> list[int]:
    """Ascending indices of the units that stay."""
    if config.selection == "interpolative":
        order = eliminated_last(gram, gram @ wide.T, number, layer.unit_size if kind == "heads" else 1)
    else:
        order = rank(layer, kind, gram, config.selection, generator).order
    return sorted(order[:number])
