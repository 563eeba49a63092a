"""One teacher in one training: it answers each micro-batch, and is saved and resumed with the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerState

from hf_compress.core.pooling import Pooling
from hf_compress.training.checkpoints import TEACHER_FOLDER
from hf_compress.training.layer_term import LayerTerm
from hf_compress.training.signals import Batch, Signals, SignalsOf
from hf_compress.training.teacher_fit import read_by_both
from hf_compress.training.teachers import Learner, Teacher
from hf_compress.training.windows import Window


class TeacherSession:
    """A teacher that fits its student, from the start of a training to its end. It is saved in every checkpoint.

    Args:
        teacher: Answers, and may learn.
        student: The model that learns from it, without wrappers.
        layer_term: Compares hidden states; None when they are not compared.
        last_update: The number of updates after which the teacher no longer guides; None: it always does.
        precision: Gives the context in which the teacher answers: the half precision in which the student computes.
        pooling: How a student without a head makes the sentence vectors that are compared in place of logits.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: PreTrainedModel,
        layer_term: LayerTerm | None = None,
        last_update: int | None = None,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
        pooling: Pooling | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.layer_term = layer_term
        self.last_update = last_update
        self.pooling = pooling
        self._precision = precision
        self._window: Window | None = None
        self._accumulation = self._updates_per_epoch = 1

    def guides(self, update: int) -> bool:
        """Whether the student still learns from the teacher after this many updates."""
        return self.last_update is None or update < self.last_update

    def begin(self, trainer: Trainer, num_updates: int, updates_per_epoch: int) -> None:
        """Prepare the teacher for a training of this length; as for `Teacher.begin`."""
        self._window, self._updates_per_epoch = None, updates_per_epoch
        self._accumulation = trainer.args.gradient_accumulation_steps
        self.teacher.begin(trainer, num_updates)

    def begin_window(
        self,
        batches: Sequence[Batch],
        state: TrainerState,
        student: SignalsOf,
        weights: Sequence[Tensor | float],
    ) -> dict[str, Tensor]:
        """Let a learning teacher learn from the window, before the student does.

        Args:
            batches: The micro-batches of an update, as the data loader gave them.
            state: Of the student's training.
            student: Gives the student's answer to a batch.
            weights: As for `Window`.

        Returns:
            What `Learner.learn` returns; empty for teachers that do not learn.
        """
        self.teacher.before_update(state.global_step)
        self._window = None
        if not isinstance(self.teacher, Learner):
            return {}
        model = self.teacher.model
        both = [read_by_both(send_to_device(batch, model.device), self.student, model) for batch in batches]
        self._window = Window(state.global_step, both, self._accumulation, self._updates_per_epoch, weights)
        return self.teacher.learn(self._window, student)

    def end_micro_batch(self) -> None:
        """Called when the student has learned from a micro-batch of the window."""
        if self._window is not None and self._window.answers:
            self._window.answers.pop(0)

    def answer(self, batch: Batch, training: bool, with_logits: bool = False) -> Signals:
        """Return the teacher's answer to a batch.

        Args:
            batch: As the collator made it.
            training: Whether the student is trained on the batch; otherwise it is evaluated.
            with_logits: Give the logits of all tokens also where the teacher gives what its head reads.
        """
        if training and self._window is not None and self._window.answers:
            return self._window.answers[0]
        read = read_by_both(batch, self.student, self.teacher.model).teacher
        with self._precision():
            answer = self.teacher.forward(read, training)
            return answer.with_logits() if with_logits else answer

    def save(self, checkpoint: Path, process: int, shared: bool) -> None:
        if self.layer_term is not None and shared:
            self.layer_term.save(checkpoint)
        self.teacher.save(checkpoint / TEACHER_FOLDER, process, shared)

    def load(self, checkpoint: Path, process: int) -> None:
        self.teacher.load(checkpoint / TEACHER_FOLDER, process)
        if self.layer_term is not None:
            self.layer_term.load(checkpoint)
