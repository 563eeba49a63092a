"""What the trainers share whose teacher learns beside the student: both are trained, saved and uploaded."""

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
from hf_compress.training.arguments import LearningTeacherArguments
from hf_compress.training.checkpoints import TEACHER_FOLDER
from hf_compress.training.collator import TeacherStudentCollator
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.given_teacher import GivenTeacher, TeacherSource
from hf_compress.training.teacher_fit import teacher_label_order
from hf_compress.training.teachers import Learner


logger = logging.getLogger(__name__)


class LearningTeacherTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose teacher may learn; subclasses make it."""

    args: LearningTeacherArguments
    arguments_class: type[LearningTeacherArguments] = LearningTeacherArguments

    def teacher_source(self, given: PreTrainedModel | str | os.PathLike[str] | None) -> TeacherSource:
        # Its beginning is kept only where a second training will need it.
        return GivenTeacher(given, changes=self.model_init is not None)

    @property
    def learner(self) -> Learner | None:
        """The teacher if it learns."""
        teacher = None if self.session is None else self.session.teacher
        return teacher if isinstance(teacher, Learner) else None

    def require_same_ids(self, teacher: PreTrainedModel) -> None:
        """Refuse a teacher that numbers its labels in another way than the student.

        Raises:
            ValueError: Names the labels of both.
        """
        student = self._core().config
        if teacher_label_order(student, teacher.config) is not None:
            raise ValueError(
                "A teacher that learns must count its labels as the student does, because both learn from the same "
                f"ids: the student has {student.id2label}, the teacher {teacher.config.id2label}."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.learner is not None and "learning_rate" in logs:
            logs["teacher_learning_rate"] = self.learner.learning_rate
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train both; with `save_teacher`, save the student and then the teacher, to `<output_dir>/teacher`.

        With `load_best_model_at_end`, the teacher that is saved is the one that stood beside the best student.

        Raises:
            ValueError: Also if the disk has no room for the teacher; the student is saved then.
        """
        saves = self.learner is not None and self.args.save_teacher and self.args.should_save
        # Between the trials of a search there is no model.
        if saves and self.model is not None:
            origin = getattr(self._core(), "name_or_path", "")
            require_own_folder(
                Path(str(self.args.output_dir), TEACHER_FOLDER), {"the model": origin, **self.teacher_origins()}
            )
        outcome = super().train(*args, **kwargs)
        self._load_teacher_of_best()
        if saves:
            # The student first: it is what the training was for.
            if not self.state.is_hyper_param_search:
                self.save_model(_internal_call=True)
            try:
                # Every trial of a search has a folder of its own.
                self._save_teacher(self.checkpoints.folder / TEACHER_FOLDER)
            except ValueError as error:
                raise ValueError(f"The student is saved, the teacher is not: {error}") from error
        return outcome

    def _load_teacher_of_best(self) -> None:
        best = self.state.best_model_checkpoint
        if self.learner is None or not self.args.load_best_model_at_end or best is None:
            return
        if (saved := Path(best, TEACHER_FOLDER)).is_dir():
            self.learner.trained.load_weights(saved)
        else:
            # With `save_only_model` checkpoints hold the student alone.
            logger.warning("%s holds no teacher: the one that is saved is that of the last update.", best)

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
        saved, hidden = (Path(str(self.args.output_dir), name) for name in (TEACHER_FOLDER, f"_{TEACHER_FOLDER}"))
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
