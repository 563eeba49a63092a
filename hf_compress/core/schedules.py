"""Sparsity as a function of the number of a pruning update, so that no state has to be saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def _exponential(progress: float, start: float, target: float) -> float:
    # `math.pow` is a float to type checkers; `**` of a negative base would be complex.
    return 1 - (1 - start) * math.pow((1 - target) / (1 - start), progress)


def _cosine(progress: float, start: float, target: float) -> float:
    return start + (target - start) * (1 - math.cos(progress * math.pi / 2))


def _linear(progress: float, start: float, target: float) -> float:
    return start + (target - start) * progress


def _cube(progress: float, start: float, target: float) -> float:
    return start + (target - start) * progress**3


def _oneshot(progress: float, start: float, target: float) -> float:
    return target


# Name -> (progress in [0, 1], first value, last value) -> value.
DECAYS: dict[str, Callable[[float, float, float], float]] = {
    "exp": _exponential,
    "cos": _cosine,
    "linear": _linear,
    "cube": _cube,
    "oneshot": _oneshot,
}


def sparsity_at(decay: str, update: int, num_updates: int, target: float, start: float = 0.0) -> float:
    """Compute the sparsity after a pruning update of a gradual schedule.

    Args:
        decay: A key of `DECAYS`. `exp` removes the same fraction of the remaining units at each pruning update; `cos`
            and `cube` begin slowly.
        update: Zero-based number of the pruning update; number 0 leaves the start value.
        num_updates: Number of the last pruning update; from there on the value is exactly the target.
        target: The last value, in [0, 1).
        start: The first value, in [0, 1).

    Example:
        >>> [round(sparsity_at("exp", t, 2, 0.75), 6) for t in range(3)]
        [0.0, 0.5, 0.75]
    """
    if update >= num_updates:
        return target
    return DECAYS[decay](update / num_updates, start, target)


@dataclass(frozen=True)
class SparsitySchedule:
    """The sparsity that is due at each update of a training.

    Args:
        decay: A key of `DECAYS`; `oneshot` has a single pruning update, at `start`.
        target: Sparsity after the last pruning update.
        start: `global_step` of pruning update 0.
        end: No pruning update comes after this `global_step`.
        frequency: Updates of the training between pruning updates.

    Example:
        >>> schedule = SparsitySchedule("linear", target=0.5, start=2, end=7, frequency=2)
        >>> [schedule.due(global_step) for global_step in range(8)]
        [None, None, 0.0, None, 0.25, None, 0.5, None]
        >>> schedule.in_force(5)
        0.25
    """

    decay: str
    target: float
    start: int
    end: int
    frequency: int = 1

    @property
    def num_updates(self) -> int:
        """Number of the last pruning update."""
        return 0 if self.decay == "oneshot" else max(0, (self.end - self.start) // self.frequency)

    @property
    def last(self) -> int:
        """`global_step` of the last pruning update."""
        return self.start + self.num_updates * self.frequency

    def due(self, global_step: int) -> float | None:
        """The sparsity of the pruning update that comes before this optimizer step; None if there is none."""
        update, rest = divmod(global_step - self.start, self.frequency)
        if rest or not 0 <= update <= self.num_updates:
            return None
        return sparsity_at(self.decay, update, self.num_updates, self.target)

    def in_force(self, global_step: int) -> float:
        """The sparsity that earlier pruning updates have reached."""
        if global_step <= self.start:
            return 0.0
        update = min((global_step - 1 - self.start) // self.frequency, self.num_updates)
        return sparsity_at(self.decay, update, self.num_updates, self.target)
