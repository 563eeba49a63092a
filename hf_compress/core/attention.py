"""Layers whose attention is computed by a core of their own instead of softmax over all tokens.

One attention function is registered with transformers. A layer whose attention module has a child `attention_core`
is computed by it; every other layer of the same model falls back to ordinary scaled dot products.

Letters: B batch, S padded length, H heads, d head size, D hidden, W width of all heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing


ATTENTION = "hf_compress"
CORE = "attention_core"


class AttentionCore(nn.Module):
    """Replaces softmax attention inside one layer; it is the child `attention_core` of the attention module."""

    head_size: int

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
        """Compute the context of every head.

        Args:
            attention: The module that owns this core.
            query: [B, H, S, d].
            key: [B, H, S, d].
            value: As `key`.
            mask: None without padding; [B, S] bool, True on tokens, when padding is on the right; otherwise
                [B, S] int64, the rank of each token among the tokens of its example and -1 on padding.
            scaling: Factor of the scores.
            dropout: Dropout probability of the attention weights.
            output_attentions: Whether to return the attention weights.

        Returns:
            [B, S, H, d], and the attention weights or None.
        """
        raise NotImplementedError

    def macs(self, seq_len: float, width: int, hidden: int) -> float:
        """Multiply-accumulates of one sequence, without those of the four projections.

        Args:
            seq_len: Tokens.
            width: W.
            hidden: D.
        """
        raise NotImplementedError


def token_ranks(live: Tensor) -> Tensor:
    """[B, S] int64: the rank of each token among the tokens of its example, -1 on padding.

    Example:
        >>> token_ranks(torch.tensor([[False, True, True]]))
        tensor([[-1,  0,  1]])
    """
    return torch.where(live, live.cumsum(1) - 1, -1)


def _mask(
    mask_function: Any = bidirectional_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """Make the mask that cores read; layers with windows get the ordinary one."""
    if mask_function is not bidirectional_mask_function:
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if attention_mask is None:
        return None
    live = attention_mask.bool()
    # The values of the mask are read once per forward pass, as transformers' own masks do. A traced graph must not
    # depend on them; it uses ranks, which are right for every kind of padding.
    if is_tracing(live):
        return token_ranks(live)
    if bool(live.all()):
        return None
    return live if bool((live[:, 1:] <= live[:, :-1]).all()) else token_ranks(live)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    core = getattr(module, CORE, None)
    if core is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            live = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
            attention_mask = live[:, None, None, :]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens] for this attention, got shape {tuple(attention_mask.shape)}."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    context, weights = core(module, query, key, value, attention_mask, scaling, dropout, bool(output_attentions))
    return context, weights


def _require_attention(attention: Any, inputs: tuple[Any, ...]) -> None:
    if attention.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"attn_implementation must stay {ATTENTION!r} for a model with a changed attention, "
            f"got {attention.config._attn_implementation!r}: another one would silently compute dense attention."
        )


def attach_core_(attention: nn.Module, core: AttentionCore) -> None:
    """Give an attention module its core; from then on it refuses to run under another implementation."""
    attention.add_module(CORE, core.train(attention.training))
    attention.register_forward_pre_hook(_require_attention)


def use_cores_(model: PreTrainedModel) -> None:
    """Let a model call the cores of its layers."""
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        # Older releases look for a phrase that ModernBERT's source lacks, although it does dispatch by name.
        model.config._attn_implementation = ATTENTION


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
