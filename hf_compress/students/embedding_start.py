"""Starts a student's word embeddings from a teacher's, on the directions in which its words differ most.

Letters: V tokens, D width of the teacher's embeddings, E of the student's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def principal_coordinates(table: Tensor, size: int) -> tuple[Tensor, float]:
    """Project the rows of a table on their first principal components.

    Args:
        table: [V, D], any float dtype.
        size: Components, at most D.

    Returns:
        [V, size] coordinates of the centred rows in double precision, and the share in 0..1 of the variance that they
        hold.

    Source:
        Pearson 1901: the projection of given rank that loses the least of the squared distances.
    """
    centred = table.double() - table.double().mean(0)
    # Eigenvalues rise; the covariance is small where the table is long.
    values, directions = torch.linalg.eigh(centred.T @ centred)
    chosen = directions.flip(1)[:, :size]
    # An eigenvector has no sign of its own: the largest entry is made positive, so that every run starts alike.
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    share = values.flip(0)[:size].sum() / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return centred @ (chosen * largest.sign()), float(share)


@torch.no_grad()
def start_embeddings_(
    student: PreTrainedModel, teacher: PreTrainedModel, scale: float | None = None, frozen: bool = False
) -> float:
    """Start the word embeddings of a student from those of a teacher that reads the same tokens, in place.

    Args:
        student: Any model with a table of word embeddings, usually a `BiLSTMForSequenceClassification`. Its padding
            row stays; where it is wider than the teacher, so do its further columns.
        teacher: Has a row for each of the student's tokens. It is not changed, and shares no memory with the student.
        scale: Standard deviation above 0 of all projected entries; None keeps the teacher's distances.
        frozen: Do not train the table.

    Returns:
        The share in 0..1 of the teacher's variance that the student's table holds.

    Raises:
        ValueError: If a model has no table of words, the teacher knows fewer tokens, or `scale` is not above 0.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> teacher = BertModel(BertConfig(vocab_size=30, **sizes))
        >>> from hf_compress.students import BiLSTMConfig, BiLSTMModel
        >>> student = BiLSTMModel(BiLSTMConfig(vocab_size=30, embedding_size=8, hidden_size=4))
        >>> round(start_embeddings_(student, teacher), 6)
        1.0
    """
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}.")
    ours, theirs = (_table(model, role) for model, role in ((student, "student"), (teacher, "teacher")))
    if theirs.num_embeddings < ours.num_embeddings:
        raise ValueError(
            f"The teacher must have an embedding for each of the student's {ours.num_embeddings} tokens, got "
            f"{theirs.num_embeddings}: take a teacher with the student's tokenizer."
        )
    table = theirs.weight[: ours.num_embeddings].detach().cpu()
    coordinates, share = principal_coordinates(table, min(ours.embedding_dim, theirs.embedding_dim))
    if scale is not None:
        coordinates = coordinates * (scale / coordinates.std().clamp(min=torch.finfo(coordinates.dtype).tiny))
    before = None if ours.padding_idx is None else ours.weight[ours.padding_idx].clone()
    ours.weight[:, : coordinates.shape[1]] = coordinates.to(ours.weight)
    if before is not None:
        ours.weight[ours.padding_idx] = before
    if frozen:
        ours.weight.requires_grad_(False)
    return share


def _table(model: PreTrainedModel, role: str) -> nn.Embedding:
    table: Any = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"The {role} must have a table of word embeddings, got a {type(model).__name__}.")
    return table
