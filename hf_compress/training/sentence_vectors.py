"""The vectors of a sentence encoder as targets: of each sentence, and how alike the sentences of a batch are.

Letters: B sentences, S padded length, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from hf_compress.core.batches import live_tokens, main_input
from hf_compress.core.errors import first_line
from hf_compress.core.pooling import Pooling, pooling_of


# Whose classes give what their names say. A user's own class may be a base model by descent, and give logits.
_KNOWN_MODULES = ("transformers.models.", "transformers_modules.", "hf_compress.")


def has_no_head(model: PreTrainedModel) -> bool:
    """Whether a model gives hidden states and no logits, as most of those that `AutoModel` opens do."""
    kind = type(model)
    headed = "For" in kind.__name__ or "LMHead" in kind.__name__
    return model.base_model is model and not headed and kind.forward.__module__.startswith(_KNOWN_MODULES)


def sentence_pooling(model: PreTrainedModel) -> Pooling | None:
    """How the vector of a sentence is made from what a model without a head gives; None for models with other outputs.

    Raises:
        ValueError: If its folder asks for a pooling that is not supported.
    """
    if not has_no_head(model) or model.config.is_encoder_decoder or main_input(model) != "input_ids":
        return None
    try:
        return pooling_of(model.config)
    except (ValueError, OSError) as error:
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        raise ValueError(f"The sentence vectors of {name!r} cannot be targets: {first_line(error)}") from error


def sentence_vectors(outputs: ModelOutput, pooling: Pooling, inputs: Mapping[str, Any]) -> Tensor:
    """[B, D] vectors of length 1, float32.

    Args:
        outputs: Of a model without a head.
        pooling: How it pools.
        inputs: What it has read.

    Raises:
        ValueError: If the model gives no states of its tokens.
    """
    states = outputs.get("last_hidden_state")
    if states is None or states.ndim != 3:
        raise ValueError(
            f"A sentence encoder must return last_hidden_state, got {type(outputs).__name__} with "
            f"{', '.join(outputs.keys())}."
        )
    return F.normalize(pooling.pooled(states.float(), live_tokens(inputs).to(states.device)), dim=-1)


def vector_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """One minus the cosine of a sentence's two vectors, in the mean over sentences.

    It is half their squared distance.

    Args:
        teacher, student: [B, D] of length 1.

    Example:
        >>> import torch
        >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> float(vector_distance(one, one)), float(vector_distance(one, other))
        (0.0, 1.0)
    """
    return 1 - (teacher * student).sum(-1).mean()


def similarity_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean squared difference between the cosines of all pairs of sentences in a batch; 0 for a single sentence.

    Args:
        teacher, student: [B, D] of length 1; D may differ.

    Source:
        Tung and Mori 2019 (arXiv 1907.09682), of vectors of length 1 and without the pairs of a sentence with itself.

    Example:
        >>> import torch
        >>> one, other = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> round(float(similarity_distance(one, other)), 4)
        0.36
    """
    pairs = len(student) * (len(student) - 1)
    squares = (teacher @ teacher.T - student @ student.T).square()
    return (squares.sum() - squares.diagonal().sum()) / max(pairs, 1)
