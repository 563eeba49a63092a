"""A model's answers to the examples of a task, and their metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt


class Answers(ABC):
    """A model's answers, one for each example of a split, beside the right ones."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The metrics of the task over these examples."""

    @abstractmethod
    def at(self, examples: npt.NDArray[np.int64]) -> Answers:
        """The answers to some examples; one may be named more than once, as a bootstrap draws them."""

    def right(self) -> npt.NDArray[np.bool_] | None:
        """[examples] whether each answer is right; None where an answer is more or less good."""
        return None

    def only_answer(self) -> str | None:
        """The class that the model answers to all of several examples; None where answers differ or are no classes."""
        return None

    def by_class(self) -> list[dict[str, Any]] | None:
        """`name`, `examples`, `precision`, `recall` and `f1` of each class; None where answers are no classes."""
        return None

    def describe(self, example: int) -> tuple[str, str]:
        """The right answer and the model's answer, in words; only if `right` is not None."""
        raise NotImplementedError
