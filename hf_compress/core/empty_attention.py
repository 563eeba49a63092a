"""Attention that has lost all of its heads: its context has no columns, and its output is the bias of the projection.

Letters: B batch, S tokens, T tokens with those in the cache, D hidden.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache

from hf_compress.core.layers import specialise_
from hf_compress.core.layouts.layout import Architecture
from hf_compress.core.projections import HEAD_ROLES, OPTIONAL_ROLES, Role


class EmptyAttention(nn.Module):
    """Forward pass of an attention module without heads; transformers' own ones cannot reshape what has no columns.

    Args:
        projections: Names of the modules that make queries, keys and values.
        output_projection: Name of the module that reads the context; None if it lies outside of the attention module.
        num_returned: How many values the caller unpacks.
    """

    projections: tuple[str, ...]
    output_projection: str | None
    num_returned: int
    layer_idx: int | None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        # All projections run, so that hooks see them and every weight has a gradient: of no elements.
        context = sum(getattr(self, name)(states)[..., :0] for name in self.projections)
        assert not isinstance(context, int)
        known = states.shape[1]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None and self.layer_idx is not None:
            # A model asks the cache of one layer how many tokens it has read.
            read = states.new_zeros(states.shape[0], 1, known, 1)
            known = cache.update(read, read, self.layer_idx)[0].shape[-2]
        if self.output_projection is not None:
            context = getattr(self, self.output_projection)(context)
        weights = states.new_zeros(states.shape[0], 0, states.shape[1], known)
        return (context, weights, *(None,) * (self.num_returned - 2))


def empty_attention_(layer: nn.Module, row: Architecture) -> None:
    """Let the attention module of a layer, whose projections have no heads left, run without heads.

    Args:
        layer: Changed in place. Parameters of its attention that no longer take part (norms of queries and keys) stay,
            frozen: data-parallel training waits for the gradients of all others.
        row: Its architecture.
    """
    attention: Any = layer.get_submodule(row.attention)
    if isinstance(attention, EmptyAttention):
        return
    inside = f"{row.attention}."
    paths = [path for role, path in row.paths.items() if role in HEAD_ROLES and role not in OPTIONAL_ROLES]
    out = row.paths[Role.ATTENTION_OUT]
    attention.projections = tuple(dict.fromkeys(path.removeprefix(inside) for path in paths))
    attention.output_projection = out.removeprefix(inside) if out.startswith(inside) else None
    attention.num_returned = row.attention_returns
    attention.layer_idx = getattr(attention, "layer_idx", None)
    used = {*attention.projections, attention.output_projection}
    for name, module in attention.named_modules():
        if name and name not in used:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    specialise_(cast(nn.Module, attention), EmptyAttention)
