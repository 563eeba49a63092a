"""Layers that drop tokens for good, and how they enter a model.

Letters: B batch, S padded length, n longest live length, N live tokens of the batch, H heads, d head size, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.architectures import Block, architecture_of, blocks_of
from hf_compress.core.attention import CORE, use_cores_
from hf_compress.core.layers import STATE, LiveTokens, Packing, share_state_, specialise_
from hf_compress.methods.token_pruning.config import TokenPruningConfig
from hf_compress.methods.token_pruning.importance import (
    keep_above,
    keep_rate_ramp,
    keep_top,
    kept_counts,
    soft_mask,
    threshold_ramp,
    token_importance,
)


_THRESHOLDS = "token_thresholds"
# Heads that read nothing but the first token of the last layer.
_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


class TokenThresholds(nn.Module):
    """One absolute threshold a layer, a child of the base model.

    Args:
        initial: Their starting values.
        temperature: At the start.

    Attributes:
        values: [L] float32.
        weight: Scalar, lambda of the regulariser; what `ThresholdAnnealingCallback` steers. Trainers of this package
            add `weight * regularizer` to the loss in the soft stage.
        integral: Scalar, memory of that callback's controller.
        temperature: Of the soft stage at this moment; the callback anneals it.
        learning_rate: Of the thresholds, None: that of the weights.
    """

    def __init__(self, initial: list[float], temperature: float, **place: object) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(initial, dtype=torch.float32, **place))
        for name in ("weight", "integral"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, **place))
        self.learning_rate: float | None = None
        self.temperature = temperature


class TokenRule:
    """What one layer needs to know to prune; a plain attribute of the layer.

    Args:
        config: The model's config, whose flat fields are read at every forward pass.
        thresholds: Of the base model; None for `topk`.
        index: Of the layer.
        num_layers: L.
        first_only: Whether the head reads nothing but the first token, so that the last layer need not compute
            the others.
        finish: `(layer, context, residual) -> output rows`, what follows attention in this architecture.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        thresholds: TokenThresholds | None,
        index: int,
        num_layers: int,
        first_only: bool,
        finish: Callable[[nn.Module, Tensor, Tensor], Tensor],
        block: Block,
    ) -> None:
        self.config = config
        self.thresholds = thresholds
        self.index = index
        self.last = index == num_layers - 1
        self.first_only = first_only and self.last
        self.finish = finish
        self.architecture = block.architecture
        self.head_size = block.head_size
        # A threshold that starts at zero belongs to a layer that never prunes, as published: no gradient moves it.
        ramp = threshold_ramp(1.0, num_layers, config.threshold_ramp)
        self.switched_off = config.prune_mode == "absolute_threshold" and ramp[index] == 0
        self.keep_rate = keep_rate_ramp(config.token_keep_rate, num_layers)[index]

    @property
    def norm(self) -> str:
        return "live" if self.config.scoring_mode == "mean_norm" else self.config.score_norm

    def prunes(self) -> bool:
        """Whether this layer looks at scores at all."""
        if self.config.prune_mode == "topk":
            return self.keep_rate < 1
        return not self.switched_off

    def threshold(self) -> Tensor:
        return self.thresholds.values[self.index]


class PrunedLayer:
    """The forward of a layer that drops tokens: `hidden_states` keeps its shape, dropped rows their last value."""

    token_rule: TokenRule

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        rule, state = self.token_rule, kwargs.get(STATE)
        state = LiveTokens() if state is None else state
        # Looked up by layer, not carried along: gradient checkpointing runs a layer a second time, out of order.
        live = state.kept.get(rule.index - 1)
        if live is None or rule.index == 0:
            live = _initial(hidden_states, attention_mask)
        if self.training and rule.config.masking_mode == "soft":
            return _soft_forward(self, rule, state, live, hidden_states)
        return _hard_forward(self, rule, state, live, hidden_states)


def _initial(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, tokens] to prune tokens, got shape {tuple(mask.shape)}.")
    return mask if mask.dtype == torch.bool else mask >= 0


def _project(layer: nn.Module, rule: TokenRule, path: str, packing: Packing, rows: Tensor) -> Tensor:
    """[B, H, n, d]."""
    aligned = packing.align(layer.get_submodule(path)(rows))
    return aligned.unflatten(-1, (-1, rule.head_size)).transpose(1, 2)


def _attend(
    layer: nn.Module, rule: TokenRule, packing: Packing, rows: Tensor, want_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Context [B, n, H d] (or values, when weights are wanted), and the attention weights."""
    row = rule.architecture
    query, key, value = (_project(layer, rule, path, packing, rows) for path in (row.queries, row.keys, row.values))
    inside = packing.inside()
    mask = None if inside is None else inside[:, None, None, :]
    dropout = layer.get_submodule(row.attention).dropout.p if layer.training else 0.0
    scaling = rule.head_size**-0.5
    if not want_weights:
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return context.transpose(1, 2).flatten(2), value, None
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # Single precision also under autocast: scores near 1/128 lie closer together than bfloat16 can tell.
    weights = scores.softmax(-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return F.dropout(weights, dropout).to(value.dtype), value, weights


def _importance(rule: TokenRule, weights: Tensor, inside: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    if inside is None:
        inside = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool, device=weights.device)
    scores = token_importance(weights, inside, rule.norm, rule.config.score_reference_length, initial)
    return scores, inside


def _hard_forward(layer: nn.Module, rule: TokenRule, state: LiveTokens, live: Tensor, hidden_states: Tensor) -> Tensor:
    packing = Packing.of(live)
    state.attended[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    if rule.first_only and not layer.training and not state.whole:
        return _first_token_forward(layer, rule, state, live, hidden_states, packing, rows)
    prunes = rule.prunes()
    attended, value, weights = _attend(layer, rule, packing, rows, prunes)
    if not prunes:
        context, chosen = packing.unalign(attended), None
    else:
        initial = state.attended[0]
        scores, inside = _importance(rule, weights, packing.inside(), initial)
        if rule.config.prune_mode == "topk":
            keep = keep_top(scores, inside, kept_counts(initial, rule.keep_rate))
        else:
            keep = keep_above(scores, inside, rule.threshold().detach())
        chosen = packing.unalign(keep).nonzero().squeeze(1)
        if len(keep) == 1:
            # Scores come first, so that the context is only computed for the queries that stay.
            context = (attended[:, :, chosen] @ value).transpose(1, 2).flatten(2)[0]
        else:
            context = packing.unalign((attended @ value).transpose(1, 2).flatten(2))[chosen]
        rows = rows[chosen]
    out = rule.finish(layer, context, rows)
    index = packing.rows if chosen is None else chosen if packing.rows is None else packing.rows[chosen]
    if chosen is not None:
        live = torch.zeros_like(live).view(-1).index_fill(0, index, True).view_as(live)
    state.kept[rule.index] = live
    state.fed[rule.index] = live.sum(1)
    return _write(hidden_states, index, out)


def _write(hidden_states: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """Hidden states with some rows replaced; all of them when there is no index."""
    rows = rows.to(hidden_states.dtype)
    if index is None:
        return rows.view_as(hidden_states)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    return flat.index_copy(0, index, rows).view_as(hidden_states)


def _first_token_forward(
    layer: nn.Module,
    rule: TokenRule,
    state: LiveTokens,
    live: Tensor,
    hidden_states: Tensor,
    packing: Packing,
    rows: Tensor,
) -> Tensor:
    """The last layer for a head that reads the first token only: one query an example."""
    row = rule.architecture
    key, value = (_project(layer, rule, path, packing, rows) for path in (row.keys, row.values))
    first = packing.align(rows)[:, 0]
    query = layer.get_submodule(row.queries)(first).unflatten(-1, (-1, rule.head_size)).unsqueeze(2)
    inside = packing.inside()
    mask = None if inside is None else inside[:, None, None, :]
    context = F.scaled_dot_product_attention(query, key, value, mask, scale=rule.head_size**-0.5)
    out = rule.finish(layer, context.flatten(1), first)
    at = live.to(torch.int8).argmax(1) + torch.arange(len(out), device=out.device) * live.shape[1]
    state.kept[rule.index] = torch.zeros_like(live).view(-1).index_fill(0, at, True).view_as(live)
    state.fed[rule.index] = torch.ones_like(packing.lengths)
    return _write(hidden_states, at, out)


def _soft_forward(layer: nn.Module, rule: TokenRule, state: LiveTokens, live: Tensor, hidden_states: Tensor) -> Tensor:
    """All tokens stay; the layer's output is multiplied by how much each would be kept."""
    packing = Packing.of(live)
    state.kept[rule.index] = live
    state.attended[rule.index] = state.fed[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    prunes = rule.prunes()
    attended, value, weights = _attend(layer, rule, packing, rows, prunes)
    aligned = (attended @ value).transpose(1, 2).flatten(2) if prunes else attended
    out = rule.finish(layer, packing.unalign(aligned), rows)
    if prunes:
        scores, inside = _importance(rule, weights, packing.inside(), state.attended[0])
        mask = soft_mask(scores, rule.threshold(), rule.thresholds.temperature)
        # The first token always stays, so nothing is to be learned about it.
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        state.soft[rule.index] = mask, inside
        out = out * packing.unalign(mask).unsqueeze(-1).to(out.dtype)
    return _write(hidden_states, packing.rows, out)


def _finish_bert(layer: nn.Module, context: Tensor, residual: Tensor) -> Tensor:
    return layer.feed_forward_chunk(layer.attention.output(context, residual))


def _finish_distilbert(layer: nn.Module, context: Tensor, residual: Tensor) -> Tensor:
    attended = layer.sa_layer_norm(layer.attention.out_lin(context) + residual)
    return layer.output_layer_norm(layer.ffn(attended) + attended)


_FINISH = {
    "bert": _finish_bert,
    "roberta": _finish_bert,
    "electra": _finish_bert,
    "distilbert": _finish_distilbert,
}


def check(model: PreTrainedModel, config: TokenPruningConfig) -> None:
    """Refuse models whose layers cannot drop tokens.

    Raises:
        ValueError: Unsupported architecture, a decoder, or attention that was replaced.
    """
    architecture_of(model)
    if model.config.model_type not in _FINISH or getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"model must be an encoder of type {', '.join(_FINISH)} to drop tokens, got {model.config.model_type}."
        )
    for block in blocks_of(model):
        if hasattr(block.attention, CORE):
            raise ValueError(f"model must have softmax attention, got a replaced one in layer {block.index}.")


def compress(
    model: PreTrainedModel, config: TokenPruningConfig, data: Iterable[Mapping[str, Any]] | None
) -> TokenPruningConfig:
    """Let a model drop tokens.

    Args:
        model: An encoder; changed in place.
        config: How.
        data: Not needed.

    Returns:
        The config.
    """
    rebuild(model, config)
    return config


def rebuild(model: PreTrainedModel, config: TokenPruningConfig) -> None:
    """Give a dense skeleton the layers and thresholds of a model that drops tokens."""
    for name in config.flat:
        setattr(model.config, name, getattr(config, name))
    blocks = blocks_of(model)
    thresholds = None
    if config.prune_mode == "absolute_threshold":
        initial = threshold_ramp(config.final_token_threshold, len(blocks), config.threshold_ramp)
        device = blocks[0].attention_out.weight.device
        thresholds = TokenThresholds(initial, config.temperature, device=device)
        model.base_model.add_module(_THRESHOLDS, thresholds)
    first_only = type(model).__name__.endswith(_FIRST_TOKEN_HEADS)
    for block in blocks:
        finish = _FINISH[model.config.model_type]
        rule = TokenRule(model.config, thresholds, block.index, len(blocks), first_only, finish, block)
        object.__setattr__(block.layer, "token_rule", rule)
        specialise_(block.layer, PrunedLayer)
    share_state_(model)
    use_cores_(model)


def thresholds_of(model: PreTrainedModel) -> TokenThresholds | None:
    """The thresholds of a model, None when it has none."""
    return getattr(model.base_model, _THRESHOLDS, None)
