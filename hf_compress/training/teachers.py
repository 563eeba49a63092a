"""Teachers: where the targets of a student come from. A teacher never enters the student's state, optimizer or DDP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.calibration import accepted_arguments
from hf_compress.training.cache import TeacherCache, example_keys


logger = logging.getLogger(__name__)

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


class FixedTeacher:
    """A frozen model, run without gradients, optionally remembered on disk.

    Args:
        model: Put in eval mode and frozen; its device follows the batches.
        states: Indices into `hidden_states` (0 is the embeddings) that students compare with.
        needs_logits: Whether the outputs are compared.
        dropout: Keep the teacher in train mode.
        cache: Where to remember outputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        states: tuple[int, ...] = (),
        needs_logits: bool = True,
        dropout: bool = False,
        cache: TeacherCache | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).train(dropout)
        self.states = states
        self.needs_logits = needs_logits
        self.cache = cache

    def signals(self, inputs: Mapping[str, Any]) -> Signals:
        """The teacher's outputs for a batch, outside of any graph.

        Args:
            inputs: A batch as the teacher's tokenizer made it; entries its forward does not name are dropped.
        """
        arguments = accepted_arguments(self.model, inputs)
        arguments.pop("labels", None)
        if self.cache is None:
            return self._forward(arguments)
        keys = example_keys(arguments)
        stored = self.cache.read(keys, arguments)
        if stored is None:
            stored = self._forward(arguments)
            self.cache.write(keys, arguments, stored.logits, stored.hidden)
            return stored
        return Signals(*stored)

    def _forward(self, arguments: Mapping[str, Any]) -> Signals:
        if self.model.device != arguments["input_ids"].device:
            self.model.to(arguments["input_ids"].device)
        with torch.inference_mode():
            outputs = self.model(**arguments, output_hidden_states=bool(self.states), return_dict=True)
        # Inference tensors cannot be saved for backward; a copy of what is compared can.
        logits = tuple(t.clone() for t in logits_of(outputs)) if self.needs_logits else ()
        hidden = tuple(outputs.hidden_states[index].clone() for index in self.states)
        return Signals(logits, hidden)
