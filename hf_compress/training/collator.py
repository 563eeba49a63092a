"""Batches for teachers and students that read different tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


TEACHER_PREFIX = "teacher_"


def split_inputs(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student's entries, and the teacher's with their `teacher_` prefix removed.

    Example:
        >>> split_inputs({"input_ids": 1, "teacher_input_ids": 2})
        ({'input_ids': 1}, {'input_ids': 2})
    """
    student = {k: v for k, v in batch.items() if not k.startswith(TEACHER_PREFIX)}
    teacher = {k.removeprefix(TEACHER_PREFIX): v for k, v in batch.items() if k.startswith(TEACHER_PREFIX)}
    return student, teacher


@dataclass
class TeacherStudentCollator:
    """Pads the student's columns with one collator and the `teacher_` columns with another.

    Args:
        student: For columns without the prefix, labels included.
        teacher: For the `teacher_` columns; it sees them without the prefix.

    Example:
        >>> from transformers import default_data_collator
        >>> collator = TeacherStudentCollator(default_data_collator, default_data_collator)
        >>> sorted(collator([{"input_ids": [1], "teacher_input_ids": [2, 3]}]))
        ['input_ids', 'teacher_input_ids']
    """

    student: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    teacher: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [split_inputs(feature) for feature in features]
        batch = dict(self.student([student for student, _ in pairs]))
        if any(teacher for _, teacher in pairs):
            teacher = self.teacher([teacher for _, teacher in pairs])
            batch.update({f"{TEACHER_PREFIX}{name}": value for name, value in teacher.items()})
        return batch
