"""Teachers answer: where the targets of a student come from. They never enter its state, optimizer or DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress.core.batches import accepted_arguments
from hf_compress.core.forward_state import forward_state
from hf_compress.training.cache import TeacherCache
from hf_compress.training.fingerprints import example_keys
from hf_compress.training.given_teacher import move_
from hf_compress.training.signals import Answers, Batch, Signals, Wanted
from hf_compress.training.windows import Window


class Teacher:
    """Where targets come from. What it needs to go on after a crash is written by `save` and read by `load`.

    Args:
        model: The network that computes the targets at this moment.
        wanted: Which of its answers students compare with.
    """

    cache: TeacherCache | None = None

    def __init__(self, model: PreTrainedModel, wanted: Wanted | None = None) -> None:
        self.model = model
        self.wanted = wanted or Wanted()

    def begin(self, trainer: Trainer, num_updates: int) -> None:
        """Called when a training begins, before its optimizer is made.

        Args:
            trainer: The student's.
            num_updates: The length of the training.

        Raises:
            ValueError: If the teacher cannot guide such a training.
        """

    def turn_to(self, update: int) -> None:
        """Called before each update that the teacher guides, with the number of those that are finished."""

    def forward(self, batch: Batch, training: bool = False) -> Signals:
        """The targets for a batch, outside of any graph. Changes nothing that a training depends on.

        Args:
            batch: As the teacher's tokenizer made it; entries that its forward does not name are dropped, and labels.
            training: Whether the student is being trained on the batch, or evaluated.
        """
        raise NotImplementedError

    def save(self, folder: Path, process: int, shared: bool) -> None:
        """Write whatever changes during training into a folder of a checkpoint; as for `CheckpointPart`."""

    def load(self, folder: Path, process: int) -> None:
        """Read what `save` wrote; as for `CheckpointPart`."""


class Learner(Teacher):
    """A teacher that is trained beside its student."""

    def learn(self, window: Window, student: Answers) -> dict[str, Tensor]:
        """Learn from the micro-batches of one update, before the student does.

        Where students imitate the weights from before this step, the answers that were computed on the way go into
        `window.answers`; otherwise the teacher is asked again, with its new weights.

        Args:
            window: The micro-batches.
            student: What the student answers to a batch of its own, before its update.

        Returns:
            Name -> [N] values to be averaged and logged, for instance one for each micro-batch.
        """
        raise NotImplementedError

    @property
    def learning_rate(self) -> float:
        """Of its next step."""
        raise NotImplementedError


class FixedTeacher(Teacher):
    """A frozen model, run without gradients; a cache may keep its answers on disk.

    Args:
        model: Put in eval mode and frozen; its device follows the batches.
        wanted: Which of its answers students compare with.
        dropout: Run the teacher in train mode during training; evaluations are never random.
        cache: Where its answers are kept, as the teacher gives them.
        label_order: For each of the student's labels its index among the teacher's, see `label_order`. None: the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: Wanted | None = None,
        dropout: bool = False,
        cache: TeacherCache | None = None,
        label_order: list[int] | None = None,
    ) -> None:
        super().__init__(model.requires_grad_(False).train(False), wanted)
        self.dropout = dropout
        self.cache = cache
        self.label_order = label_order

    def forward(self, batch: Batch, training: bool = False) -> Signals:
        arguments = accepted_arguments(self.model, batch)
        arguments.pop("labels", None)
        dropout = self.dropout and training
        given = self._computed(arguments, dropout) if self.cache is None else self._cached(self.cache, arguments)
        if self.label_order is None:
            return given
        return Signals(tuple(logits[..., self.label_order] for logits in given.logits), given.hidden)

    def _cached(self, cache: TeacherCache, arguments: dict[str, Any]) -> Signals:
        keys = example_keys(arguments)
        if (stored := cache.read(keys, arguments)) is None:
            computed = self._computed(arguments, dropout=False)
            cache.write(keys, arguments, computed.logits, computed.hidden)
            # A text that came before keeps its first outputs: a run that was killed after this batch reads the same.
            stored = cache.read(keys, arguments)
            assert stored is not None
        return Signals(*stored)

    def _computed(self, arguments: dict[str, Any], dropout: bool) -> Signals:
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        if self.model.device != device:
            move_(self.model, device)
        self.model.train(dropout)
        # A classifier that drops tokens leaves out what its head does not read; here it is compared.
        state = forward_state(self.model, whole=True) if self.wanted.states else {}
        with torch.inference_mode():
            outputs = self.model(**arguments, **state, **self.wanted.arguments)
        return self.wanted.of(outputs)
