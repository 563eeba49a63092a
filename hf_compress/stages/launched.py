"""Stages without a training under `torchrun` or `accelerate launch`: the processes find each other."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import PartialState

from hf_compress.core.launcher import check_launcher


def join_processes(device: str) -> None:
    """Join the processes that a launcher started together with this one; nothing happens where it is alone.

    Args:
        device: As `chosen_device` takes it. With `auto`, each process gets an accelerator of its own.

    Raises:
        ValueError: If all processes are to share one accelerator, or the environment only half says that there are
            several.
    """
    check_launcher()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    wanted = None if device == "auto" else torch.device(device)
    if wanted is not None and wanted.index is not None:
        raise ValueError(f"device must be left out under several processes, got {device!r} for all of them.")
    PartialState(cpu=not torch.accelerator.is_available() or (wanted is not None and wanted.type == "cpu"))
