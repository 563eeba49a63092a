"""Times several ways to do the same work in turns, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch


Run = Callable[[], object]


def seconds_of(run: Run, device: torch.device) -> float:
    """Measure the wall-clock seconds of one run on a device."""
    # An accelerator works asynchronously: wait for it before the clock starts and before it stops.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def time_in_turns(
    runs: Mapping[str, Sequence[Run]],
    devices: Mapping[str, torch.device],
    repeats: int,
    warmup: int,
    before: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Time competitors that take turns, run by run.

    Args:
        runs: Name of a competitor -> its runs, all of which are done in each round; equally many for all competitors.
        devices: Name -> the device that it runs on.
        repeats: Timed rounds.
        warmup: Rounds before them that are not timed.
        before: Called with the name before each run, outside the clock.

    Returns:
        Name -> seconds of each timed round; entry i of two competitors was measured in the same round.

    Example:
        >>> taken = time_in_turns({"sum": [lambda: sum(range(9))]}, {"sum": torch.device("cpu")}, repeats=3, warmup=1)
        >>> len(taken["sum"])
        3
    """
    names = list(runs)
    num_runs = len(runs[names[0]])

    def round_of(number: int) -> dict[str, float]:
        seconds = dict.fromkeys(names, 0.0)
        for index in range(num_runs):
            # The order rotates, because the first competitor finds other caches than the last.
            first = (number * num_runs + index) % len(names)
            for name in (*names[first:], *names[:first]):
                if before is not None:
                    before(name)
                seconds[name] += seconds_of(runs[name][index], devices[name])
        return seconds

    for number in range(warmup):
        round_of(number)
    rounds = [round_of(number) for number in range(repeats)]
    return {name: [seconds[name] for seconds in rounds] for name in names}
