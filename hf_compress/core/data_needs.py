"""Checks calibration data against what the methods need, once, before a model is changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from hf_compress.core.batches import main_input
from hf_compress.core.examples import Batches, batches_of
from hf_compress.core.processes import all_told, group, several_processes
from hf_compress.core.shares import is_share, share_of


Data = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class DataNeeds:
    """How a method reads calibration data under one config.

    Args:
        passes: How often it reads the data, 0 for not at all. 2 stands for any number above 1: what can be read twice
            can be read again.
        labels: Whether it computes the loss.
        setting: The setting that asks for data, as `field=value`; empty where the method always does.
        adds_up: Whether each of several processes may read a share of the data, because what the method makes of them
            is summed over all (`added_up` in `core/processes.py`). Otherwise every process reads all of them.
    """

    passes: int = 0
    labels: bool = False
    setting: str = ""
    adds_up: bool = False


def require_data(data: Data | None, passes: int, setting: str = "") -> Data:
    """Return calibration data that can be read as often as needed.

    Args:
        data: The data that the user gave.
        passes: How often the data will be read.
        setting: The setting that needs the data, for the message.

    Raises:
        ValueError: If there is no data, or if it is an iterator, which can be read once, and more passes are needed.
    """
    if data is None:
        given = f" with {setting}" if setting else ""
        raise ValueError(
            f"data must be given{given}: this method reads a few hundred examples (an iterable of input dicts)."
        )
    if isinstance(data, Mapping):
        raise ValueError("data must be an iterable of input dicts, got one dict: put it into a list.")
    if passes > 1 and iter(data) is data:
        raise ValueError(
            f"data must be readable {passes} times for these settings, got a one-shot {type(data).__name__}. "
            "Pass a list or a DataLoader."
        )
    return data


def require_batches(seen: int) -> None:
    """Raise `ValueError` if no process has read a batch."""
    if not any(all_told(seen)):
        raise ValueError("data must hold at least one batch, got none.")


def readable_data(model: PreTrainedModel, data: Data | None, passes: int, setting: str = "") -> Data:
    """Turn calibration data, which holds batches or single examples, into batches of tensors.

    Raises:
        ValueError: As `require_data`.
    """
    data = require_data(data, passes, setting)
    if iter(data) is data:
        return batches_of(data, model.config, main_input(model))
    return Batches(data, model.config, main_input(model))


def checked_data(model: PreTrainedModel, data: Data | None, needs: Sequence[DataNeeds]) -> Data | None:
    """Prepare calibration data for all methods of one call, which read it one after the other.

    Args:
        model: The model to compress.
        data: The data that the user gave; ignored if no method reads it.
        needs: The needs of each method.

    Returns:
        Batches of tensors that can be read as often as all methods together need, of several processes that compress
        together the share of this one; None if no method reads data.

    Raises:
        ValueError: If the data cannot be read often enough, are a share that cannot be used, or have no labels
            although a method computes the loss.
    """
    reading = [need for need in needs if need.passes]
    if not reading:
        return None
    batches = readable_data(model, data, sum(need.passes for need in reading), reading[0].setting)
    if several_processes() and is_share(data) and group() is None:
        raise ValueError(
            "data must be given whole to every process, got a loader that gives each a part: one of these methods "
            "does not add up what the processes read. Give the loader before it was prepared."
        )
    computing = [need for need in reading if need.labels]
    if not computing:
        return share_of(batches, data)
    first, batches = _with_first(batches)
    require_batches(first is not None)
    names: list[str] = find_labels(type(model))  # type: ignore[no-untyped-call]  # of transformers
    if isinstance(first, Mapping) and not any(name in first for name in names):
        given = f" with {computing[0].setting}" if computing[0].setting else ""
        raise ValueError(f"data must hold labels{given}, got {sorted(first)}.")
    return share_of(batches, data)


def _with_first(data: Data) -> tuple[Mapping[str, Any] | None, Data]:
    """Take the first batch, and return it with data that still begins with it."""
    if not isinstance(data, Iterator):
        return next(iter(data), None), data
    first = next(data, None)
    return first, data if first is None else itertools.chain([first], data)
