"""What stands above the numbers of a result file: arguments without the places of one machine, commit, hardware."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

from hf_compress.report.machine import environment


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """A command's arguments; of models and data the name is kept and the folder is not."""
    kept = {name: value for name, value in vars(args).items() if name not in ("out", "plot", "work_dir")}
    for name in ("model", "data_dir"):
        if name in kept:
            kept[name] = Path(kept[name]).name
    if "models" in kept:
        kept["models"] = [Path(name).name for name in kept["models"]]
    return kept


def commit() -> str:
    """The short hash of the checkout in the working directory."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def allocator() -> dict[str, str]:
    """The variables that were set for how the C library keeps freed memory: long CPU batches depend on them."""
    names = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
    return {name: os.environ[name] for name in names if name in os.environ}


def machine(load_before: float | None = None) -> dict[str, Any]:
    """The hardware, its instruction sets and versions; with the load before a measurement, also that after it."""
    place = {**environment(), "allocator": allocator()}
    if load_before is None:
        return place
    after = place.pop("load_average_1min")
    return {**place, "load_average_before": round(load_before, 2), "load_average_after": after}
