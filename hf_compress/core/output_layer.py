"""The last linear layer of a model's head, whose outputs are the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def output_layer_of(model: PreTrainedModel) -> nn.Linear:
    """Find the layer that computes the logits.

    Args:
        model: With a head, without the wrappers of adapters.

    Raises:
        ValueError: If there is none outside the base model: the model has no head, or one of another kind.

    Example:
        >>> from transformers import RobertaConfig, RobertaForSequenceClassification
        >>> sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
        >>> model = RobertaForSequenceClassification(RobertaConfig(vocab_size=9, num_labels=3, **sizes))
        >>> output_layer_of(model) is model.classifier.out_proj
        True
    """
    embeddings: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
    if isinstance(embeddings, nn.Linear):
        return embeddings
    base = set() if model.base_model is model else set(model.base_model.modules())
    # The last one: adapters keep the layer as it was before the one that they train.
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in base and module.out_features == model.config.num_labels
    ]
    if model.base_model is model or not layers:
        raise ValueError(f"{type(model).__name__} must have a head that ends in a linear layer, got none.")
    return layers[-1]


@torch.no_grad()
def zero_output_layers_(models: Mapping[str, PreTrainedModel]) -> None:
    """Set the layers that compute the logits to zero, so that every output is uniform (0 in regression).

    Args:
        models: What each model is, for messages -> the model, as for `output_layer_of`.

    Raises:
        ValueError: If a layer is not trained, or shares its weights with the embeddings: it would stay zero, or the
            embeddings would be lost. Then nothing is changed.
    """
    layers = [_trained_output_layer(part, model) for part, model in models.items()]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()


def _trained_output_layer(part: str, model: PreTrainedModel) -> nn.Linear:
    layer = output_layer_of(model)
    # Not `get_input_embeddings`: a model that reads no tokens need not have it.
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is layer.weight]
    if len(names) > 1:
        raise ValueError(
            f"zero_init_heads must be False: the output layer of the {part} shares its weights ({', '.join(names)})."
        )
    if not all(parameter.requires_grad for parameter in layer.parameters()):
        raise ValueError(
            f"zero_init_heads must be False, or the output layer of the {part} trained: frozen, it would stay zero."
        )
    return layer
