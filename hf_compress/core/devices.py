"""Chooses the device of models that run without a Trainer."""

from __future__ import annotations

import torch


def chosen_device(name: str = "auto") -> torch.device:
    """Find the device with a name.

    Args:
        name: `auto`, or a torch device such as `cuda:1`. `auto` is the accelerator if there is one that computes in
            double precision (Apple's does not), else the CPU.

    Raises:
        ValueError: If this machine has no such device.

    Example:
        >>> chosen_device("cpu")
        device(type='cpu')
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found if found is not None and found.type != "mps" else torch.device("cpu")
    counts = {"cpu": 1, **({found.type: torch.accelerator.device_count()} if found else {})}
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        raise ValueError(f"device must be auto or one of this machine ({', '.join(counts)}), got {name!r}.")
    return device
