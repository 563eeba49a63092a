"""The loss of a training as a sum of named terms, and the averages of them that are logged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from hf_compress.training.averages import Averages


class LossComposer:
    """Adds the terms of a loss up, and averages what was seen of each: in training, and in each evaluation."""

    def __init__(self) -> None:
        self.averages = {"train": Averages(), "eval": Averages()}
        self.evaluates = False

    def total(self, terms: Mapping[str, Tensor], training: bool, num_examples: int, update: int) -> Tensor:
        """The sum of the terms of a micro-batch.

        Args:
            terms: Name -> weighted scalar.
            training: Whether the student is trained on it, or evaluated.
            num_examples: In the micro-batch.
            update: The number of finished updates, for the error.

        Raises:
            ValueError: If it is NaN or infinite.
        """
        loss = torch.stack(list(terms.values())).sum()
        # On an accelerator this would wait for the device at every step; there `require_finite` checks the averages.
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            raise _not_finite({name: float(value.detach()) for name, value in terms.items()}, update)
        if training or len(terms) > 1:
            # As `Trainer` weighs losses: steps of a training alike, batches of an evaluation by their examples.
            weight = 1 if training else num_examples
            for name, value in terms.items():
                self._seen(training).add(f"loss/{name}", value, weight)
        return loss

    def note(self, measures: Mapping[str, tuple[Tensor, Tensor]], training: bool) -> None:
        """Average measures of a micro-batch.

        Args:
            measures: Name -> scalar and scalar that it is relative to.
            training: Whether the student is trained on it, or evaluated.
        """
        prefix = "prune/" if training else ""
        for name, parts in measures.items():
            self._seen(training).add_quotient(f"{prefix}{name}", *parts)

    def note_each(self, values: Mapping[str, Tensor]) -> None:
        """Average what a training has seen.

        Args:
            values: Name -> [N] values.
        """
        for name, several in values.items():
            for value in several:
                self.averages["train"].add(name, value)

    def _seen(self, training: bool) -> Averages:
        return self.averages["train" if training else "eval"]

    def begin_training(self) -> None:
        """Forget what a training that was given up, such as a trial of a search, has left."""
        self.averages["train"].clear()

    def logged(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages of the training since the last call, over all processes."""
        return self.averages["train"].take(accelerator)

    def begin_evaluation(self) -> None:
        """Forget what an evaluation before has left."""
        self.averages["eval"].clear()

    def evaluated(self, accelerator: Accelerator, prefix: str) -> dict[str, float]:
        """The averages of an evaluation, over all processes, their names with its prefix."""
        return {f"{prefix}_{name}": value for name, value in self.averages["eval"].take(accelerator).items()}

    def require_finite(self, logs: Mapping[str, float], update: int) -> None:
        """Raise `ValueError` when a term among the values that are to be logged is NaN or infinite."""
        terms = {key.rpartition("/")[2]: value for key, value in logs.items() if "loss/" in key}
        if any(not torch.isfinite(torch.tensor(value)) for value in terms.values()):
            raise _not_finite(terms, update)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """While the block runs, what is logged is that of an evaluation."""
        self.evaluates = True
        try:
            yield
        finally:
            self.evaluates = False


def batch_size_of(inputs: Mapping[str, Any]) -> int:
    """The number of examples in a batch; 1 where nothing says."""
    find: Any = find_batch_size
    return find(inputs) or 1


def _not_finite(terms: Mapping[str, float], update: int) -> ValueError:
    listed = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    return ValueError(
        f"The loss must be finite, got {listed} at step {update}. "
        "Lower learning_rate, check the data, or train in fp32 or bf16 instead of fp16."
    )
