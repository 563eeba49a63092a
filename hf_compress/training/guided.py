"""Distillation from a teacher that changes: trained beside the student, or a ladder of its saved states."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.saving import complete_or_absent, require_own_folder
from hf_compress.training.arguments import JointTeacherArguments, SnapshotTeacherArguments
from hf_compress.training.collator import TeacherStudentCollator
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.fitting import label_order
from hf_compress.training.learning_teacher import LearningTeacher
from hf_compress.training.snapshots import SnapshotTeacher, check_ladder, open_snapshot


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
    _teacher: LearningTeacher | None

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | None = None,
        args: JointTeacherArguments | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, teacher_model, args, **kwargs)
        if not self.args.uses_teacher:
            logger.warning("alpha_output and alpha_layer are 0: no teacher learns and none is saved.")
        # Kept apart only where a second training will need it.
        again = self.model_init is not None and self._origin is not None
        self._beginning = copy.deepcopy(self._origin.state_dict()) if again else None

    def _untouched_teacher(self) -> PreTrainedModel:
        teacher = super()._untouched_teacher()
        teacher.load_state_dict(self._beginning)
        return teacher

    def _make_teacher(self, teacher: PreTrainedModel, states: tuple[int, ...]) -> LearningTeacher:
        args = self.args
        if label_order(self.model.config, teacher.config) is not None:
            raise ValueError(
                "A teacher that learns must count its labels as the student does, because both learn from the same "
                f"ids: the student has {self.model.config.id2label}, the teacher {teacher.config.id2label}."
            )
        return LearningTeacher(
            teacher.to(args.device),
            states,
            args.alpha_output > 0,
            learning_rate=args.teacher_learning_rate,
            cycle=args.teacher_update_cycle,
            stretched=args.teacher_schedule == "stretched",
            dropout=args.teacher_dropout,
            restart_each_epoch=args.compat == "cald",
            seed=args.seed,
        )

    def _prepare_teacher(self, num_updates: int) -> None:
        self._teacher.prepare(self, num_updates)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._teacher is not None and (seen := self._teacher.take_loss()) is not None:
            self.averages["train"].add("loss/teacher", seen)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._teacher is not None and "learning_rate" in logs:
            logs["teacher_learning_rate"] = self._teacher.current_learning_rate
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train both; with `save_teacher`, save the student and then the teacher, to `<output_dir>/teacher`.

        Raises:
            ValueError: Also if the disk has no room for the teacher; the student is saved then.
        """
        saves = self._teacher is not None and self.args.save_teacher and self.args.should_save
        # Between the trials of a search there is no model.
        if saves and self.model is not None:
            place = Path(self.args.output_dir, _SAVED)
            require_own_folder(place, {"the model": getattr(self._core(), "name_or_path", ""),
                                       **self.teacher_origins()})  # fmt: skip
        outcome = super().train(*args, **kwargs)
        if saves:
            # The student first: it is what the training was for.
            if not self.state.is_hyper_param_search:
                self.save_model(_internal_call=True)
            try:
                # Every trial of a search has a folder of its own.
                self._save_teacher(Path(self.checkpoints.folder, _SAVED))
            except ValueError as error:
                raise ValueError(f"The student is saved, the teacher is not: {error}") from error
        return outcome

    def _save_teacher(self, place: Path) -> None:
        with complete_or_absent(place) as staged:
            self._teacher.model.save_pretrained(staged)
            # Where the teacher reads other tokens, its collator knows its tokenizer.
            both = isinstance(self.data_collator, TeacherStudentCollator)
            tokenizer = getattr(self.data_collator.teacher, "tokenizer", None) if both else self.processing_class
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)

    def push_to_hub(self, *args: Any, include_teacher: bool = False, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`: uploads the student; its teacher only with `include_teacher`."""
        if include_teacher:
            return super().push_to_hub(*args, **kwargs)
        with self._teacher_aside() as uploads:
            outcome = super().push_to_hub(*args, **kwargs)
            uploads.append(outcome)
        return outcome

    def upload_checkpoint(self, checkpoint: str) -> None:
        with self._teacher_aside() as uploads:
            super().upload_checkpoint(checkpoint)
            uploads.extend(getattr(self.push_in_progress, "jobs", ()))

    @contextlib.contextmanager
    def _teacher_aside(self) -> Iterator[list[Any]]:
        """Give the teacher's folder a name that `Trainer` does not upload, until the uploads collected have ended."""
        saved, aside = Path(self.args.output_dir, _SAVED), Path(self.args.output_dir, f"_{_SAVED}")
        uploads: list[Any] = []
        if not (self.is_world_process_zero() and saved.is_dir()):
            yield uploads
            return
        os.replace(saved, aside)
        try:
            yield uploads
        finally:
            # They end in the order in which they began.
            waiting = [upload for upload in uploads if isinstance(upload, Future) and not upload.done()]
            if waiting:
                waiting[-1].add_done_callback(lambda _: os.replace(aside, saved))
            else:
                os.replace(aside, saved)


class SnapshotTeacherTrainer(DistillationTrainer):
    """Trains a student on a ladder of saved teachers, from the youngest training state to the finished model.

    Args:
        model: The student.
        args: `SnapshotTeacherArguments`; `teacher_snapshots` names the ladder.
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
    _teacher: SnapshotTeacher | None

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: SnapshotTeacherArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("teacher_model") is not None:
            raise ValueError("teacher_model must not be given: args.teacher_snapshots names the teachers.")
        kwargs.pop("teacher_model", None)
        if not isinstance(args, SnapshotTeacherArguments):
            raise ValueError(
                f"args must be SnapshotTeacherArguments with teacher_snapshots, got {type(args).__name__}."
            )
        first = open_snapshot(args.teacher_snapshots[0]) if args.uses_teacher else None
        if args.uses_teacher:
            check_ladder(args.teacher_snapshots, first)
        if args.uses_teacher and len(args.teacher_snapshots) == 1:
            logger.warning(
                "teacher_snapshots holds one state, %s: that is a fixed teacher. Keep more of its training "
                "(save_total_limit) for a ladder.",
                args.teacher_snapshots[0],
            )
        super().__init__(model, first, args, **kwargs)
        # It would stay in memory beside the later ones.
        self._origin = None

    def teacher_origins(self) -> dict[str, str]:
        snapshots = self.args.teacher_snapshots if self.args.uses_teacher else ()
        return {f"the teacher's state {number}": str(place) for number, place in enumerate(snapshots)}

    def _untouched_teacher(self) -> PreTrainedModel:
        return open_snapshot(self.args.teacher_snapshots[0])

    def _make_teacher(self, teacher: PreTrainedModel, states: tuple[int, ...]) -> SnapshotTeacher:
        args = self.args
        return SnapshotTeacher(
            args.teacher_snapshots, teacher.to(args.device), states, args.alpha_output > 0, args.teacher_dropout,
            self._label_order,
        )  # fmt: skip

    def _prepare_teacher(self, num_updates: int) -> None:
        self._teacher.set_length(num_updates)
