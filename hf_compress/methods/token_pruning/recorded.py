"""The hard forward pass of layers that drop tokens as `torch.export` can record it: no step depends on values.

Eager passes pack the live tokens of a batch into rows. Here every example has as many positions as the example with
most tokens left, and hidden states become shorter from layer to layer.

Letters: B batch, S padded length, n positions left before a layer, m after it, H heads, d head size, D hidden.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_compress.core.projections import Role
from hf_compress.methods.token_pruning.importance import (
    keep_above,
    keep_top,
    kept_counts,
    normalised,
    received_attention,
)


if TYPE_CHECKING:
    from hf_compress.methods.token_pruning.rule import TokenRule


class RecordedTokens:
    """The state of a forward pass that is recorded.

    Attributes:
        live: [B, n] bool, the positions that hold a live token; None before the first layer.
        initial: [B] tokens of each example before any pruning.
        places: [B, n] position of each in the input; None as long as no layer has dropped any.
        whole: [B, S, D] the hidden states of all positions, dropped ones as their last layer left them; None as
            long as no layer has dropped any, or when the head reads the first token only.
    """

    live: Tensor | None = None
    initial: Tensor
    places: Tensor | None = None
    whole: Tensor | None = None


def recorded_forward(
    layer: nn.Module, rule: TokenRule, state: RecordedTokens, states: Tensor, mask: Tensor | None
) -> Tensor:
    """One layer of the pass.

    Args:
        layer: The transformer layer.
        rule: By which it drops tokens.
        state: Of this pass; changed.
        states: [B, n, D].
        mask: Of the input, as `AttentionCore` describes it; read by the first layer.

    Returns:
        [B, m, D]; of the last layer [B, S, D], or [B, 1, D] when the head reads the first token only.

    Raises:
        ValueError: If the model follows the released code, whose first token may be dropped, or is in training.
    """
    if rule.published or layer.training:
        raise ValueError(
            "torch.export records only evaluation of a model that drops tokens, and not with compat='ltp', which may "
            "drop the first token."
        )
    if state.live is None:
        state.live = _live(states, mask)
        state.initial = state.live.sum(1)
    live = state.live
    if rule.reads_first and rule.last:
        context, _ = _attention(layer, rule, states[:, :1], states, live, scored=False)
        out: Tensor = rule.finish(layer, context, states[:, :1])
        return torch.where(live[:, :1, None], out, states[:, :1])
    context, received = _attention(layer, rule, states, states, live, rule.prunes())
    if received is not None:
        context, states = _drop(rule, state, received, context, states)
        assert state.live is not None
        live = state.live
    # Positions without a live token keep what they hold, as rows that were dropped do.
    out = torch.where(live[..., None], rule.finish(layer, context, states), states)
    if state.whole is not None and state.places is not None:
        state.whole = state.whole.scatter(1, state.places[..., None].expand_as(out), out)
    return state.whole if rule.last and state.whole is not None else out


def _live(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask if mask.dtype == torch.bool else mask >= 0


def _attention(
    layer: nn.Module, rule: TokenRule, asking: Tensor, states: Tensor, live: Tensor, scored: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of some positions to all of them: [B, queries, H d], and the attention that each received."""
    paths = rule.architecture.paths
    query, key, value = (
        attrgetter(paths[role])(layer)(inputs).unflatten(-1, (-1, rule.head_size)).transpose(1, 2)
        for role, inputs in ((Role.QUERY, asking), (Role.KEY, states), (Role.VALUE, states))
    )
    scores = (query * rule.head_size**-0.5) @ key.transpose(-1, -2)
    # The lowest number, not infinity: an example without tokens has a softmax, too.
    weights = scores.masked_fill(~live[:, None, None], torch.finfo(scores.dtype).min).softmax(-1)
    context = (weights @ value).transpose(1, 2).flatten(2)
    return context, received_attention(weights, live) if scored else None


def _drop(
    rule: TokenRule, state: RecordedTokens, received: Tensor, context: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Drop tokens from the state; returns contexts and hidden states of the positions that are left."""
    live = state.live
    assert live is not None
    scores = normalised(received, live, rule.norm, rule.config.score_reference_length, state.initial)
    if rule.config.prune_mode == "topk":
        keep = keep_top(scores, live, kept_counts(state.initial, rule.keep_rate))
    else:
        keep = keep_above(scores, live, rule.threshold().detach())
    positions = keep.shape[1]
    # At least one position, even if no example has a token.
    most: Any = keep.sum(1).max().clamp(min=1).item()
    torch._check(most >= 1)  # type: ignore[no-untyped-call]  # of torch
    torch._check(most <= positions)  # type: ignore[no-untyped-call]  # of torch
    # Kept positions first, then the others, both in their order: an example without tokens keeps its first position
    # at the front. All keys differ, so that no runtime has to break ties.
    order = torch.arange(positions, 0, -1, device=keep.device)
    chosen = torch.where(keep, order, order - order[:1]).topk(most, dim=1).indices
    if state.whole is None and not rule.reads_first:
        state.whole = states
    state.live = keep.gather(1, chosen)
    state.places = chosen if state.places is None else state.places.gather(1, chosen)
    context, states = (
        values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1])) for values in (context, states)
    )
    return context, states
