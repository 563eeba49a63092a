"""Where models run that no Trainer places."""

from __future__ import annotations

import torch


def chosen_device(name: str = "auto") -> torch.device:
    """The device of that name.

    Args:
        name: `auto` is the accelerator where there is one that computes in double precision (Apple's does not), else
            the CPU. Or a device of torch, such as `cuda:1`.

    Raises:
        ValueError: If there is no such device here.

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
