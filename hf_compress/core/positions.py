"""The number of tokens that a model has positions for, and longer tables of positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# Where models keep their table: BERT and its relatives, OPT, GPT-2.
_TABLES = ("embeddings.position_embeddings", "decoder.embed_positions", "wpe")


def _position_embeddings(model: PreTrainedModel) -> nn.Embedding | None:
    """Find the learned table of absolute positions; models with rotary positions have none."""
    for path in _TABLES if not getattr(model.config, "is_encoder_decoder", False) else ():
        table: Any = model.base_model
        for name in path.split("."):
            table = getattr(table, name, None)
        # Vision models have a plain parameter of patches under the first name.
        if isinstance(table, nn.Embedding):
            return table
    return None


def position_offset(model: PreTrainedModel) -> int:
    """The number of position rows that no token uses: RoBERTa counts from behind its padding row, OPT from 2.

    Example:
        >>> from transformers import RobertaConfig, RobertaModel
        >>> position_offset(RobertaModel(RobertaConfig(num_hidden_layers=1, hidden_size=12)))
        2
    """
    table = _position_embeddings(model)
    if table is None or table.padding_idx is None:
        return getattr(table, "offset", 0)
    return table.padding_idx + 1


def most_tokens(model: PreTrainedModel) -> int | None:
    """Tokens that an input may have; None for models without a table of positions.

    Example:
        >>> from transformers import RobertaConfig, RobertaModel
        >>> most_tokens(RobertaModel(RobertaConfig(num_hidden_layers=1, hidden_size=12, max_position_embeddings=34)))
        32
    """
    table = _position_embeddings(model)
    return None if table is None else table.num_embeddings - position_offset(model)


def patch_positions(model: PreTrainedModel) -> int | None:
    """Tokens that an image has for a model that learns one position for each of them; None for other models."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    return table.shape[1] if isinstance(table, nn.Parameter) else None


def usual_tokens(model: PreTrainedModel) -> int | None:
    """Tokens of the longest input that a model takes; None if it takes inputs of any length.

    Example:
        >>> from transformers import RobertaConfig, RobertaModel
        >>> usual_tokens(RobertaModel(RobertaConfig(num_hidden_layers=1, hidden_size=12, max_position_embeddings=34)))
        32
    """
    patches = patch_positions(model)
    if patches is not None:
        return patches
    # OPT's config does not count the rows that no token uses, RoBERTa's does: the table itself knows.
    named = getattr(model.config, "max_position_embeddings", None)
    return named if _position_embeddings(model) is None else most_tokens(model)


def extend_positions_(model: PreTrainedModel, rows: int) -> None:
    """Continue the position table periodically, in place.

    Args:
        model: Its config's `max_position_embeddings` is raised too.
        rows: Number of rows of the new table, unused ones included.

    Source:
        Longformer (arXiv 2004.05150), section 5: copies keep the local structure that pretraining learned.
    """
    table, offset = _position_embeddings(model), position_offset(model)
    if table is None:
        model.config.max_position_embeddings = rows
        return
    # Some configs count the unused rows, others do not.
    model.config.max_position_embeddings += rows - table.num_embeddings
    period = table.num_embeddings - offset
    index = torch.arange(rows, device=table.weight.device)
    index = torch.where(index < offset, index, offset + (index - offset) % period)
    table.weight = nn.Parameter(table.weight.detach()[index].clone(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = rows
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    for name, value in (
        ("position_ids", torch.arange(rows)),
        ("token_type_ids", torch.zeros(rows, dtype=torch.int64)),
    ):
        if getattr(embeddings, name, None) is not None:
            old = getattr(embeddings, name)
            persistent = name not in embeddings._non_persistent_buffers_set
            embeddings.register_buffer(name, value.to(old.device).unsqueeze(0), persistent=persistent)
