"""The signals that one model can learn from another: its outputs and its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from hf_compress.core.pooling import Pooling
from hf_compress.training.language_head import LanguageHead
from hf_compress.training.sentence_vectors import sentence_vectors
from hf_compress.training.token_losses import LogitsOf


# A batch as a collator made it: the names of a model's inputs -> tensors.
Batch = Mapping[str, Any]

# Output fields that are compared with the student's, by task head.
_LOGIT_FIELDS = (("start_logits", "end_logits"), ("logits",))


@dataclass(frozen=True)
class Signals:
    """The outputs and hidden states of a model for one batch.

    Args:
        logits: One tensor, or two for question answering; the [B, D] vectors of a sentence encoder. Empty when they
            were not requested, or `head` makes them.
        hidden: The requested hidden states, [B, S, D] each.
        head_inputs: [B, S, D] what a language model's head reads; None where logits are given.
        head: Makes logits of them; not copied.
    """

    logits: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    head_inputs: Tensor | None = None
    head: LanguageHead | None = None

    def with_logits(self) -> Signals:
        """These signals, with the logits of all tokens in memory."""
        if self.head is None or self.head_inputs is None:
            return self
        with torch.no_grad():
            return Signals((self.head.logits(self.head_inputs),), self.hidden)

    def token_logits(self, places: Tensor, shape: torch.Size) -> LogitsOf:
        """The function that gives the logits of the tokens at some places, one chunk after the other.

        Args:
            places: [N] indices into all B * S positions.
            shape: [B, S] of the student's batch.

        Raises:
            ValueError: If the teacher has read other tokens.
        """
        (given,) = self.logits if self.head_inputs is None else (self.head_inputs,)
        if given.shape[:2] != shape:
            raise ValueError(f"The teacher must answer {tuple(shape)} tokens, got {tuple(given.shape[:2])}.")
        hidden, head = given.flatten(0, 1), self.head
        if head is None:
            return lambda tokens: hidden[places[tokens]]
        with torch.no_grad():
            weight, bias = head.weights()
        return lambda tokens: head.shaped(F.linear(hidden[places[tokens]].to(weight.dtype), weight, bias))


# Runs a model on a batch, without gradients and without dropout, and returns its signals.
SignalsOf = Callable[[Batch], Signals]


@dataclass(frozen=True)
class WantedSignals:
    """Selects the outputs and hidden states of a model that are compared.

    Args:
        states: Indices into `hidden_states`, where 0 is the embeddings.
        logits: Whether the outputs are compared.
        head_inputs: Whether a teacher may give what its head reads instead of logits, which are a hundred times as
            large. One whose head changes before its answers are used may not.
        vectors: How a model without a head makes the vectors that are compared in place of logits.
    """

    states: tuple[int, ...] = ()
    logits: bool = True
    head_inputs: bool = False
    vectors: Pooling | None = None

    @property
    def arguments(self) -> dict[str, bool]:
        """The arguments that make a model's forward return them."""
        return {"output_hidden_states": bool(self.states), "return_dict": True}

    def of(self, outputs: ModelOutput, inputs: Mapping[str, Any]) -> Signals:
        """Take the wanted signals from a model's outputs, detached.

        The copies also turn inference tensors, which cannot be saved for a backward pass, into ordinary ones.

        Args:
            outputs: Of a model.
            inputs: What it has read.

        Raises:
            ValueError: If the model has no logits and they are wanted.
        """
        logits = tuple(t.detach().clone() for t in self._compared(outputs, inputs)) if self.logits else ()
        return Signals(logits, tuple(outputs["hidden_states"][index].detach().clone() for index in self.states))

    def _compared(self, outputs: ModelOutput, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if self.vectors is None:
            return logits_of(outputs)
        return (sentence_vectors(outputs, self.vectors, inputs),)


def logits_of(outputs: ModelOutput) -> tuple[Tensor, ...]:
    """The logits of a model output, start and end logits for question answering.

    Raises:
        ValueError: If it has none (a base model without a task head).
    """
    for fields in _LOGIT_FIELDS:
        if all(getattr(outputs, field, None) is not None for field in fields):
            return tuple(getattr(outputs, field) for field in fields)
    raise ValueError(f"The model must return logits, got {type(outputs).__name__} with {', '.join(outputs.keys())}.")


class StudentSignals:
    """Computes the signals of a student before its update: no dropout, no gradients, no labels.

    Args:
        model: The student as its trainer calls it.
        read: Gives the entries of a batch that it reads.
        wanted: Which of its signals are returned.
    """

    def __init__(
        self, model: nn.Module, read: Callable[[Batch], Mapping[str, Any]], wanted: WantedSignals | None = None
    ) -> None:
        self.model = model
        self.read = read
        self.wanted = wanted or WantedSignals()

    def __call__(self, batch: Batch) -> Signals:
        inputs = {name: value for name, value in self.read(batch).items() if name != "labels"}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self.wanted.of(self.model(**inputs, **self.wanted.arguments), inputs)
        finally:
            self.model.train(training)
