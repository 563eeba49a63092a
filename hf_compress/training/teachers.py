"""Teachers compute the targets that a student learns from. They are no part of its state, optimizer or DDP."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.utils.generic import ModelOutput

from hf_compress.core.batches import accepted_arguments
from hf_compress.core.forward_state import forward_state
from hf_compress.training.cache import TeacherCache
from hf_compress.training.fingerprints import example_keys
from hf_compress.training.given_teacher import move_
from hf_compress.training.language_head import described_head, reading_head
from hf_compress.training.signals import Batch, Signals, SignalsOf, WantedSignals
from hf_compress.training.trained_model import TrainedModel
from hf_compress.training.windows import Window


class Teacher:
    """Computes the targets of a student. `save` and `load` keep the state that a resumed training needs.

    Args:
        model: The network that computes the targets at this moment.
        wanted: Which of its outputs and hidden states become targets.
    """

    cache: TeacherCache | None = None

    def __init__(self, model: PreTrainedModel, wanted: WantedSignals | None = None) -> None:
        self.model = model
        self.wanted = wanted or WantedSignals()

    def begin(self, trainer: Trainer, num_updates: int) -> None:
        """Called when a training begins, before its optimizer is made.

        Args:
            trainer: The student's.
            num_updates: The length of the training.

        Raises:
            ValueError: If the teacher cannot guide such a training.
        """

    def before_update(self, update: int) -> None:
        """Called before each update that the teacher guides, with the number of finished updates."""

    def forward(self, batch: Batch, training: bool = False) -> Signals:
        """Compute the targets for a batch, without gradients. It changes nothing that a training depends on.

        Args:
            batch: As the teacher's tokenizer made it; labels and entries that its forward does not name are dropped.
            training: Whether the student is trained on the batch; otherwise it is evaluated.
        """
        raise NotImplementedError

    def save(self, folder: Path, process: int, shared: bool) -> None:
        """Write the state that changes during training into a folder of a checkpoint; see `CheckpointPart`."""

    def load(self, folder: Path, process: int) -> None:
        """Read what `save` wrote; see `CheckpointPart`."""


class Learner(Teacher):
    """A teacher that is trained beside its student.

    Args:
        model: Trained in place.
        wanted: Which of its outputs and hidden states become targets.
        learning_rate: Peak of its schedule.
        dropout: Run it in train mode when it learns.
        seed: Seed of its own random numbers, so that the student does not influence the teacher's training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: WantedSignals | None = None,
        *,
        learning_rate: float,
        dropout: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(model.train(dropout), wanted)
        self.trained = TrainedModel(model, seed)
        self.peak = learning_rate
        self.dropout = dropout

    def begin(self, trainer: Trainer, num_updates: int) -> None:
        self.trained.prepare(trainer, self.peak, num_updates, trainer.args.get_warmup_steps(num_updates))

    @property
    def learning_rate(self) -> float:
        """The learning rate of its next step."""
        return self.trained.learning_rate

    def answer(self, batch: Batch, dropout: bool) -> Signals:
        """Compute the targets for a batch with the present weights; as for `forward`."""
        arguments = accepted_arguments(self.model, batch)
        arguments.pop("labels", None)
        self.model.train(dropout)
        return self.wanted.of(self.trained(**arguments, **self.wanted.arguments), arguments)

    def own_loss(self, outputs: ModelOutput, arguments: Batch, update: int) -> Tensor:
        """Take the teacher's own loss on the labels from its outputs.

        Raises:
            ValueError: If there is none, or, where looking does not wait for a device, it is not finite.
        """
        loss: Tensor | None = outputs.get("loss")
        if loss is None:
            raise ValueError(
                f"A teacher that learns needs a loss, but {type(self.model).__name__} gave none for the columns "
                f"{', '.join(sorted(arguments))}. Use a teacher with a head, and data with its labels."
            )
        # On an accelerator this would wait for the device; there the trainer checks the averages that it logs.
        if loss.device.type == "cpu" and not torch.isfinite(loss).all():
            raise ValueError(f"The teacher's loss must be finite, got {loss} at step {update}.")
        return loss

    def save(self, folder: Path, process: int, shared: bool) -> None:
        self.trained.save(folder, process, shared)

    def load(self, folder: Path, process: int) -> None:
        self.trained.load(folder, process)

    def learn(self, window: Window, student: SignalsOf) -> dict[str, Tensor]:
        """Learn from the micro-batches of one update, before the student does.

        A teacher whose targets come from the weights before its step puts them into `window.answers`; otherwise
        `forward` computes them with the new weights.

        Args:
            window: The micro-batches.
            student: Gives the student's answer to a batch of its own, before its update.

        Returns:
            Name -> [N] values to average and log, for instance one for each micro-batch.
        """
        raise NotImplementedError


class FixedTeacher(Teacher):
    """A frozen model that runs without gradients; a cache may keep its answers on disk.

    Args:
        model: Put in eval mode and frozen; its device follows the batches.
        wanted: Which of its outputs and hidden states become targets.
        dropout: Run the teacher in train mode during training; evaluations are never random.
        cache: Where its answers are kept, as the teacher gives them.
        label_order: For each of the student's labels its index among the teacher's (see `teacher_label_order`); None
            when both number them alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: WantedSignals | None = None,
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
        # What pools reads the mask, whether the model does or not.
        read = {**batch, **arguments}
        given = self._computed(arguments, read, dropout) if self.cache is None else self._cached(arguments, read)
        if self.label_order is None:
            return given
        return Signals(tuple(logits[..., self.label_order] for logits in given.logits), given.hidden)

    def _cached(self, arguments: dict[str, Any], read: Batch) -> Signals:
        cache, keys = self.cache, example_keys(arguments)
        assert cache is not None
        if (stored := cache.read(keys, arguments)) is None:
            computed = self._computed(arguments, read, dropout=False)
            heads = () if computed.head_inputs is None else (computed.head_inputs,)
            cache.write(keys, arguments, computed.logits or heads, computed.hidden)
            # A text that was stored before keeps its first outputs, so that a run that was killed after this batch and
            # starts again reads the same ones.
            stored = cache.read(keys, arguments)
            assert stored is not None
        outputs, hidden = stored
        return self._from_head(outputs[0], hidden) if self.wanted.head_inputs else Signals(outputs, hidden)

    def _from_head(self, head_inputs: Tensor, hidden: tuple[Tensor, ...]) -> Signals:
        return Signals((), hidden, head_inputs, described_head(self.model))

    def _computed(self, arguments: dict[str, Any], read: Batch, dropout: bool) -> Signals:
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        if self.model.device != device:
            move_(self.model, device)
        self.model.train(dropout)
        # A classifier that drops tokens skips the rows that its head does not read; here they are compared.
        state = forward_state(self.model, whole=True) if self.wanted.states else {}
        head, seen = described_head(self.model) if self.wanted.head_inputs else None, list[Tensor]()
        with torch.inference_mode(), nullcontext() if head is None else reading_head(head, seen.append):
            outputs = self.model(**arguments, **state, **self.wanted.arguments)
        signals = self.wanted.of(outputs, read)
        return signals if head is None else self._from_head(seen[0].clone(), signals.hidden)
