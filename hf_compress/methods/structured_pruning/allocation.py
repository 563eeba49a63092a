"""How many units each sublayer keeps under an exact budget of multiply-accumulates.

The units of every sublayer are ranked, most important first, and each has a priority. The units with the highest
priorities in the whole model are kept until nothing more fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias


# What structured pruning removes from the attention and from the feed-forward part of a layer.
Kind: TypeAlias = Literal["heads", "neurons"]
KINDS: tuple[Kind, Kind] = ("heads", "neurons")


@dataclass(frozen=True)
class Sublayer:
    """The units of one sublayer, ranked, all at one price.

    Args:
        layer: Zero-based layer index.
        kind: What its units are.
        priorities: One for each unit, in rank order, non-increasing: the relative residual before it is kept.
        macs: Multiply-accumulates of one unit.
        minimum: Number of units that stay, whatever they cost.
        bundle: Units are kept in bundles of this many.
    """

    layer: int
    kind: Kind
    priorities: Sequence[float]
    macs: float
    minimum: int
    bundle: int = 1

    @property
    def floor(self) -> int:
        """The minimum, rounded up to whole bundles, at most all units."""
        return min(-(-self.minimum // self.bundle) * self.bundle, len(self.priorities))


def too_small(least: float, full: float, budget: float) -> ValueError:
    """The error that says why a budget cannot be met, and which one can.

    Args:
        least: Multiply-accumulates of what may not be removed.
        full: Those of everything.
        budget: Those that were asked for.
    """
    # Rounded up, so that the number in the message works when it is used.
    reachable = math.ceil(1e4 * least / full) / 1e4
    return ValueError(
        f"mac_ratio must be at least {reachable:.4f} here (what may not be removed costs that much), "
        f"got {budget / full:.4g}. Lower the minima (min_heads, min_neurons), or allow heads and neurons to be pruned."
    )


def full_cost(sublayers: Sequence[Sublayer]) -> float:
    """Multiply-accumulates of all units."""
    return sum(len(s.priorities) * s.macs for s in sublayers)


def check_budget(sublayers: Sequence[Sublayer], budget: float) -> None:
    """Check that the minima cost no more than the budget.

    Raises:
        ValueError: If they do; says what can be reached.
    """
    least = sum(s.floor * s.macs for s in sublayers)
    if least > budget:
        raise too_small(least, full_cost(sublayers), budget)


def allocate(sublayers: Sequence[Sublayer], budget: float) -> tuple[list[int], float]:
    """Keep the units with the highest priorities while they fit.

    Args:
        sublayers: Of all layers, attention first within a layer.
        budget: At most this many multiply-accumulates are used.

    Returns:
        Units kept in each sublayer, and the highest priority of a unit that was not kept (0 if all were).

    Raises:
        ValueError: If the minima do not fit.

    Source:
        One relative tolerance for the whole model is our reading of Flynn et al. 2024 (arXiv 2406.00061), which leaves
        the rule open.

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
        for start in range(sublayer.floor, len(sublayer.priorities), sublayer.bundle)
    ]
    closed: set[int] = set()
    for _, position, start in sorted(bundles):
        sublayer = sublayers[position]
        size = min(sublayer.bundle, len(sublayer.priorities) - start)
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
