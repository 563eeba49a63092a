"""How layers that drop tokens enter a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.core.architectures import architecture_of, layers_of
from hf_compress.core.attention import use_cores_
from hf_compress.core.forward_state import carry_state_
from hf_compress.core.layers import specialise_
from hf_compress.methods.token_pruning.config import TokenPruningConfig
from hf_compress.methods.token_pruning.importance import keep_rate_ramp, threshold_ramp
from hf_compress.methods.token_pruning.layers import FINISH, PrunedLayer
from hf_compress.methods.token_pruning.live_tokens import new_live_tokens
from hf_compress.methods.token_pruning.rule import TokenRule, TokenThresholds


logger = logging.getLogger(__name__)

_THRESHOLDS = "token_thresholds"
# Heads that read nothing but the first token of the last layer.
_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


def check(model: PreTrainedModel, config: TokenPruningConfig) -> None:
    """Refuse models whose layers cannot drop tokens.

    Raises:
        ValueError: Unsupported architecture, or a decoder; or a length for scores that nothing would read.
    """
    lengths_read = (config.score_norm == "reference" and config.scoring_mode == "mean") or config.compat == "ltp"
    if not lengths_read and config.score_reference_length != TokenPruningConfig.score_reference_length:
        raise ValueError(
            f"score_reference_length={config.score_reference_length} has no effect with "
            f"score_norm={config.score_norm!r} and scoring_mode={config.scoring_mode!r}: leave it out, or set "
            "score_norm='reference'."
        )
    architecture_of(model)
    if model.config.model_type not in FINISH or getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"model must be an encoder of type {', '.join(FINISH)} to drop tokens, got {model.config.model_type}."
        )
    layers_of(model)


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
    depth = len(layers_of(model))
    if (
        config.prune_mode == "topk"
        and config.token_keep_rate < min(keep_rate_ramp(config.token_keep_rate, depth)) == 1
    ):
        logger.warning(
            "token_keep_rate=%s drops nothing in a model of %d layers: top-k leaves the first three alone.",
            config.token_keep_rate, depth,
        )  # fmt: skip
    rebuild(model, config)
    return config


def rebuild(model: PreTrainedModel, config: TokenPruningConfig) -> None:
    """Give a dense skeleton the layers and thresholds of a model that drops tokens."""
    blocks = layers_of(model)
    thresholds = None
    if config.prune_mode == "absolute_threshold":
        initial = threshold_ramp(config.final_token_threshold, len(blocks), config.threshold_ramp)
        weight = blocks[0].attention_out.weight
        # Scores near 1/128 lie closer together than half precision can tell.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        thresholds = TokenThresholds(initial, config.temperature, weight.device, dtype, config.compat == "ltp")
        model.base_model.add_module(_THRESHOLDS, thresholds)
    reads_first = _reads_first_token(model)
    for block in blocks:
        finish = FINISH[model.config.model_type]
        rule = TokenRule(config, thresholds, block, len(blocks), reads_first, finish)
        object.__setattr__(block.module, "token_rule", rule)
        specialise_(block.module, PrunedLayer)
    carry_state_(model, new_live_tokens)
    use_cores_(model)


def _reads_first_token(model: PreTrainedModel) -> bool:
    # Somebody else's class of such a name may pool as it likes; ELECTRA's multiple choice can be told how to.
    stock = type(model).__module__.startswith("transformers.models.")
    pools_first = getattr(model.config, "summary_type", "first") == "first"
    return stock and pools_first and type(model).__name__.endswith(_FIRST_TOKEN_HEADS)


def thresholds_of(model: PreTrainedModel) -> TokenThresholds | None:
    """The thresholds of a model, None when it has none."""
    return getattr(model.base_model, _THRESHOLDS, None)
