"""How many units each sublayer keeps under an exact budget of multiply-accumulates.

A *sublayer* is the attention or the feed-forward half of a layer; its units are ranked, most important first, and
every unit has a priority. The most deserving units of all sublayers are kept until nothing more fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sublayer:
    """A ranked list of units of one price.

    Args:
        layer: Zero-based layer index.
        kind: `heads` or `neurons`.
        priorities: One for each unit, in rank order, non-increasing: the relative residual before it is kept.
        macs: Multiply-accumulates of one unit.
        minimum: Units that stay whatever they cost.
        step: Units are kept in bundles of this many.
    """

    layer: int
    kind: str
    priorities: Sequence[float]
    macs: float
    minimum: int
    step: int = 1

    @property
    def floor(self) -> int:
        """The minimum, rounded up to whole bundles, at most all units."""
        return min(-(-self.minimum // self.step) * self.step, len(self.priorities))


def check_budget(sublayers: Sequence[Sublayer], budget: float) -> None:
    """Raise `ValueError` when even the minima cost more than the budget; says what can be reached."""
    full = sum(len(s.priorities) * s.macs for s in sublayers)
    least = sum(s.floor * s.macs for s in sublayers)
    if least > budget:
        # Rounded up, so that the number in the message works when it is used.
        reachable = math.ceil(1e4 * least / full) / 1e4
        raise ValueError(
            f"mac_ratio must be at least {reachable:.4f} here (what may not be removed costs that much), "
            f"got {budget / full:.4f}. Allow pruning of heads and of neurons, or lower min_heads and min_neurons."
        )


def allocate(sublayers: Sequence[Sublayer], budget: float) -> tuple[list[int], float]:
    """Keep the units with the highest priorities while they fit.

    Args:
        sublayers: All halves of all layers, attention first within a layer.
        budget: Multiply-accumulates, at most this many are used.

    Returns:
        Units kept in each sublayer, and the highest priority of a unit that was not kept (0 if all were).

    Raises:
        ValueError: If the minima do not fit.

    Source:
        STAT specification 4.3, the rule of one global tolerance.

    Example:
        >>> allocate([Sublayer(0, "heads", [1.0, 0.1], 3.0, 1), Sublayer(0, "neurons", [1.0, 0.5], 2.0, 1)], 8.0)
        ([1, 2], 0.1)
    """
    check_budget(sublayers, budget)
    kept = [s.floor for s in sublayers]
    left = budget - sum(k * s.macs for k, s in zip(kept, sublayers, strict=True))
    # Rounding of sums of large floats must not cost a unit that exactly fits.
    slack = 1e-9 * budget
    bundles = [
        (-sublayer.priorities[start], position, start)
        for position, sublayer in enumerate(sublayers)
        for start in range(sublayer.floor, len(sublayer.priorities), sublayer.step)
    ]
    closed: set[int] = set()
    for _, position, start in sorted(bundles):
        sublayer = sublayers[position]
        size = min(sublayer.step, len(sublayer.priorities) - start)
        if position in closed:
            continue
        if size * sublayer.macs > left + slack:
            # Ranks form a prefix: once a unit does not fit, later ones of the same sublayer may not jump it.
            closed.add(position)
            continue
        kept[position] += size
        left -= size * sublayer.macs
    missed = [s.priorities[k] for k, s in zip(kept, sublayers, strict=True) if k < len(s.priorities)]
    return kept, max(missed, default=0.0)
