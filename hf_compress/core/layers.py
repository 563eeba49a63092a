"""Transformer layers that behave differently, and what they tell each other during one forward pass.

Letters: B batch, S padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


# The keyword under which the state travels through a model's forward to its layers.
STATE = "live_tokens"


@dataclass
class LiveTokens:
    """Which tokens are still there, layer by layer, in one forward pass. Holds tensors on the model's device.

    Args:
        whole: Compute the rows of the last layer that no head reads, too: calibration wants them.
        attended: Layer -> [B] number of tokens its attention saw.
        fed: Layer -> [B] number of tokens its feed-forward block saw.
        kept: Layer -> [B, S] bool of the tokens that leave it.
        soft: Layer -> ([B, S] soft keep probabilities, [B, S] bool where they count).
    """

    whole: bool = False
    attended: dict[int, Tensor] = field(default_factory=dict)
    fed: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    soft: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def specialise_(layer: nn.Module, behaviour: type) -> None:
    """Give a live layer the forward of another class, without wrapping it.

    The new class derives from both and keeps the layer's class name: names of parameters, `isinstance`, hidden-state
    capture, gradient checkpointing and wrap policies that look classes up by name all go on working.
    """
    old = type(layer)
    layer.__class__ = type(old.__name__, (behaviour, old), {"__module__": old.__module__, "is_specialised": True})


def _add_state(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs.setdefault(STATE, LiveTokens())
    return args, kwargs


def carries_state(model: PreTrainedModel) -> bool:
    """Whether a model's layers read a `LiveTokens`."""
    return _add_state in model.base_model._forward_pre_hooks.values()


def share_state_(model: PreTrainedModel) -> None:
    """Let every forward pass of a model carry a `LiveTokens`: the caller's own when one is given."""
    if not carries_state(model):
        model.base_model.register_forward_pre_hook(_add_state, with_kwargs=True)


@dataclass(frozen=True)
class Packing:
    """Tokens of a batch without the gaps between examples, and where they stand in a left-aligned batch.

    Args:
        rows: [N] index of each token in the flattened [B * S]; None when all positions are live.
        lengths: [B] tokens of each example.
        longest: n, the largest of them.
        slots: [N] index of each token in the flattened, left-aligned [B * n]; None when all lengths are equal.
    """

    rows: Tensor | None
    lengths: Tensor
    longest: int
    slots: Tensor | None

    @staticmethod
    def of(live: Tensor) -> Packing:
        """The packing of a [B, S] bool mask. Waits for the device once."""
        batch, width = live.shape
        lengths = live.sum(1)
        shortest, longest = (int(x) for x in torch.stack([lengths.min(), lengths.max()]).tolist())
        if shortest == width:
            return Packing(None, lengths, width, None)
        rows = live.flatten().nonzero().squeeze(1)
        if shortest == longest:
            return Packing(rows, lengths, longest, None)
        ranks = (live.cumsum(1) - 1 + torch.arange(batch, device=live.device)[:, None] * longest).flatten()
        return Packing(rows, lengths, longest, ranks[rows])

    def pack(self, states: Tensor) -> Tensor:
        """[N, D] from [B, S, D]."""
        flat = states.reshape(-1, states.shape[-1])
        return flat if self.rows is None else flat[self.rows]

    def align(self, packed: Tensor) -> Tensor:
        """[B, n, D] from [N, D], zero behind the end of each example."""
        shape = (len(self.lengths), self.longest, packed.shape[-1])
        if self.slots is None:
            return packed.reshape(shape)
        aligned = packed.new_zeros(shape[0] * shape[1], shape[2])
        return aligned.index_copy(0, self.slots, packed).reshape(shape)

    def unalign(self, aligned: Tensor) -> Tensor:
        """[N, ...] from [B, n, ...]."""
        flat = aligned.flatten(0, 1)
        return flat if self.slots is None else flat[self.slots]

    def inside(self) -> Tensor | None:
        """[B, n] bool, True on tokens of the aligned batch; None when there is nothing else."""
        if self.slots is None:
            return None
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]
