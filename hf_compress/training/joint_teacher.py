"""Distillation from a learning teacher, which is trained beside the student."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from hf_compress.core.saving import complete_or_absent, require_own_folder
from hf_compress.training.arguments import JointTeacherArguments
from hf_compress.training.collator import TeacherStudentCollator
from hf_compress.training.compat import arithmetic_of
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.given_teacher import GivenTeacher, TeacherSource
from hf_compress.training.learning_teacher import LearningTeacher
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teacher_fit import teacher_label_order
from hf_compress.training.teachers import Learner, Teacher


logger = logging.getLogger(__name__)

# Where a learning teacher is saved, below its student.
_SAVED = "teacher"


class JointTeacherTrainer(DistillationTrainer):
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

    def teacher_source(self, given: PreTrainedModel | str | os.PathLike[str] | None) -> TeacherSource:
        # Its beginning is kept only where a second training will need it.
        return GivenTeacher(given, changes=self.model_init is not None)

    def make_teacher(self, model: PreTrainedModel, wanted: WantedSignals, label_order: list[int] | None) -> Teacher:
        args, student = self.args, self._core().config
        if teacher_label_order(student, model.config) is not None:
            raise ValueError(
                "A teacher that learns must count its labels as the student does, because both learn from the same "
                f"ids: the student has {student.id2label}, the teacher {model.config.id2label}."
            )
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        learner = self.session.teacher if self.session is not None else None
        if isinstance(learner, Learner) and "learning_rate" in logs:
            logs["teacher_learning_rate"] = learner.learning_rate
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train both; with `save_teacher`, save the student and then the teacher, to `<output_dir>/teacher`.

        Raises:
            ValueError: Also if the disk has no room for the teacher; the student is saved then.
        """
        saves = self.session is not None and self.args.save_teacher and self.args.should_save
        # Between the trials of a search there is no model.
        if saves and self.model is not None:
            origin = getattr(self._core(), "name_or_path", "")
            require_own_folder(
                Path(str(self.args.output_dir), _SAVED), {"the model": origin, **self.teacher_origins()}
            )
        outcome = super().train(*args, **kwargs)
        if saves:
            # The student first: it is what the training was for.
            if not self.state.is_hyper_param_search:
                self.save_model(_internal_call=True)
            try:
                # Every trial of a search has a folder of its own.
                self._save_teacher(self.checkpoints.folder / _SAVED)
            except ValueError as error:
                raise ValueError(f"The student is saved, the teacher is not: {error}") from error
        return outcome

    def _save_teacher(self, folder: Path) -> None:
        if self.teacher_model is None:
            return
        with complete_or_absent(folder) as staged:
            self.teacher_model.save_pretrained(staged)
            # Where the teacher reads other tokens, its collator knows its tokenizer.
            collator = self.data_collator
            if isinstance(collator, TeacherStudentCollator):
                tokenizer = getattr(collator.teacher, "tokenizer", None)
            else:
                tokenizer = self.processing_class
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)

    def push_to_hub(self, *args: Any, include_teacher: bool = False, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`: uploads the student; its teacher only with `include_teacher`."""
        if include_teacher:
            return super().push_to_hub(*args, **kwargs)
        with self._without_teacher() as uploads:
            outcome = super().push_to_hub(*args, **kwargs)
            uploads.append(outcome)
        return outcome

    def upload_checkpoint(self, checkpoint: str) -> None:
        with self._without_teacher() as uploads:
            super().upload_checkpoint(checkpoint)
            uploads.extend(getattr(self.push_in_progress, "jobs", ()))

    @contextlib.contextmanager
    def _without_teacher(self) -> Iterator[list[Any]]:
        """Give the teacher's folder a name that `Trainer` does not upload, until the uploads collected have ended."""
        saved, hidden = (Path(str(self.args.output_dir), name) for name in (_SAVED, f"_{_SAVED}"))
        uploads: list[Any] = []
        if not (self.is_world_process_zero() and saved.is_dir()):
            yield uploads
            return
        os.replace(saved, hidden)
        try:
            yield uploads
        finally:
            # They end in the order in which they began.
            waiting = [upload for upload in uploads if isinstance(upload, Future) and not upload.done()]
            if waiting:
                waiting[-1].add_done_callback(lambda _: os.replace(hidden, saved))
            else:
                os.replace(hidden, saved)
