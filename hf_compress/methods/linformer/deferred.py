"""Key and value projections that are applied after the sequence was shortened, where that is cheaper.

Letters: B batch, S padded length, K slots, D hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.attention import CORE
from hf_compress.core.projections import CuttableLinear


class DeferredLinear(CuttableLinear):
    """A key or value projection that lets its core apply it later, where that is cheaper.

    An instance is an ordinary `nn.Linear` whose class was changed by `defer_`; `owner` is the attention module. When
    something stands between the two (an adapter that wraps the projection), it behaves as `nn.Linear`.
    """

    owner: nn.Module

    def forward(self, input: Tensor, bias_scale: Tensor | None = None) -> Tensor:
        """The projection; the input itself when it is deferred; and from the core, the deferred projection.

        Args:
            input: [B, S, D].
            bias_scale: [B, K] or [K], how much of the bias each shortened row carries; given by the core alone.
        """
        if bias_scale is not None:
            projected = F.linear(input, self.weight)
            return projected if self.bias is None else projected + bias_scale.unsqueeze(-1) * self.bias
        return input if self.is_deferred(input.shape[-2]) else super().forward(input)

    def is_deferred(self, seq_len: int) -> bool:
        """Whether `forward` hands its input through for this length."""
        core = getattr(self.owner, CORE, None)
        wrapped = all(child is not self for child in self.owner.children())
        if core is None or wrapped or self.in_features % core.head_size:
            return False
        return bool(core.defers(seq_len, self.out_features, self.in_features))


def defer_(linear: nn.Linear, owner: nn.Module) -> None:
    """Make a key or value projection a `DeferredLinear` of an attention module, keeping its parameters."""
    linear.__class__ = DeferredLinear
    # Past nn.Module's own setattr: a registered owner would be its child's child.
    object.__setattr__(linear, "owner", owner)
