"""Patterns of weights that become zero together: blocks, channels, attention heads, or N of every M neighbours.

A pattern divides a matrix into *units*. It scores the units and says which elements a pruned unit loses.
Shapes that the pattern does not divide are padded; padding is never counted as a weight.

Letters: R outputs (rows), C inputs (columns), U units, S projections inside one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


_BLOCK = re.compile(r"^(\d+|channel)x(\d+|channel)$")
_GROUP = re.compile(r"^(\d+):(\d+)$")
_FORMS = "'N:M', 'NxM', 'Nxchannel', 'channelxN' or 'mha' with N and M at least 1, and N < M in 'N:M'"


@dataclass(frozen=True)
class BlockPattern:
    """Blocks of neighbouring rows and columns, pruned as a whole.

    Args:
        rows: Outputs a block spans; None: all of them.
        columns: Inputs a block spans; None: all of them.
    """

    rows: int | None
    columns: int | None

    # The largest fraction of a matrix that the pattern can remove.
    ceiling = 1.0

    def _blocks(self, matrix: Tensor) -> Tensor:
        """[R, C] -> [block rows, rows, block columns, columns], padded with zeros."""
        rows, columns = self.rows or matrix.shape[0], self.columns or matrix.shape[1]
        below, right = -matrix.shape[0] % rows, -matrix.shape[1] % columns
        if below or right:
            matrix = pad(matrix, (0, right, 0, below))
        return matrix.reshape(matrix.shape[0] // rows, rows, matrix.shape[1] // columns, columns)

    def reduce(self, scores: Tensor, reduction: str) -> Tensor:
        """[R, C] scores of elements -> scores of units, the form in which they are kept from update to update."""
        if self.rows == self.columns == 1:
            return scores
        blocks = self._blocks(scores)
        if reduction == "max":
            return blocks.amax((1, 3))
        total = blocks.sum((1, 3))
        if reduction == "sum":
            return total
        if blocks.numel() == scores.numel():
            return total / (blocks.shape[1] * blocks.shape[3])
        return total / self._blocks(torch.ones_like(scores)).sum((1, 3))

    def unit_scores(self, kept: Tensor, pruned: Tensor, reduction: str) -> Tensor:
        """[U] importance of each unit; `pruned` plays no part."""
        return kept.flatten()

    def pruned_units(self, pruned: Tensor) -> Tensor:
        """[R, C] bool -> [U] bool: no element of the unit is left."""
        return ~self._blocks(~pruned).any(3).any(1).flatten()

    def spread(self, units: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
        """[U] bool -> [R, C] bool: which elements go with these units."""
        return self.expand(units, pruned.shape)

    def expand(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Values of units, in the form of `reduce` or flat -> [R, C]."""
        rows, columns = self.rows or shape[0], self.columns or shape[1]
        grid = values.reshape(-(-shape[0] // rows), 1, -(-shape[1] // columns), 1).expand(-1, rows, -1, columns)
        return grid.reshape(grid.shape[0] * rows, -1)[: shape[0], : shape[1]].contiguous()


@dataclass(frozen=True)
class NMPattern:
    """N of every M neighbouring inputs are zero; groups do not cross rows.

    A unit is a group. Where M does not divide the inputs, the last group is filled up with zeros: they count towards
    its N, as they do in the kernels that pad.

    Args:
        zeros: N.
        group: M.
    """

    zeros: int
    group: int

    @property
    def ceiling(self) -> float:
        """The largest fraction of a matrix that the pattern can remove."""
        return self.zeros / self.group

    def _groups(self, matrix: Tensor, fill: float | bool) -> Tensor:
        """[R, C] -> [R, groups, M]"""
        right = -matrix.shape[1] % self.group
        if right:
            matrix = pad(matrix, (0, right), value=fill)
        return matrix.view(len(matrix), -1, self.group)

    def _by_position(self, matrix: Tensor, fill: float | bool) -> Tensor:
        """[R, C] -> [M, R, groups]: comparing neighbours becomes comparing whole matrices.

        For 2:4 on the CPU that is about eight times as fast as sorting millions of groups of four.
        """
        return self._groups(matrix, fill).movedim(2, 0).contiguous()

    def reduce(self, scores: Tensor, reduction: str) -> Tensor:
        """Scores are kept for each element: which N go is decided anew at each pruning update."""
        return scores

    def expand(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """What `reduce` gives is one value for each element already."""
        return values

    def _lowest(self, kept: Tensor, pruned: Tensor) -> Tensor:
        """[M, R, groups] bool, exactly N a group: padding first, then the lowest scores, at ties what is pruned."""
        scores, gone = self._by_position(kept, float("-inf")), self._by_position(pruned, True)
        ranks = torch.zeros_like(gone, dtype=torch.int16)
        for position in range(1, self.group):
            before, here = scores[:position], scores[position]
            ahead = (before < here) | ((before == here) & (gone[:position] | ~gone[position]))
            ranks[position] += ahead.sum(0, dtype=torch.int16)
            ranks[:position] += ~ahead
        return ranks < self.zeros

    def unit_scores(self, kept: Tensor, pruned: Tensor, reduction: str) -> Tensor:
        """[U] importance of what a group would lose; ties do not matter here, so `pruned` plays no part."""
        scores = list(self._by_position(kept, float("-inf")))
        for i in range(self.zeros):
            for j in range(i + 1, self.group):
                scores[i], scores[j] = torch.minimum(scores[i], scores[j]), torch.maximum(scores[i], scores[j])
        lost = torch.stack(scores[: self.zeros])
        if kept.shape[1] % self.group:
            lost.masked_fill_(lost == float("-inf"), 0.0)
        if reduction == "max":
            return lost.amax(0).flatten()
        return (lost.sum(0) / (self.group if reduction == "mean" else 1)).flatten()

    def pruned_units(self, pruned: Tensor) -> Tensor:
        """[R, C] bool -> [U] bool: at least N elements of the group are gone."""
        groups = self._groups(pruned, True)
        # Adding slices, as above, instead of summing over a short last axis.
        count = groups[..., 0].to(torch.int16)
        for position in range(1, self.group):
            count += groups[..., position]
        return (count >= self.zeros).flatten()

    def spread(self, units: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
        """[U] bool -> [R, C] bool: which elements go with these units."""
        lowest = self._lowest(kept, pruned)
        chosen = (lowest & units.view(lowest.shape[1:])).movedim(0, 2)
        return chosen.flatten(1)[:, : pruned.shape[1]].contiguous()


@dataclass(frozen=True)
class HeadUnits:
    """The rows or columns that each attention unit owns in one matrix of an attention.

    Args:
        num_units: U, the number of key-value heads.
        slices: For each of the S projections that the matrix holds: its first row, and the rows of one unit. Query
            heads that share a key-value head are neighbours.
        columns: Units own columns (the attention output), not rows.
    """

    num_units: int
    slices: tuple[tuple[int, int], ...]
    columns: bool = False

    # The largest fraction of the heads that the pattern can remove.
    ceiling = 1.0

    def _parts(self, matrix: Tensor) -> list[Tensor]:
        """[R, C] -> for each slice [U, elements of one unit]."""
        rows = matrix.T if self.columns else matrix
        return [rows[first : first + self.num_units * size].reshape(self.num_units, -1) for first, size in self.slices]

    def reduce(self, scores: Tensor, reduction: str) -> Tensor:
        """[R, C] scores of elements -> [S, U], the form in which they are kept from update to update."""
        parts = self._parts(scores)
        if reduction == "max":
            return torch.stack([part.amax(1) for part in parts])
        return torch.stack([part.sum(1) if reduction == "sum" else part.mean(1) for part in parts])

    def unit_scores(self, kept: Tensor, pruned: Tensor, reduction: str) -> Tensor:
        """[S, U] importance of each unit in each projection; `pruned` plays no part."""
        return kept

    def pruned_units(self, pruned: Tensor) -> Tensor:
        """[R, C] bool -> [U] bool: no element of the unit is left in any projection."""
        return torch.stack([part.all(1) for part in self._parts(pruned)]).all(0)

    def spread(self, units: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
        """[U] bool -> [R, C] bool: which elements go with these units."""
        rows = torch.zeros(pruned.shape[int(self.columns)], dtype=torch.bool, device=units.device)
        for first, size in self.slices:
            rows[first : first + self.num_units * size] = units.repeat_interleave(size)
        return (rows if self.columns else rows[:, None]).expand(pruned.shape).contiguous()


@dataclass(frozen=True)
class HeadPattern:
    """Whole attention heads: rows of queries, keys and values, columns of the attention output.

    Which rows and columns those are depends on the model: `HeadUnits` says it for each matrix.
    """

    # The largest fraction of the heads that the pattern can remove.
    ceiling = 1.0


Pattern = BlockPattern | NMPattern | HeadPattern
# What divides one matrix.
MatrixPattern = BlockPattern | NMPattern | HeadUnits


def parse_pattern(text: str) -> Pattern:
    """The pattern that a string names.

    Args:
        text: `2:4`: two of four neighbouring inputs are zero. `4x1`: blocks of four outputs and one input.
            `1xchannel`: whole rows (outputs); `channelx1`: whole columns (inputs). `mha`: attention heads.

    Raises:
        ValueError: If it names none.

    Example:
        >>> parse_pattern("1xchannel")
        BlockPattern(rows=1, columns=None)
    """
    if text == "mha":
        return HeadPattern()
    if match := _GROUP.match(text):
        zeros, group = map(int, match.groups())
        if 0 < zeros < group:
            return NMPattern(zeros, group)
    if match := _BLOCK.match(text):
        sizes = [None if size == "channel" else int(size) for size in match.groups()]
        if sizes != [None, None] and 0 not in sizes:
            return BlockPattern(rows=sizes[0], columns=sizes[1])
    raise ValueError(f"pattern must be {_FORMS}, got {text!r}.")
