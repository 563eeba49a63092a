"""Compresses a saved model layer by layer and ends itself, as if killed, at a chosen moment; tests start it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import hf_compress as hc
from hf_compress.core import saving, unfinished
from hf_compress.core.driver import LayerWalk
from hf_compress.core.layer_store import LayerStore


PRUNING = {"mac_ratio": 0.6, "order": "sequential", "min_neurons": 4}


def calibration(vocabulary: int = 99, count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, vocabulary, (8, 24), generator=generator)} for _ in range(count)]


def _dying(owner: type, name: str, moments: list[int]) -> None:
    """Count the calls of a function, and end the process before the call with the number that is left at the end."""
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        moments[0] -= 1
        if moments[0] < 0:
            os._exit(9)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def compress(source: str, target: str, moment: int) -> None:
    """Prune; end before the `moment`-th step of loading, measuring, writing or moving. A negative one: never."""
    torch.set_num_threads(1)
    if moment >= 0:
        left = [moment]
        for owner, name in (
            (LayerStore, "load_"), (LayerStore, "drop_"), (LayerWalk, "observe"), (unfinished, "write_json"),
            (saving.os, "replace"), (saving.os, "unlink"), (saving, "save_file"),
        ):  # fmt: skip
            _dying(owner, name, left)
    hc.compress_folder(source, target, hc.StructuredPruningConfig(**PRUNING), data=calibration(), device="cpu")


def measure(source: str, target: str, told: str) -> None:
    """Prune, and write how much memory that needed at most, in bytes, beyond what was needed before."""
    torch.set_num_threads(1)
    # Layers of equal widths, because the largest of many would be larger than that of few.
    config = hc.StructuredPruningConfig(**PRUNING | {"ridge": 0.01, "allocation": "uniform"})
    # Not `getrusage`: a new program inherits the peak of the one that started it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    hc.compress_folder(source, target, config, data=calibration(count=2), device="cpu")
    Path(told).write_text(str(_peak() - before))


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
