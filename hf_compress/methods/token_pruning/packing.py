"""The live tokens of a batch, packed without gaps, and their positions.

Letters: B batch, S padded length, n longest live length, N live tokens of the batch, D hidden.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The positions of packed tokens in the batch and in the left-aligned batch.

    Args:
        rows: [N] index of each token in the flattened [B * S]; None when all positions are live.
        lengths: [B] tokens of each example.
        width: S.
        longest: n, the largest of the lengths.
        slots: [N] index of each token in the flattened, left-aligned [B * n]; None when all lengths are equal.
    """

    rows: Tensor | None
    lengths: Tensor
    width: int
    longest: int
    slots: Tensor | None

    @staticmethod
    def full(batch: int, width: int, device: torch.device) -> Packing:
        """The packing of a batch whose positions are all live."""
        return Packing(None, torch.full((batch,), width, device=device), width, width, None)

    @staticmethod
    def of(live: Tensor, need_first: bool = False) -> Packing:
        """Make the packing of a [B, S] bool mask. Waits for the device twice, or once if all positions are live.

        Args:
            live: The mask.
            need_first: Refuse examples that have tokens, but none at their first position.

        Raises:
            ValueError: If there is such an example.
        """
        lengths = live.sum(1)
        # One wait for the device for all three numbers.
        without_first = (lengths * ~live[:, 0]).amax()
        shortest, longest, without_first = torch.stack([*lengths.aminmax(), without_first]).tolist()
        if need_first and without_first:
            raise ValueError(
                "attention_mask must have padding on the right for a classifier that reads the first token, got it on "
                "the left. Set the tokenizer's padding_side to 'right'."
            )
        width = live.shape[1]
        if shortest == width:
            return Packing(None, lengths, width, width, None)
        rows = live.flatten().nonzero().squeeze(1)
        slots = None if shortest == longest else _left_aligned(live, longest)[rows]
        return Packing(rows, lengths, width, longest, slots)

    def only(self, keep: Tensor) -> tuple[Packing, Tensor | None]:
        """Make the packing of the tokens of a left-aligned batch that stay.

        Args:
            keep: [B, n] bool, False after the end of each example.

        Returns:
            The new packing, and [N'] the indices of its tokens among the N packed ones, None when all stay. Waits for
            the device once when all stay or there is one example, otherwise twice.
        """
        chosen = self.unalign(keep).nonzero().squeeze(1)
        total = len(chosen)
        if total == (keep.numel() if self.slots is None else len(self.slots)):
            return self, None
        rows = chosen if self.rows is None else self.rows.index_select(0, chosen)
        if len(keep) == 1:
            return Packing(rows, torch.full_like(self.lengths, total), self.width, total, None), chosen
        lengths = keep.sum(1)
        shortest, longest = torch.stack(lengths.aminmax()).tolist()
        slots = None
        if shortest != longest:
            slots = _left_aligned(keep, longest)[chosen if self.slots is None else self.slots[chosen]]
        return Packing(rows, lengths, self.width, longest, slots), chosen

    def first(self) -> Packing:
        """The packing of each example's first token alone; of the first position where an example has none."""
        batch = self.lengths.shape[0]
        rows = torch.arange(0, batch * self.width, self.width, device=self.lengths.device)
        if self.rows is not None and self.slots is None and self.longest:
            rows = self.rows.view(batch, -1)[:, 0]
        elif self.rows is not None and self.slots is not None:
            rows = torch.where(self.lengths > 0, self.rows[self.starts], rows)
        return Packing(rows, torch.ones_like(self.lengths), self.width, 1, None)

    def live(self) -> Tensor:
        """[B, S] bool."""
        shape = (len(self.lengths), self.width)
        if self.rows is None:
            return torch.ones(shape, dtype=torch.bool, device=self.lengths.device)
        live = torch.zeros(shape, dtype=torch.bool, device=self.lengths.device)
        return live.view(-1).index_fill(0, self.rows, True).view(shape)

    def pack(self, states: Tensor) -> Tensor:
        """[N, D] from [B, S, D]."""
        flat = states.reshape(-1, states.shape[-1])
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def align(self, packed: Tensor) -> Tensor:
        """[B, n, D] from [N, D]; positions after the end of an example repeat some row."""
        aligned = packed if self.slots is None else packed.index_select(0, self._sources)
        return aligned.reshape(len(self.lengths), self.longest, packed.shape[-1])

    @functools.cached_property
    def _sources(self) -> Tensor:
        """[B * n] the packed token at each position; after the end of an example, its last token again."""
        positions = torch.arange(self.longest, device=self.lengths.device).minimum(self.lengths[:, None] - 1)
        # An example without tokens gets some row, which is never read.
        return (positions + self.starts[:, None]).clamp(min=0).flatten()

    @functools.cached_property
    def starts(self) -> Tensor:
        """[B] the index of each example's first packed token; for one without tokens, the index of another token."""
        if self.slots is None:
            return torch.arange(0, len(self.lengths) * self.longest, self.longest, device=self.lengths.device)
        ends = self.lengths.cumsum(0)
        return (ends - self.lengths).clamp(max=ends[-1:] - 1)

    def unalign(self, aligned: Tensor) -> Tensor:
        """[N, ...] from [B, n, ...]."""
        flat = aligned.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)

    @functools.cached_property
    def inside(self) -> Tensor | None:
        """[B, n] bool, True on the tokens of the aligned batch; None if there are no other positions."""
        if self.slots is None:
            return None
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]


def _left_aligned(live: Tensor, longest: int) -> Tensor:
    """[B * S] position of each live token when every example starts at a multiple of `longest`."""
    starts = torch.arange(0, len(live) * longest, longest, device=live.device)
    return (live.cumsum(1) - 1 + starts[:, None]).flatten()
