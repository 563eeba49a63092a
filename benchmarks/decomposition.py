"""Interpolative decomposition against column-pivoted QR of scipy: time, identical pivots, extra memory.

    python benchmarks/decomposition.py --out benchmarks/results/decomposition.json

Both see the same single-precision features, as a feed-forward block makes them. scipy works on a double-precision
copy, with `mode="r"` (no Q at all: its cheapest answer to "which columns") and with `mode="economic"`. They take turns
in one run. The second, larger case is ours alone: seconds and the growth of the process while it runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch
from header import machine

from hf_compress.core.saving import write_json
from hf_compress.methods.structured_pruning.decomposition import interpolative_decomposition


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6144)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--keep", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--large_rows", type=int, default=20000, help="0 leaves the large case out.")
    parser.add_argument("--large_width", type=int, default=3072)
    parser.add_argument("--large_keep", type=int, default=1536)
    parser.add_argument("--no_economic", action="store_true")
    parser.add_argument("--out")
    return parser.parse_args()


def features(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """[rows, width] float32: GELU of a correlated mixture with a bias, as behind the first feed-forward projection."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = normal(rows, width // 2)
    mixed = hidden @ normal(width // 2, width) / (width // 2) ** 0.5
    return torch.nn.functional.gelu(mixed + 0.3 * normal(rows, width) + normal(width))


def seconds_of(call: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


class ResidentMemory:
    """The largest growth of the process while a block runs, looked at every few milliseconds."""

    def __enter__(self) -> ResidentMemory:
        self.start = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def _now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._now())


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def against_scipy(args: argparse.Namespace) -> dict:
    matrix = features(args.rows, args.width)
    modes = ["r"] if args.no_economic else ["r", "economic"]

    def qr(mode: str) -> np.ndarray:
        # check_finite costs scipy a pass over the matrix that has nothing to do with the answer.
        return scipy.linalg.qr(matrix.double().numpy(), mode=mode, pivoting=True, check_finite=False)[-1]

    def ours() -> np.ndarray:
        return interpolative_decomposition(matrix, args.keep)[0].numpy()

    calls = {"ours": ours, **{f"scipy_{mode}": (lambda mode=mode: qr(mode)) for mode in modes}}
    ours()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(args.repeats):
        names = list(calls)
        first = repeat % len(names)
        kept = {}
        for name in (*names[first:], *names[:first]):
            taken, kept[name] = seconds_of(calls[name])
            seconds[name].append(taken)
        for name in names:
            # As a claim of this benchmark, not as a check of input: the same columns in the same order.
            assert np.array_equal(kept[name][: args.keep], kept["ours"]), f"{name} has other pivots"
    ratios = {
        name: summary([theirs / own for theirs, own in zip(values, seconds["ours"], strict=True)])
        for name, values in seconds.items()
        if name != "ours"
    }
    return {
        "rows": args.rows, "width": args.width, "keep": args.keep, "repeats": args.repeats, "identical_pivots": True,
        "seconds": {name: summary(values) for name, values in seconds.items()}, "times_faster_than": ratios,
    }  # fmt: skip


def large(args: argparse.Namespace) -> dict:
    matrix = features(args.large_rows, args.large_width)
    with ResidentMemory() as memory:
        seconds, _ = seconds_of(lambda: interpolative_decomposition(matrix, args.large_keep))
    return {
        "rows": args.large_rows, "width": args.large_width, "keep": args.large_keep, "seconds": seconds,
        "extra_peak_bytes": memory.growth, "matrix_bytes": matrix.numel() * matrix.element_size(),
    }  # fmt: skip


def main() -> None:
    args = parse()
    load = os.getloadavg()[0]
    # The large case first: later, memory that the small one freed would hide some of its growth.
    result = {"large": large(args)} if args.large_rows else {}
    result["small"] = against_scipy(args)
    result["environment"] = {
        **machine(load), "numpy": np.__version__, "scipy": scipy.__version__,
    }  # fmt: skip
    small = result["small"]
    print(f"{args.rows} x {args.width}, keep {args.keep}: identical pivots")
    for name, values in small["seconds"].items():
        print(f"  {name:16s} {values['median']:7.3f} s (min {values['min']:.3f}, max {values['max']:.3f})")
    for name, values in small["times_faster_than"].items():
        print(f"  {values['median']:.1f} times faster than {name} ({values['min']:.1f} to {values['max']:.1f})")
    if args.large_rows:
        case = result["large"]
        sizes = (
            f"{case['extra_peak_bytes'] / 1e6:.0f} MB extra beside the matrix of {case['matrix_bytes'] / 1e6:.0f} MB"
        )
        print(f"{case['rows']} x {case['width']}, keep {case['keep']}: {case['seconds']:.2f} s, {sizes}")
    print(f"load average {load:.2f} before, {os.getloadavg()[0]:.2f} after")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
