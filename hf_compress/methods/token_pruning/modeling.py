"""Gives a model layers that drop tokens."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from hf_compress.core.architectures import architecture_of, layers_of
from hf_compress.core.attention import use_cores_
from hf_compress.core.data_needs import Data
from hf_compress.core.forward_state import carry_state_
from hf_compress.core.layers import specialise_
from hf_compress.methods.token_pruning.config import TokenPruningConfig
from hf_compress.methods.token_pruning.importance import keep_rate_ramp, threshold_ramp
from hf_compress.methods.token_pruning.layers import FINISH, PrunedLayer
from hf_compress.methods.token_pruning.live_tokens import new_live_tokens
from hf_compress.methods.token_pruning.rule import TokenRule, TokenThresholds


logger = logging.getLogger(__name__)

_THRESHOLDS = "token_thresholds"
# Classes whose head reads only the first token of the last layer.
_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


def check(model: PreTrainedModel, config: TokenPruningConfig) -> None:
    """Refuse models whose layers cannot drop tokens.

    Raises:
        ValueError: If the architecture is not supported or is a decoder, if a layer has no heads, or if
            `score_reference_length` would have no effect.
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
    for layer in layers_of(model):
        if not layer.num_units:
            raise ValueError(
                f"Layer {layer.index} must have attention heads to drop tokens: they say which tokens matter. Give "
                "structured pruning min_heads=1."
            )


def compress(model: PreTrainedModel, config: TokenPruningConfig, data: Data | None) -> TokenPruningConfig:
    """Let a model drop tokens.

    Args:
        model: An encoder; changed in place.
        config: Which tokens are dropped.
        data: Not read.

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
    layers = layers_of(model)
    thresholds = None
    if config.prune_mode == "absolute_threshold":
        initial = threshold_ramp(config.final_token_threshold, len(layers), config.threshold_ramp)
        weight = layers[0].attention_out.weight
        # Half precision cannot distinguish scores near 1/128.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        thresholds = TokenThresholds(initial, config.temperature, weight.device, dtype, config.compat == "ltp")
        model.base_model.add_module(_THRESHOLDS, thresholds)
    reads_first = reads_first_token(model)
    finish = FINISH[model.config.model_type]
    for layer in layers:
        rule = TokenRule(config, thresholds, layer, len(layers), reads_first, finish)
        object.__setattr__(layer.module, "token_rule", rule)
        specialise_(layer.module, PrunedLayer)
    carry_state_(model, new_live_tokens)
    use_cores_(model)


def reads_first_token(model: PreTrainedModel) -> bool:
    """Whether a model's head reads the first token of the last layer and no other."""
    # A class of another package with such a name may pool in any way; ELECTRA's multiple choice can be configured.
    stock = type(model).__module__.startswith("transformers.models.")
    pools_first = getattr(model.config, "summary_type", "first") == "first"
    return stock and pools_first and type(model).__name__.endswith(_FIRST_TOKEN_HEADS)


def thresholds_of(model: PreTrainedModel) -> TokenThresholds | None:
    """The thresholds of a model; None if it has none."""
    return getattr(model.base_model, _THRESHOLDS, None)


def required_thresholds(model: PreTrainedModel, asking: str) -> TokenThresholds:
    """Get the thresholds of a model, or refuse a model without.

    Args:
        model: The model to train or measure.
        asking: The class that needs thresholds, for the message.

    Raises:
        ValueError: If it has none.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{asking} must train a model without adapters, which would not save the thresholds. Let them "
            "learn first; then freeze them (masking_mode='hard') and add adapters."
        )
    thresholds = thresholds_of(model)
    if thresholds is None:
        raise ValueError(
            f"{asking} must train a model with token thresholds, got {type(model).__name__} without. Apply "
            "compress(model, TokenPruningConfig(masking_mode='soft')) first."
        )
    return thresholds
