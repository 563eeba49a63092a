"""The loss of a training as a sum of named terms, and the averages that are logged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from hf_compress.training.averages import Averages


# The whole loss of an evaluation.
_EVALUATED = "loss"


class LossComposer:
    """Adds up the terms of a loss, and averages each of them in training and in each evaluation."""

    def __init__(self) -> None:
        self.averages = {"train": Averages(), "eval": Averages()}
        self.evaluating = False
        self._counting = True

    def total(self, terms: Mapping[str, Tensor], training: bool, num_examples: int, update: int) -> Tensor:
        """Add up the terms of a micro-batch, and note them for the averages.

        Args:
            terms: Name -> weighted scalar.
            training: Whether the student is trained on the batch; otherwise it is evaluated.
            num_examples: Number of examples in the micro-batch.
            update: The number of finished updates, for the error.

        Raises:
            ValueError: If the sum is NaN or infinite.
        """
        loss = torch.stack(list(terms.values())).sum()
        # On an accelerator this would wait for the device at every batch; there `require_finite` checks the averages.
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            raise _not_finite({name: float(value.detach()) for name, value in terms.items()}, update)
        if not self._counting:
            return loss
        if not training:
            self._seen(training).add(_EVALUATED, loss, num_examples)
        if training or len(terms) > 1:
            # As in `Trainer`: micro-batches of a training count alike, batches of an evaluation by their examples.
            weight = 1 if training else num_examples
            for name, value in terms.items():
                self._seen(training).add(f"loss/{name}", value, weight)
        return loss

    def note(self, measures: Mapping[str, tuple[Tensor, Tensor]], training: bool) -> None:
        """Add the measures of a micro-batch to the averages.

        Args:
            measures: Name -> a scalar, and the scalar that it is divided by in the end.
            training: Whether the student is trained on the batch; otherwise it is evaluated.
        """
        prefix = "prune/" if training else ""
        for name, parts in measures.items() if self._counting else ():
            self._seen(training).add_quotient(f"{prefix}{name}", *parts)

    def note_each(self, values: Mapping[str, Tensor]) -> None:
        """Add values to the averages of the training.

        Args:
            values: Name -> [N] values.
        """
        for name, several in values.items():
            for value in several:
                self.averages["train"].add(name, value)

    def _seen(self, training: bool) -> Averages:
        return self.averages["train" if training else "eval"]

    def begin_training(self) -> None:
        """Clear the averages of an earlier training that did not end, such as a pruned trial of a search."""
        self.averages["train"].clear()

    def logged(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the averages of the training since the last call, over all processes."""
        return self.averages["train"].take(accelerator)

    def begin_evaluation(self) -> None:
        """Clear the averages of an earlier evaluation."""
        self.averages["eval"].clear()

    def evaluated(self, accelerator: Accelerator, prefix: str) -> dict[str, float]:
        """Return the averages of an evaluation over all processes, with its prefix before each name.

        Of several processes the loss is among them: `Trainer` counts rows twice that fill up the last batches.
        """
        found = self.averages["eval"].take(accelerator)
        if accelerator.num_processes == 1:
            found.pop(_EVALUATED, None)
        return {f"{prefix}_{name}": value for name, value in found.items()}

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what is computed inside the `with` statement out of all averages."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def require_finite(self, logs: Mapping[str, float], update: int) -> None:
        """Raise `ValueError` if a loss term among the values to be logged is NaN or infinite."""
        terms = {key.rpartition("/")[2]: value for key, value in logs.items() if "loss/" in key}
        if any(not torch.isfinite(torch.tensor(value)) for value in terms.values()):
            raise _not_finite(terms, update)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Mark what is logged inside the `with` statement as an evaluation's."""
        self.evaluating = True
        try:
            yield
        finally:
            self.evaluating = False


def batch_size_of(inputs: Mapping[str, Any]) -> int:
    """The number of examples in a batch; 1 where it cannot be told."""
    find: Any = find_batch_size
    return find(inputs) or 1


def _not_finite(terms: Mapping[str, float], update: int) -> ValueError:
    listed = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    return ValueError(
        f"The loss must be finite, got {listed} at update {update}. "
        "Lower learning_rate, check the data, or train in fp32 or bf16 instead of fp16."
    )
