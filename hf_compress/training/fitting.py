"""Whether a teacher fits its student: labels, vocabulary, positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.labels import places_by_name, says_nothing
from hf_compress.core.positions import most_tokens


def label_order(student: PretrainedConfig, teacher: PretrainedConfig) -> list[int] | None:
    """For each of the student's labels its place among the teacher's; None when both count them alike.

    Labels are the same when their names are; names that only count them (LABEL_0, LABEL_1, ... or 0, 1, ...) fit all.

    Raises:
        ValueError: If outputs mean different things.
    """
    if student.num_labels != teacher.num_labels:
        raise ValueError(f"The teacher must have the student's {student.num_labels} labels, got {teacher.num_labels}.")
    ours, theirs = ([str(config.id2label[i]) for i in sorted(config.id2label)] for config in (student, teacher))
    plain = [str(i) for i in range(len(ours))]
    if says_nothing(ours) or says_nothing(theirs) or plain in (ours, theirs):
        return None
    places = places_by_name(ours, theirs)
    if sorted(place for place in places if place is not None) != list(range(len(ours))):
        raise ValueError(f"The teacher must have the student's labels {ours}, got {theirs}.")
    return None if places == list(range(len(ours))) else places


def require_own_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `ValueError` when a parameter belongs to both: freezing the teacher would freeze the student."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    common = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if common:
        raise ValueError(
            f"teacher_model and model share {len(common)} parameters ({common[0]}, ...): freezing one would freeze "
            "the other. Open the teacher a second time, or copy.deepcopy it first."
        )


def check_inputs(
    student: PreTrainedModel, teacher: PreTrainedModel, inputs: Mapping[str, Any], separate: bool
) -> None:
    """Refuse what a teacher is about to read when it does not know the tokens or positions.

    Args:
        student, teacher: The models.
        inputs: The teacher's batch.
        separate: Whether another tokenizer made it than the student's.

    Raises:
        ValueError: Names what differs and the remedy.
    """
    limit, ids = most_tokens(teacher), inputs.get("input_ids")
    if limit is not None and ids is not None and ids.shape[-1] > limit:
        raise ValueError(
            f"The teacher must read inputs of {ids.shape[-1]} tokens, got one that reads {limit}. Shorten them "
            "(max_length), or give it positions and fine-tune it (hf-compress finetune --max_positions)."
        )
    ours, theirs = (getattr(model.config, "vocab_size", None) for model in (student, teacher))
    if not separate and ours != theirs:
        raise ValueError(
            f"The teacher must read the student's vocabulary ({ours} tokens), got {theirs}. "
            "Give it its own columns teacher_input_ids, teacher_attention_mask (TeacherStudentCollator)."
        )
