"""Distillation from a learning teacher, which is trained beside the student."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import PreTrainedModel

from hf_compress.training.arguments import JointTeacherArguments
from hf_compress.training.compat import arithmetic_of
from hf_compress.training.learner_trainer import LearningTeacherTrainer
from hf_compress.training.learning_teacher import LearningTeacher
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teachers import Teacher


logger = logging.getLogger(__name__)


class JointTeacherTrainer(LearningTeacherTrainer):
    """Trains teacher and student in lock-step on the same batches: the student follows the teacher's trajectory.

    The teacher learns from its own loss on the labels alone. Whatever the student does, it ends with the weights
    that fine-tuning it alone would give (with `teacher_update_cycle=1`).

    Args:
        model: The student.
        teacher_model: The teacher before its training; changed in place.
        args: `JointTeacherArguments`.
        kwargs: As for `DistillationTrainer`.

    Source:
        "Trajectory guided" in CALD (arXiv 2410.06846); specification 3.2. Unlike there, the turn of the teacher is
        decided once an update, from the count of all updates; `compat="cald"` restores the published arithmetic and
        schedule.

    Example:
        >>> trainer = JointTeacherTrainer(model=student, teacher_model=pretrained, train_dataset=rows,
        ...                               args=JointTeacherArguments("out", alpha_layer=1.0))   # doctest: +SKIP
    """

    args: JointTeacherArguments
    arguments_class = JointTeacherArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        args: JointTeacherArguments | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, teacher_model, args, **kwargs)
        if not self.args.uses_teacher:
            logger.warning("alpha_output and alpha_layer are 0: no teacher learns and none is saved.")

    def make_teacher(self, model: PreTrainedModel, wanted: WantedSignals, label_order: list[int] | None) -> Teacher:
        args = self.args
        self.require_same_ids(model)
        return LearningTeacher(
            model,
            wanted,
            learning_rate=args.teacher_learning_rate,
            cycle=args.teacher_update_cycle,
            stretched=args.teacher_schedule == "stretched",
            dropout=args.teacher_dropout,
            arithmetic=arithmetic_of(args.compat),
            seed=args.seed,
        )
