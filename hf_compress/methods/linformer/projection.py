"""Attention over compressed keys and values.

Letters: B batch, S padded length, L tokens of one example, K slots, H heads, d head size, D hidden, W width of all
heads, G query heads a key head, M rows of the projections (the longest input).
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.attention import AttentionCore
from hf_compress.core.modes import is_exporting
from hf_compress.methods.linformer.deferred import DeferredLinear


logger = logging.getLogger(__name__)


class TimeProjection(nn.Module):
    """E and F: the weight of each position in each slot.

    Args:
        rows: M.
        slots: K.
        separate_values: Whether F differs from E.

    Attributes:
        keys: E, [M, K].
        values: F, [M, K], or None when it is E.
        longest: Tokens of the longest training input so far; later rows never had a gradient.
    """

    def __init__(
        self,
        rows: int,
        slots: int,
        separate_values: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.longest: Tensor
        self.keys = nn.Parameter(torch.zeros(rows, slots, device=device, dtype=dtype))
        self.values: nn.Parameter | None = None
        if separate_values:
            self.values = nn.Parameter(torch.zeros(rows, slots, device=device, dtype=dtype))
        self.register_buffer("longest", torch.zeros((), dtype=torch.int64, device=self.keys.device))
        self._trained = self._checked = 0

    @torch.no_grad()
    def note_length(self, width: int, lengths: Tensor | None) -> None:
        """Remember the longest input in training; outside of training, warn once about longer ones.

        Args:
            width: S, padding included.
            lengths: [B] tokens of each example; None: S.
        """
        if is_exporting():
            return
        if self.training and width > self._trained:
            # The maximum is kept on the device; the number beside it only saves work, so it may be out of date.
            self._checked = 0
            if lengths is None:
                self._trained = width
                self.longest.clamp_(min=width)
            else:
                self.longest.copy_(torch.maximum(self.longest, lengths.max()))
        elif not self.training and width > self._checked:
            # Reading the maximum waits for an accelerator, so it is read only when a width occurs for the first time.
            longest, length = int(self.longest), width if lengths is None else int(lengths.max())
            unseen = 0 < longest < length
            if unseen:
                logger.warning(
                    "An input has %d tokens, the longest in training had %d: the projections of later positions "
                    "were never trained.", length, longest,
                )  # fmt: skip
            # A wide batch of short inputs does not rule out a long input in the next batch.
            if unseen or not 0 < longest < width or self.longest.device.type != "cpu":
                self._checked = width

    def extra_repr(self) -> str:
        return f"rows={self.keys.shape[0]}, slots={self.keys.shape[1]}, separate_values={self.values is not None}"


def read_rows(matrix: Tensor, seq_len: int, mask: Tensor | None) -> Tensor:
    """Gather the rows of E or F for the tokens of a batch, zero on padding.

    Args:
        matrix: [M, K].
        seq_len: S.
        mask: None, [B, S] bool for padding on the right, or [B, S] int64 ranks (see `AttentionCore`).

    Returns:
        [S, K] without a mask, else [B, S, K].
    """
    if mask is None:
        return matrix[:seq_len]
    if mask.dtype == torch.bool:
        return matrix[:seq_len] * mask.unsqueeze(-1)
    return matrix[mask.clamp(min=0)] * (mask >= 0).unsqueeze(-1)


def _shorten(states: Tensor, rows: Tensor) -> Tensor:
    """[B, K, H d] from [B, H, S, d] and [S, K] or [B, S, K]."""
    merged = states.transpose(1, 2).flatten(2)
    across = rows.transpose(-1, -2).to(merged.dtype)
    # `@` would copy all states into another order, only because E has a gradient: two to three times the time.
    return torch.bmm(across.expand(merged.shape[0], -1, -1), merged)


class LinformerCore(AttentionCore):
    """Computes `softmax(Q (E^T K / sqrt(L))^T scaling) (F^T V / sqrt(L))` for examples of different length at once.

    Args:
        projection: E and F.
        owned: Whether this core registers them; a shared projection is registered once, elsewhere.
        max_tokens: Longest input in tokens; the rows of special offsets (RoBERTa) come after it.
        head_size: d.
        queries_per_key: Query heads that share a key and a value head (grouped-query attention).
        deferrable: Names of the key and value projections in the attention module if they may be applied after E and
            F. That is exact, because both act on different axes, unless rotary positions come between them.
        slot_mask: Leave out slots that no token reaches.
        slot_stride: Tokens per slot, for `slot_mask`.
        length_scaling: Divide by sqrt(L).

    Source:
        CALD's code (arXiv 2410.06846): the 1/sqrt(L), one E for all heads, no mask over the slots.
    """

    def __init__(
        self,
        projection: TimeProjection,
        owned: bool,
        max_tokens: int,
        head_size: int,
        queries_per_key: int,
        deferrable: tuple[str, str] | None,
        slot_mask: bool,
        slot_stride: int,
        length_scaling: bool,
    ) -> None:
        super().__init__()
        if owned:
            self.projection = projection
        else:
            # Only the owner registers it: save_pretrained refuses a parameter with two names.
            object.__setattr__(self, "projection", projection)
        self.max_tokens = max_tokens
        self.head_size = head_size
        self.queries_per_key = queries_per_key
        self.deferrable = deferrable
        self.slot_mask = slot_mask
        self.slot_stride = slot_stride
        self.length_scaling = length_scaling

    @property
    def num_slots(self) -> int:
        return self.projection.keys.shape[1]

    def forward(
        self,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        seq_len, projection = key.shape[2], self.projection
        if seq_len > self.max_tokens:
            raise ValueError(
                f"An input must have at most {self.max_tokens} tokens, got {seq_len}. "
                "Convert with a larger max_tokens."
            )
        lengths = None if mask is None else (mask if mask.dtype == torch.bool else mask >= 0).sum(1).clamp(min=1)
        projection.note_length(seq_len, lengths)
        key_linear, value_linear = self._deferred(attention, seq_len)
        rows = read_rows(projection.keys, seq_len, mask)
        short_key = _shorten(key, rows)
        keys = self._finish(short_key, rows, lengths, seq_len, key_linear)
        if projection.values is None and key_linear is not None and value_linear is not None:
            short_value = short_key  # one matrix, and both still hold the same input of the layer
        else:
            rows = rows if projection.values is None else read_rows(projection.values, seq_len, mask)
            short_value = _shorten(value, rows)
        values = self._finish(short_value, rows, lengths, seq_len, value_linear)
        slots = self._live_slots(lengths, seq_len, query.device) if self.slot_mask else None
        if output_attentions:
            scores = query @ keys.transpose(-1, -2) * scaling
            if slots is not None:
                scores = scores.masked_fill(~slots, torch.finfo(scores.dtype).min)
            weights = F.dropout(scores.softmax(-1), dropout)
            return (weights @ values).transpose(1, 2).contiguous(), weights
        context = F.scaled_dot_product_attention(query, keys, values, slots, dropout, scale=scaling)
        return context.transpose(1, 2).contiguous(), None

    def _deferred(self, attention: nn.Module, seq_len: int) -> list[DeferredLinear | None]:
        """The key and the value projection if they are deferred."""
        linears = [getattr(attention, name) for name in self.deferrable or ()]
        found = [x if isinstance(x, DeferredLinear) and x.is_deferred(seq_len) else None for x in linears]
        return found or [None, None]

    def _finish(
        self, short: Tensor, rows: Tensor, lengths: Tensor | None, seq_len: int, deferred: DeferredLinear | None
    ) -> Tensor:
        """[B, H, K, d] from shortened keys, values, or input of their deferred projection [B, K, W / G or D]."""
        if deferred is not None:
            short = deferred(short, bias_scale=rows.sum(-2).to(short.dtype))
        if self.length_scaling:
            short = short * (seq_len**-0.5 if lengths is None else lengths.to(short.dtype).rsqrt()[:, None, None])
        heads = short.view(*short.shape[:-1], -1, self.head_size).transpose(1, 2)
        return heads if self.queries_per_key == 1 else heads.repeat_interleave(self.queries_per_key, 1)

    def _live_slots(self, lengths: Tensor | None, seq_len: int, device: torch.device) -> Tensor:
        """[B or 1, 1, 1, K] bool: slots that at least one token of the example reaches."""
        first = torch.arange(self.num_slots, device=device) * self.slot_stride
        if lengths is None:
            return (first < seq_len)[None, None, None]
        return (first < lengths[:, None])[:, None, None]

    def macs(self, seq_len: float, width: int, hidden: int) -> float:
        return min(self._macs_plain(seq_len, width), self._macs_deferred(seq_len, width, hidden))

    def defers(self, seq_len: int, width: int, hidden: int) -> bool:
        """Whether it is cheaper to project keys and values after their input is shortened."""
        return self._macs_deferred(seq_len, width, hidden) < self._macs_plain(seq_len, width)

    def _macs_plain(self, seq_len: float, width: int) -> float:
        # Keys and values are shortened once per group; scores and contexts are computed for every query head.
        return (2 + 2 / self.queries_per_key) * seq_len * self.num_slots * width

    def _macs_deferred(self, seq_len: float, width: int, hidden: int) -> float:
        if self.deferrable is None:
            return float("inf")
        # The projections are counted elsewhere for all tokens; projecting K slots instead is a saving.
        passes = 1 if self.projection.values is None else 2
        projected = 2 * (self.num_slots - seq_len) * hidden * width / self.queries_per_key
        return (passes * hidden + 2 * width) * seq_len * self.num_slots + projected

    def extra_repr(self) -> str:
        return f"slot_mask={self.slot_mask}, slot_stride={self.slot_stride}, length_scaling={self.length_scaling}"
