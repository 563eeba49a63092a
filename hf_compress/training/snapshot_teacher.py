"""Distillation from a snapshot teacher: its saved states, one after the other."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import PreTrainedModel

from hf_compress.training.arguments import SnapshotTeacherArguments
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.given_teacher import TeacherSource
from hf_compress.training.signals import WantedSignals
from hf_compress.training.snapshots import SnapshotFolders, SnapshotTeacher
from hf_compress.training.teachers import Teacher


logger = logging.getLogger(__name__)


class SnapshotTeacherTrainer(DistillationTrainer):
    """Trains a student on a series of saved teachers, from the youngest training state to the finished model.

    Args:
        model: The student.
        args: `SnapshotTeacherArguments`; `teacher_snapshots` names the series.
        kwargs: As for `DistillationTrainer`, without `teacher_model`.

    Raises:
        ValueError: If a snapshot cannot be opened or there are more of them than updates.

    Source:
        "Waypoint guided" in CALD (arXiv 2410.06846); specification 3.3.

    Example:
        >>> args = SnapshotTeacherArguments("out", alpha_layer=1.0,
        ...                                 teacher_snapshots=["dense/checkpoint-*"])               # doctest: +SKIP
        >>> SnapshotTeacherTrainer(model=student, args=args, train_dataset=rows).train()            # doctest: +SKIP
    """

    args: SnapshotTeacherArguments
    arguments_class = SnapshotTeacherArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: SnapshotTeacherArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("teacher_model", None) is not None:
            raise ValueError("teacher_model must not be given: args.teacher_snapshots names the teachers.")
        if not isinstance(args, SnapshotTeacherArguments):
            raise ValueError(
                f"args must be SnapshotTeacherArguments with teacher_snapshots, got {type(args).__name__}."
            )
        folders = args.teacher_snapshots or []
        if args.uses_teacher and len(folders) == 1:
            logger.warning(
                "teacher_snapshots holds one state, %s: that is a fixed teacher. Keep more of its training "
                "(save_total_limit) for a series.",
                folders[0],
            )
        super().__init__(model, None, args, **kwargs)

    def teacher_source(self, given: PreTrainedModel | str | os.PathLike[str] | None) -> TeacherSource:
        return SnapshotFolders(self.args.teacher_snapshots or [])

    def make_teacher(self, model: PreTrainedModel, wanted: WantedSignals, label_order: list[int] | None) -> Teacher:
        return SnapshotTeacher(
            self.args.teacher_snapshots or [], model, wanted, self.args.teacher_dropout, label_order
        )
