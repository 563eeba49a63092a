"""Dropout of a model that is already built."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def set_dropout_(model: PreTrainedModel, probability: float) -> None:
    """Set the probability of every dropout of a model, attention weights included, and note it in the config.

    Whole layers or samples that are skipped in training (`layerdrop`, `drop_path`) stay as they are. Without dropout
    of attention weights, PyTorch computes attention in one operator in training, too.

    Args:
        model: Changed in place.
        probability: In [0, 1).

    Raises:
        ValueError: If the probability is not in [0, 1).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hf_compress.core.dropout import set_dropout_
        >>> model = BertModel(BertConfig(hidden_size=24, num_hidden_layers=1))
        >>> set_dropout_(model, 0.0)
        >>> model.config.attention_probs_dropout_prob
        0.0
    """
    if not 0 <= probability < 1:
        raise ValueError(f"dropout must be in [0, 1), got {probability}.")
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            module.p = probability
        # Attention modules keep the number itself.
        _set_numbers(module, probability)
    for config in _configs(model.config):
        _set_numbers(config, probability)


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and those within it."""
    yield config
    for inner in vars(config).values():
        if isinstance(inner, PretrainedConfig):
            yield from _configs(inner)


def _set_numbers(holder: object, probability: float) -> None:
    for name, value in list(vars(holder).items()):
        # An unset classifier_dropout follows another one; a switch such as `use_dropout` is no probability.
        if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float):
            setattr(holder, name, probability)
