"""Teachers: where the targets of a student come from. A teacher never enters the student's state, optimizer or DDP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import accepted_arguments
from hf_compress.core.forward_state import forward_state
from hf_compress.training.cache import TeacherCache
from hf_compress.training.fingerprints import example_keys


# Output fields that are compared with the student's, by task head.
_LOGIT_FIELDS = (("start_logits", "end_logits"), ("logits",))


@dataclass(frozen=True)
class Signals:
    """What a model computed that can be compared.

    Args:
        logits: One tensor, or two for question answering.
        hidden: The requested hidden states, [B, S, D] each.
    """

    logits: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]


def logits_of(outputs: Any) -> tuple[Tensor, ...]:
    """The logits of a model output, start and end logits for question answering.

    Raises:
        ValueError: If it has none (a base model without a task head).
    """
    for fields in _LOGIT_FIELDS:
        if all(getattr(outputs, field, None) is not None for field in fields):
            return tuple(getattr(outputs, field) for field in fields)
    raise ValueError(f"The model must return logits, got {type(outputs).__name__} with {', '.join(outputs.keys())}.")


def signals_of(outputs: Any, states: tuple[int, ...], needs_logits: bool) -> Signals:
    """What of a model's outputs is compared, cut from its graph.

    The copies also turn inference tensors, which cannot be saved for a backward pass, into ordinary ones.
    """
    logits = tuple(t.detach().clone() for t in logits_of(outputs)) if needs_logits else ()
    return Signals(logits, tuple(outputs.hidden_states[index].detach().clone() for index in states))


@dataclass(frozen=True)
class MicroBatch:
    """Where in the training a micro-batch stands.

    Args:
        step: Finished updates of the student.
        index: Of the micro-batch in its update.
        length: Micro-batches in this update; the last one of an epoch may have fewer.
        accumulation: Micro-batches in an ordinary update.
        updates_per_epoch: Updates of the student in an epoch.
    """

    step: int
    index: int
    length: int
    accumulation: int
    updates_per_epoch: int


class Teacher:
    """Where targets come from. What it needs to go on after a crash is written by `save` and read by `load`.

    Args:
        model: The network that computes the targets at this moment.
        states: Indices into `hidden_states` (0 is the embeddings) that students compare with.
        needs_logits: Whether the outputs are compared.
    """

    cache: TeacherCache | None = None

    def __init__(self, model: PreTrainedModel, states: tuple[int, ...] = (), needs_logits: bool = True) -> None:
        self.model = model
        self.states = states
        self.needs_logits = needs_logits
        self.place: MicroBatch | None = None

    def begin(self, place: MicroBatch) -> None:
        """Called before each training micro-batch; without it, `signals` is asked by an evaluation."""
        self.place = place

    def signals(self, inputs: Mapping[str, Any]) -> Signals:
        """The targets for a batch, outside of any graph.

        Args:
            inputs: A batch as the teacher's tokenizer made it, with labels where there are any; entries its forward
                does not name are dropped.
        """
        raise NotImplementedError

    def end(self, place: MicroBatch) -> None:
        """Called after the student's backward pass of that micro-batch."""
        self.place = None

    def save(self, folder: Path, process: int = 0) -> None:
        """Write whatever changes during training into an existing checkpoint.

        Args:
            folder: For the teacher's files.
            process: The number of this one; the first writes what all share, each what is its own.
        """

    def load(self, folder: Path, process: int = 0) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: If it is not there.
        """


class FixedTeacher(Teacher):
    """A frozen model, run without gradients, optionally remembered on disk.

    Args:
        model: Put in eval mode and frozen; its device follows the batches.
        states: Indices into `hidden_states` (0 is the embeddings) that students compare with.
        needs_logits: Whether the outputs are compared.
        dropout: Run the teacher in train mode during training; evaluations are never random.
        cache: Where to remember outputs, as the teacher gives them.
        label_order: For each of the student's labels its place among the teacher's, see `label_order`. None: the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        states: tuple[int, ...] = (),
        needs_logits: bool = True,
        dropout: bool = False,
        cache: TeacherCache | None = None,
        label_order: list[int] | None = None,
    ) -> None:
        super().__init__(model.requires_grad_(False).eval(), states, needs_logits)
        self.dropout = dropout
        self.cache = cache
        self.label_order = label_order

    def signals(self, inputs: Mapping[str, Any]) -> Signals:
        arguments = accepted_arguments(self.model, inputs)
        arguments.pop("labels", None)
        given = self._forward(arguments) if self.cache is None else self._remembered(arguments)
        if self.label_order is None:
            return given
        return Signals(tuple(logits[..., self.label_order] for logits in given.logits), given.hidden)

    def _remembered(self, arguments: Mapping[str, Any]) -> Signals:
        keys = example_keys(arguments)
        if (stored := self.cache.read(keys, arguments)) is None:
            computed = self._forward(arguments)
            self.cache.write(keys, arguments, computed.logits, computed.hidden)
            # A text that came before keeps its first outputs: a run that was killed after this batch reads the same.
            stored = self.cache.read(keys, arguments)
        return Signals(*stored)

    def _forward(self, arguments: Mapping[str, Any]) -> Signals:
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        if self.model.device != device:
            self.model.to(device)
        self.model.train(self.dropout and self.place is not None)
        if self.states:
            # A classifier that drops tokens leaves out what its head does not read; here it is compared.
            arguments = {**arguments, **forward_state(self.model)}
        with torch.inference_mode():
            outputs = self.model(**arguments, output_hidden_states=bool(self.states), return_dict=True)
        return signals_of(outputs, self.states, self.needs_logits)
