"""Records a classifier whose last layer computes the token that the head reads, and no other.

Letters: B batch, S padded length, H heads, d head size, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import ARCHITECTURES, TransformerLayer, layers_of
from hf_compress.core.forward_state import carries_state
from hf_compress.core.projections import Role
from hf_compress.methods.token_pruning.layers import FINISH
from hf_compress.methods.token_pruning.modeling import reads_first_token


# Attention functions of transformers whose masks are [B, 1, S or 1, S].
_PLAIN_ATTENTION = ("sdpa", "eager")


def _finish_mpnet(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    attention = layer.attention
    attended = attention.LayerNorm(attention.attn.o(context) + residual)
    rows: Tensor = layer.output(layer.intermediate(attended), attended)
    return rows


# What follows attention, by model type.
_FINISH: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {**FINISH, "mpnet": _finish_mpnet}


def narrowable_layer(model: PreTrainedModel) -> TransformerLayer | None:
    """The last layer of a model, if its head reads the first token only and the layer can compute that alone."""
    kind = model.config.model_type
    if kind not in _FINISH or kind not in ARCHITECTURES or getattr(model.config, "is_decoder", False):
        return None
    # Linear attention and dropped tokens have graphs of their own.
    if carries_state(model) or model.config._attn_implementation not in _PLAIN_ATTENTION:
        return None
    last = layers_of(model)[-1]
    return last if reads_first_token(model) and last.num_units else None


@contextmanager
def first_token_alone(model: PreTrainedModel) -> Iterator[bool]:
    """Inside the `with` statement, a classifier computes in its last layer what its head reads.

    Keys and values are those of all tokens; the query, the output projection and the feed-forward part are those of
    the first token, so about nine tenths of the layer's arithmetic go. The outputs are the same to rounding, but for
    hidden states, whose last entry has one token.

    Args:
        model: In evaluation mode; the same as before afterwards.

    Yields:
        Whether anything is saved: the model is one whose head reads the first token only, of an architecture that this
        knows.
    """
    layer = narrowable_layer(model)
    if layer is None:
        yield False
        return
    module = layer.module
    before = vars(module).get("forward")
    module.forward = _forward(layer, model.config.model_type)
    try:
        yield True
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _forward(layer: TransformerLayer, kind: str) -> Callable[..., Any]:
    module, paths, finish = layer.module, layer.architecture.paths, _FINISH[kind]

    def projected(role: Role, states: Tensor) -> Tensor:
        found: Tensor = attrgetter(paths[role])(module)(states).unflatten(-1, (-1, layer.head_size)).transpose(1, 2)
        return found

    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **more: Any
    ) -> Any:
        first = hidden_states[:, :1]
        query = projected(Role.QUERY, first)
        key, value = (projected(role, hidden_states) for role in (Role.KEY, Role.VALUE))
        parts = [part[:, :, :1] for part in (position_bias, attention_mask) if part is not None]
        context = F.scaled_dot_product_attention(
            query, key, value, sum(parts[1:], parts[0]) if parts else None, scale=layer.head_size**-0.5
        )
        out = finish(module, context.transpose(1, 2).flatten(2), first)
        return (out,) if kind == "mpnet" else out

    return forward
