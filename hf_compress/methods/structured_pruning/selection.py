"""Ranks the units of a layer: by decomposition, by weight norm, or at random.

Letters: D hidden, F feed-forward width, H attention units, W columns of the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.projections import NEURON_ROLES
from hf_compress.core.surgery import unit_columns
from hf_compress.methods.structured_pruning.allocation import UnitKind
from hf_compress.methods.structured_pruning.pivoting import (
    PivotedColumns,
    pivoted_cholesky,
    pivoted_units,
    residual_along,
)


@dataclass(frozen=True)
class Ranking:
    """The units of a sublayer, most important first.

    Args:
        order: Unit indices, most important first.
        residual: [units + 1] float64; entry k is the energy (squared norm) that is unexplained when the first k units
            are kept.
        columns: The pivots, if the order comes from a decomposition of single columns.
    """

    order: list[int]
    residual: Tensor
    columns: PivotedColumns | None = None

    @property
    def priorities(self) -> list[float]:
        """[units]: the share of the energy that is unexplained before each unit is kept; 1 for the first."""
        total = float(self.residual[0]) or 1.0
        priorities: list[float] = (self.residual[:-1] / total).tolist()
        return priorities


def rank(layer: TransformerLayer, kind: UnitKind, gram: Tensor, selection: str, generator: torch.Generator) -> Ranking:
    """Rank the attention units or the neurons of a layer; the other arguments are those of `rank_heads`."""
    if not len(gram):
        return Ranking([], torch.zeros(1, dtype=torch.float64))
    return (rank_heads if kind == "heads" else rank_neurons)(layer, gram, selection, generator)


def rank_heads(layer: TransformerLayer, gram: Tensor, selection: str, generator: torch.Generator) -> Ranking:
    """Rank the attention units of a layer.

    Args:
        layer: The layer.
        gram: [W, W] float64 moments of the context.
        selection: `interpolative`, `magnitude` or `random`.
        generator: For `random`.
    """
    size, number = layer.unit_size, layer.num_units
    if selection == "interpolative":
        return Ranking(*pivoted_units(gram, size))
    if selection == "magnitude":
        norms = layer.attention_out.weight.detach().double().square().sum(0).reshape(number, size).sum(1)
        order = torch.argsort(norms, descending=True, stable=True).tolist()
    else:
        order = torch.randperm(number, generator=generator).tolist()
    return Ranking(order, residual_along(gram, [unit_columns([unit], size) for unit in order]))


def rank_neurons(layer: TransformerLayer, gram: Tensor, selection: str, generator: torch.Generator) -> Ranking:
    """Rank the feed-forward neurons of a layer.

    Args:
        layer: The layer.
        gram: [F, F] float64 moments of the activated width.
        selection: `interpolative`, `magnitude` (product of the norms of incoming and outgoing weights) or `random`.
        generator: For `random`.
    """
    if selection == "interpolative":
        columns = pivoted_cholesky(gram)
        return Ranking(columns.order.tolist(), columns.residual, columns)
    if selection == "magnitude":
        incoming = torch.stack(
            [
                projection.weight.detach().double().square().sum(1)
                for role, projection in layer.projections.items()
                if role in NEURON_ROLES
            ]
        ).sum(0)
        norms = incoming * layer.ffn_out.weight.detach().double().square().sum(0)
        order = torch.argsort(norms, descending=True, stable=True)
    else:
        order = torch.randperm(layer.num_neurons, generator=generator)
    return Ranking(order.tolist(), residual_along(gram, [order[i : i + 1] for i in range(len(order))]))
