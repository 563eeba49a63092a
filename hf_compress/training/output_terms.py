"""What the output term compares, by task: which logits, which distance, at which positions.

Letters: B batch, S padded length, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CTC_MAPPING_NAMES

from hf_compress.core.batches import layer_mask
from hf_compress.training.losses import (
    multilabel_divergence,
    output_divergence,
    position_divergence,
    regression_distance,
    token_divergence,
)


_IGNORED = -100


def predicts_next_token(model: PreTrainedModel) -> bool:
    """Whether logits at one position are compared with the label of the next, as causal language models do."""
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    shifted = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return shifted or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def counted_positions(model: PreTrainedModel, shape: torch.Size, inputs: Mapping[str, Any]) -> Tensor | None:
    """The positions whose output distributions are compared.

    Args:
        model: The student, without adapters.
        shape: [B, S] of the logits.
        inputs: The student's batch.

    Returns:
        [B, S] bool. With labels for each token: where the student's own loss reads a label. Without: the real tokens,
        of sounds the real frames. None when nothing says which are real.
    """
    labels: Tensor | None = inputs.get("labels")
    # Labels of a CTC model are letters, its logits frames: that both are equally many says nothing.
    if labels is not None and labels.shape == shape and not _is_ctc(model):
        counted = labels != _IGNORED
        if predicts_next_token(model):
            counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
        return counted
    if model.config.is_encoder_decoder:
        mask: Tensor | None = inputs.get("decoder_attention_mask")
        return None if mask is None else mask.bool()
    return layer_mask(model, inputs) if "attention_mask" in inputs else None


def _is_ctc(model: PreTrainedModel) -> bool:
    return type(model).__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values()


def output_term(
    teacher: tuple[Tensor, ...],
    student: tuple[Tensor, ...],
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    temperature: float,
) -> Tensor:
    """The distance between the outputs of teacher and student.

    Args:
        teacher: Its logits: one tensor, or start and end logits for question answering.
        student: Its logits.
        model: The student, without adapters.
        inputs: The student's batch.
        temperature: T > 0.

    Raises:
        ValueError: If the logits differ in shape.
    """
    if len(student) == 2:
        mask = inputs.get("attention_mask")
        parts = [position_divergence(t, s, temperature, mask) for t, s in zip(teacher, student, strict=True)]
        return torch.stack(parts).mean()
    next_tokens = student[0].ndim == 3 and predicts_next_token(model)
    # Of next tokens one vocabulary may be padded to more entries (`teacher_fit`).
    compared = 2 if next_tokens else student[0].ndim
    if teacher[0].ndim != student[0].ndim or teacher[0].shape[:compared] != student[0].shape[:compared]:
        raise ValueError(f"Teacher logits must have shape {tuple(student[0].shape)}, got {tuple(teacher[0].shape)}.")
    if student[0].ndim == 3:
        counted = counted_positions(model, student[0].shape[:2], inputs)
        if next_tokens:
            return token_divergence(teacher[0], student[0], temperature, counted)
        return output_divergence(teacher[0], student[0], temperature, counted)
    problem = model.config.problem_type
    if student[0].shape[-1] == 1 or problem == "regression":
        return regression_distance(teacher[0], student[0])
    if problem == "multi_label_classification":
        return multilabel_divergence(teacher[0], student[0], temperature)
    return output_divergence(teacher[0], student[0], temperature)
