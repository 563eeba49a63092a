"""A bidirectional LSTM over the live tokens of each row, whatever stands between and behind them.

Letters: B rows, S tokens, E width of the inputs, H width of one direction.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


# Above any position in a row.
_BEHIND = 2**31


class LiveTokens(NamedTuple):
    """Where the live tokens of a batch are.

    Args:
        mask: [B, S] bool, True on live tokens.
        order: [B, S] positions, those of live tokens first, both kinds in their order; None where they are already.
        lengths: [B] live tokens of each row.
    """

    mask: Tensor
    order: Tensor | None
    lengths: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> LiveTokens:
        """Find them in a mask of any shape of padding: right, left, or holes."""
        mask = mask.bool()
        places = torch.arange(mask.shape[1], device=mask.device)
        order = torch.argsort(torch.where(mask, places, places + _BEHIND), dim=1)
        # A recorded graph cannot depend on values.
        moved = torch.compiler.is_exporting() or not torch.equal(order, places.expand_as(order))
        return cls(mask, order if moved else None, mask.sum(1))

    def to_front(self, states: Tensor) -> Tensor:
        """[B, S, E] with the states of live tokens first."""
        return states if self.order is None else _taken(states, self.order)

    def back(self, states: Tensor) -> Tensor:
        """The inverse of `to_front`, with zeros where no live token is."""
        if self.order is not None:
            states = _taken(states, (self.mask.cumsum(1) - 1).clamp(min=0))
        return states * self.mask.unsqueeze(-1)

    def largest(self, states: Tensor) -> Tensor:
        """[B, E] the largest entry over the live tokens of each row, 0 where a row has none."""
        hidden = states.masked_fill(~self.mask.unsqueeze(-1), torch.finfo(states.dtype).min)
        return hidden.amax(1) * (self.lengths > 0).unsqueeze(-1)


def _taken(states: Tensor, positions: Tensor) -> Tensor:
    return states.gather(1, positions.unsqueeze(-1).expand_as(states))


def run_lstm(lstm: nn.LSTM, inputs: Tensor, lengths: Tensor | None) -> Tensor:
    """Run one bidirectional layer over the first tokens of each row.

    Args:
        lstm: One layer, bidirectional, batch first.
        inputs: [B, S, E].
        lengths: [B] tokens to read of each row, 0 allowed; None: all S.

    Returns:
        [B, S, 2 H]; behind a row's tokens the values mean nothing.

    Source:
        Hochreiter and Schmidhuber 1997; rows of different lengths are packed, sorted by length.
    """
    if torch.onnx.is_in_onnx_export() and hasattr(torch.onnx, "ops"):
        return _onnx_node(lstm, inputs, lengths)
    if lengths is None:
        return cast(Tensor, lstm(inputs)[0])
    if torch.compiler.is_exporting():
        return _recorded(lstm, inputs, lengths)
    if int(lengths.min()) == inputs.shape[1]:
        return cast(Tensor, lstm(inputs)[0])
    # A packed row has at least one token; that of an empty row is not read.
    packed = pack_padded_sequence(inputs, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=inputs.shape[1])[0]


def _recorded(lstm: nn.LSTM, inputs: Tensor, lengths: Tensor) -> Tensor:
    """The same with operations that `torch.export` can record: the second direction reads each row turned round."""
    places = torch.arange(inputs.shape[1], device=inputs.device)
    ends = lengths.unsqueeze(1)
    turned = torch.where(places < ends, ends - 1 - places, places)
    forward = _one_direction(lstm, inputs, "")
    backward = _one_direction(lstm, _taken(inputs, turned), "_reverse")
    return torch.cat([forward, _taken(backward, turned)], dim=-1)


def _one_direction(lstm: nn.LSTM, inputs: Tensor, suffix: str) -> Tensor:
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [getattr(lstm, name + suffix) for name in names]
    zeros = inputs.new_zeros(1, inputs.shape[0], lstm.hidden_size)
    states: Tensor = torch.lstm(inputs, [zeros, zeros], weights, True, 1, 0.0, False, False, True)[0]
    return states


def _onnx_node(lstm: nn.LSTM, inputs: Tensor, lengths: Tensor | None) -> Tensor:
    """The same as ONNX's own operator, which reads the lengths of rows: torch's would be recorded for one length."""
    sides = ("", "_reverse")
    weights = [
        torch.stack([_in_onnx_order(getattr(lstm, f"{name}_l0{side}")) for side in sides])
        for name in ("weight_ih", "weight_hh")
    ]
    biases = [
        torch.cat([_in_onnx_order(getattr(lstm, f"{name}_l0{side}")) for name in ("bias_ih", "bias_hh")])
        for side in sides
    ]
    given = [inputs.transpose(0, 1), *weights, torch.stack(biases)]
    if lengths is not None:
        given.append(lengths.clamp(min=1).to(torch.int32))
    size, rows = inputs.shape[1], inputs.shape[0]
    states: Tensor = torch.onnx.ops.symbolic(
        "LSTM", given, {"hidden_size": lstm.hidden_size, "direction": "bidirectional"},
        dtype=inputs.dtype, shape=(size, 2, rows, lstm.hidden_size),
    )  # fmt: skip
    return states.permute(2, 0, 1, 3).flatten(2)


def _in_onnx_order(weight: Tensor) -> Tensor:
    """Rows of torch's gates (input, forget, cell, output) in the order of ONNX: input, output, forget, cell."""
    size = weight.shape[0] // 4
    return torch.cat([weight.narrow(0, gate * size, size) for gate in (0, 3, 1, 2)])
