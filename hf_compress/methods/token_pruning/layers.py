"""Forward passes of layers that drop tokens: hard, soft (in training), and for heads that read one token only.

Letters: B batch, S padded length, n longest live length, N live tokens of the batch, H heads, d head size, D hidden.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.forward_state import FORWARD_STATE
from hf_compress.core.projections import Role
from hf_compress.methods.token_pruning.attention import attend, key_mask, project
from hf_compress.methods.token_pruning.importance import (
    keep_above,
    keep_top,
    kept_counts,
    normalised,
    soft_mask,
)
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.packing import Packing
from hf_compress.methods.token_pruning.recorded import RecordedTokens, recorded_forward
from hf_compress.methods.token_pruning.rule import TokenRule


class PrunedLayer(nn.Module):
    """Forward pass of a layer that drops tokens: `hidden_states` keeps its shape, dropped rows keep their values."""

    token_rule: TokenRule

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        rule, state = self.token_rule, kwargs.get(FORWARD_STATE)
        if isinstance(state, RecordedTokens):
            return recorded_forward(self, rule, state, hidden_states, attention_mask)
        state = LiveTokens() if state is None else state
        # Looked up by layer, because gradient checkpointing runs a layer a second time, out of order.
        packing = state.packings.get(rule.index - 1) if rule.index else None
        if packing is None:
            packing = _initial(rule, hidden_states, attention_mask)
        if not packing.longest:
            return _padding_alone(self, rule, state, packing, hidden_states)
        if self.training and rule.config.masking_mode == "soft":
            return _soft_forward(self, rule, state, packing, hidden_states)
        return _hard_forward(self, rule, state, packing, hidden_states)


def _initial(rule: TokenRule, hidden_states: Tensor, mask: Tensor | None) -> Packing:
    if mask is None:
        return Packing.full(hidden_states.shape[0], hidden_states.shape[1], hidden_states.device)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, tokens] to prune tokens, got shape {tuple(mask.shape)}.")
    return Packing.of(mask if mask.dtype == torch.bool else mask >= 0, need_first=rule.reads_first)


def _padding_alone(
    layer: nn.Module, rule: TokenRule, state: LiveTokens, packing: Packing, hidden_states: Tensor
) -> Tensor:
    state.packings[rule.index] = packing
    state.attended[rule.index] = state.fed[rule.index] = packing.lengths
    if not rule.published:
        return hidden_states
    return _first_without_protection(layer, rule, packing, packing, None, hidden_states)


def _importance(rule: TokenRule, received: Tensor | None, inside: Tensor | None, initial: Tensor) -> Tensor:
    assert received is not None
    return normalised(received, inside, rule.norm, rule.config.score_reference_length, initial)


def _hard_forward(
    layer: nn.Module, rule: TokenRule, state: LiveTokens, packing: Packing, hidden_states: Tensor
) -> Tensor:
    state.attended[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    if rule.reads_first and rule.last and not layer.training and not state.whole and not rule.published:
        return _first_token_forward(layer, rule, state, packing, hidden_states, rows)
    prunes = rule.prunes()
    context, received = attend(layer, rule, packing, rows, prunes)
    remaining = packing
    if prunes:
        inside, initial = packing.inside, state.attended[0]
        scores = _importance(rule, received, inside, initial)
        if rule.config.prune_mode == "topk":
            counts = kept_counts(initial, rule.keep_rate, 0 if rule.published else 1)
            keep = keep_top(scores, inside, counts, not rule.published)
        else:
            keep = keep_above(scores, inside, rule.threshold().detach(), not rule.published)
        remaining, chosen = packing.only(keep)
        if rule.published:
            hidden_states = _first_without_protection(layer, rule, packing, remaining, context, hidden_states)
        if chosen is not None:
            context, rows = (x.index_select(0, chosen) for x in (context, rows))
    elif rule.published:
        hidden_states = _first_without_protection(layer, rule, packing, remaining, context, hidden_states)
    out = rule.finish(layer, context, rows)
    state.packings[rule.index] = remaining
    state.fed[rule.index] = remaining.lengths
    return _write(hidden_states, remaining.rows, out)


def _first_without_protection(
    layer: nn.Module,
    rule: TokenRule,
    packing: Packing,
    remaining: Packing,
    context: Tensor | None,
    hidden_states: Tensor,
) -> Tensor:
    """Compute dropped first tokens as the released code does, because heads read them nevertheless.

    A first token that this layer drops still has its attention context; one that was dropped before has none.
    """
    gone = ~remaining.live()[:, 0]
    if not bool(gone.any()):
        return hidden_states
    first = hidden_states[:, 0]
    if context is None:
        seen = first.new_zeros(len(first), attrgetter(rule.architecture.paths[Role.QUERY])(layer).out_features)
    else:
        seen = context.index_select(0, packing.starts) * packing.live()[:, :1]
    out = rule.finish(layer, seen, first).to(hidden_states.dtype)
    out = torch.where(gone[:, None], out, first)
    return torch.cat([out[:, None], hidden_states[:, 1:]], dim=1)


def _write(hidden_states: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """Replace rows of the hidden states: those of the index, or all of them without one."""
    rows = rows.to(hidden_states.dtype)
    if index is None:
        return rows.view_as(hidden_states)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    return flat.index_copy(0, index, rows).view_as(hidden_states)


def _first_token_forward(
    layer: nn.Module, rule: TokenRule, state: LiveTokens, packing: Packing, hidden_states: Tensor, rows: Tensor
) -> Tensor:
    """The last layer for a head that reads the first token only: one query for each example."""
    paths = rule.architecture.paths
    key, value = (project(layer, rule, paths[role], packing, rows) for role in (Role.KEY, Role.VALUE))
    first = rows.index_select(0, packing.starts)
    query = attrgetter(paths[Role.QUERY])(layer)(first).unflatten(-1, (-1, rule.head_size)).unsqueeze(2)
    mask = key_mask(packing)
    context = F.scaled_dot_product_attention(query, key, value, mask, scale=rule.head_size**-0.5)
    out = rule.finish(layer, context.flatten(1), first)
    if packing.rows is not None:
        # For an example without tokens, this is a row of another example.
        out = torch.where(packing.lengths[:, None] > 0, out.to(hidden_states.dtype), hidden_states[:, 0])
    remaining = state.packings[rule.index] = packing.first()
    state.fed[rule.index] = remaining.lengths
    return _write(hidden_states, remaining.rows, out)


def _soft_forward(
    layer: nn.Module, rule: TokenRule, state: LiveTokens, packing: Packing, hidden_states: Tensor
) -> Tensor:
    """Keep all tokens, and multiply the layer's output by the soft keep probability of each token."""
    state.packings[rule.index] = packing
    state.attended[rule.index] = state.fed[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    prunes = rule.prunes()
    context, received = attend(layer, rule, packing, rows, prunes)
    out = rule.finish(layer, context, rows)
    if prunes:
        inside = packing.inside
        scores = _importance(rule, received, inside, state.attended[0])
        if rule.published:
            # Padding, whose score is zero, counts too, up to the reference length of the scores.
            missing = max(rule.config.score_reference_length, hidden_states.shape[1]) - scores.shape[1]
            scores, inside = F.pad(scores, (0, missing)), None
        mask = soft_mask(scores, rule.threshold(), rule.temperature)
        if not rule.published:
            # The first token always stays: there is nothing to learn about it.
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        state.soft[rule.index] = mask, torch.ones_like(mask, dtype=torch.bool) if inside is None else inside
        mask = mask[:, : packing.longest]
        out = out * packing.unalign(mask).unsqueeze(-1).to(out.dtype)
    return _write(hidden_states, packing.rows, out)


def _finish_bert(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    rows: Tensor = layer.feed_forward_chunk(layer.attention.output(context, residual))
    return rows


def _finish_distilbert(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    attended = layer.sa_layer_norm(layer.attention.out_lin(context) + residual)
    rows: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return rows


# What follows attention, by model type.
FINISH = {
    "bert": _finish_bert,
    "roberta": _finish_bert,
    "xlm-roberta": _finish_bert,
    "camembert": _finish_bert,
    "electra": _finish_bert,
    "distilbert": _finish_distilbert,
}
