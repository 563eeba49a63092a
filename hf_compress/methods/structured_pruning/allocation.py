"""Decides how many units each sublayer keeps under an exact budget of multiply-accumulates.

The units of every sublayer are ranked, most important first, and each has a priority. The units with the highest
priorities in the whole model are kept until nothing more fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias


# What structured pruning removes from the attention and from the feed-forward part of a layer.
UnitKind: TypeAlias = Literal["heads", "neurons"]
UNIT_KINDS: tuple[UnitKind, UnitKind] = ("heads", "neurons")


@dataclass(frozen=True)
class Sublayer:
    """The ranked units of one sublayer; all of them cost the same.

    Args:
        layer: Zero-based layer index.
        kind: Whether its units are attention heads or neurons.
        priorities: [units] in rank order, non-increasing: the share of the energy (squared norm) that is unexplained
            before the unit is kept.
        macs: Multiply-accumulates of one unit.
        minimum: How many units stay at least, whatever they cost.
        bundle: Units are kept in bundles of this many.
    """

    layer: int
    kind: UnitKind
    priorities: Sequence[float]
    macs: float
    minimum: int
    bundle: int = 1

    @property
    def floor(self) -> int:
        """The minimum, rounded up to whole bundles, at most all units."""
        return min(-(-self.minimum // self.bundle) * self.bundle, len(self.priorities))


def budget_too_small(least: float, full: float, budget: float) -> ValueError:
    """Make the error for a budget that cannot be met; it names the smallest one that can.

    Args:
        least: Multiply-accumulates of the units that must stay.
        full: Those of all units.
        budget: Those that were asked for.
    """
    # Rounded up, so that the number in the message works when it is used.
    reachable = math.ceil(1e4 * least / full) / 1e4
    return ValueError(
        f"mac_ratio must be at least {reachable:.4f} here (the units that must stay cost that much), "
        f"got {budget / full:.4g}. Lower the minima (min_heads, min_neurons), or allow heads and neurons to be pruned."
    )


def full_cost(sublayers: Sequence[Sublayer]) -> float:
    """Multiply-accumulates of all units."""
    return sum(len(s.priorities) * s.macs for s in sublayers)


def check_budget(sublayers: Sequence[Sublayer], budget: float) -> None:
    """Check that the minima cost no more than the budget.

    Raises:
        ValueError: If they cost more; names the smallest `mac_ratio` that can be met.
    """
    least = sum(s.floor * s.macs for s in sublayers)
    if least > budget:
        raise budget_too_small(least, full_cost(sublayers), budget)


def shared_cost(values: Sequence[float], macs: float, fixed: float) -> list[float]:
    """Divide what each unit of a sublayer is worth by its cost; the first unit also brings a fixed cost.

    The units that together are worth most for their cost, that of the sublayer included, share it; they stay or go
    together.

    Args:
        values: [units] in rank order, non-increasing: what each is worth.
        macs: Multiply-accumulates of one unit.
        fixed: What the sublayer costs beside its units, in multiply-accumulates.

    Returns:
        [units], non-increasing.

    Example:
        >>> shared_cost([8.0, 6.0, 1.0], 1.0, 0.0), shared_cost([8.0, 6.0, 1.0], 1.0, 5.0)
        ([8.0, 6.0, 1.0], [2.0, 2.0, 1.0])
    """
    ratios = [value / macs for value in values]
    averages = [total / (kept * macs + fixed) for kept, total in enumerate(itertools.accumulate(values), 1)]
    best = max(averages, default=0.0)
    together = averages.index(best) + 1 if averages and fixed else 0
    return [best] * together + ratios[together:]


def allocate(sublayers: Sequence[Sublayer], budget: float) -> tuple[list[int], float]:
    """Keep the units with the highest priorities while they fit.

    Args:
        sublayers: Those of all layers; attention comes first within a layer.
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
    # A unit that fits exactly must not be lost to the rounding of large sums.
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
            # The kept units are the first of the ranking: once a unit does not fit, no later one is kept.
            closed.add(position)
            continue
        kept[position] += size
        left -= size * sublayer.macs
    missed = [s.priorities[k] for k, s in zip(kept, sublayers, strict=True) if k < len(s.priorities)]
    return kept, max(missed, default=0.0)
