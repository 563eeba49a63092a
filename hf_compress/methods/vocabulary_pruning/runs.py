"""Ascending whole numbers as a short text of runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence


_RUNS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def runs_of(numbers: Sequence[int]) -> str:
    """Write ascending numbers as their runs.

    Example:
        >>> runs_of([0, 1, 2, 7, 9, 10])
        '0-2,7,9-10'
    """
    # Within a run, number and place grow together.
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def numbers_of(runs: str) -> list[int]:
    """Read what `runs_of` has written.

    Raises:
        ValueError: If the text is no list of runs.

    Example:
        >>> numbers_of("0-2,7,9-10")
        [0, 1, 2, 7, 9, 10]
    """
    if not _RUNS.fullmatch(runs):
        raise ValueError(f"runs of numbers must look like '0-2,7,9-10', got {runs[:40]!r}.")
    ends = [[int(end) for end in run.split("-")] for run in runs.split(",")]
    return [number for run in ends for number in range(run[0], run[-1] + 1)]
