"""Key and value projections that can be applied after the sequence is shortened, if that is cheaper.

Letters: B batch, S padded length, K slots, D hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.attention import CORE
from hf_compress.core.projections import CuttableLinear


class DeferredLinear(CuttableLinear):
    """A key or value projection that its attention core may apply later, if that is cheaper.

    An instance is an ordinary `nn.Linear` whose class was changed by `defer_`; `owner` is the attention module. If
    an adapter wraps the projection, it behaves like `nn.Linear`.
    """

    owner: nn.Module

    def forward(self, input: Tensor, bias_scale: Tensor | None = None) -> Tensor:
        """Project the input; if the projection is deferred, return the input, and project when the core calls.

        Args:
            input: [B, S, D].
            bias_scale: [B, K] or [K], the factor of the bias in each shortened row; only the core passes it.
        """
        if bias_scale is not None:
            projected = F.linear(input, self.weight)
            return projected if self.bias is None else projected + bias_scale.unsqueeze(-1) * self.bias
        return input if self.is_deferred(input.shape[-2]) else super().forward(input)

    def is_deferred(self, seq_len: int) -> bool:
        """Whether `forward` returns its input unchanged for this length."""
        core = getattr(self.owner, CORE, None)
        wrapped = all(child is not self for child in self.owner.children())
        if core is None or wrapped or self.in_features % core.head_size:
            return False
        return bool(core.defers(seq_len, self.out_features, self.in_features))


def defer_(linear: nn.Linear, owner: nn.Module) -> None:
    """Make a key or value projection a `DeferredLinear` of an attention module, keeping its parameters."""
    linear.__class__ = DeferredLinear
    # Bypasses nn.Module's setattr, which would register the owner as a child of its own child.
    object.__setattr__(linear, "owner", owner)
