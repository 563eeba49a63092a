"""Which part of the calibration data a process reads when several compress a model together.

Batch i belongs to process i modulo their number. Loaders that accelerate prepared, and those with a
`DistributedSampler`, give each process its own part already; what they repeat to make the parts equally long is left
out, so that every example counts once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from hf_compress.core.processes import Group, group


Batch: TypeAlias = Mapping[str, Any]
Data: TypeAlias = Iterable[Batch]


def _distributed_sampler(data: Any) -> DistributedSampler[Any] | None:
    if not isinstance(data, DataLoader):
        return None
    # A loader with a batch sampler of its own has a sampler that nothing reads.
    found = getattr(data.batch_sampler, "sampler", data.sampler)
    return found if isinstance(found, DistributedSampler) else None


def is_share(data: Any) -> bool:
    """Whether data give each process a part of its own.

    Raises:
        ValueError: If examples are repeated in a way that cannot be undone.
    """
    if isinstance(data, DataLoaderDispatcher):
        return True
    if isinstance(data, DataLoader) and isinstance(data.dataset, IterableDatasetShard):
        raise ValueError(
            "data must not be a stream that accelerator.prepare split: it repeats examples at its end. Give the "
            "loader itself (each process takes its share), or prepare it with dispatch_batches=True."
        )
    return isinstance(data, DataLoaderShard) or _distributed_sampler(data) is not None


def share_of(batches: Data, given: Any) -> Data:
    """The part of the batches that this process reads; all of them where it is alone.

    Args:
        batches: Of tensors, as `batches_of` makes them of the data.
        given: The data that the user gave.

    Returns:
        An iterator if `batches` is one; otherwise something that can be read again.
    """
    ours = group()
    if ours is None:
        return batches
    if isinstance(batches, Iterator):
        return _share(batches, given, ours)
    return _Share(batches, given, ours)


def batch_number(position: int) -> int:
    """The number, among the batches of all processes, of this process's batch at a position."""
    ours = group()
    return position if ours is None else position * ours.count + ours.number


class _Share:
    """A share of data that can be read again."""

    def __init__(self, batches: Data, given: Any, ours: Group) -> None:
        self._batches, self._given, self._group = batches, given, ours

    def __iter__(self) -> Iterator[Batch]:
        return _share(self._batches, self._given, self._group)


def _share(batches: Data, given: Any, ours: Group) -> Iterator[Batch]:
    if isinstance(given, DataLoaderDispatcher):
        yield from _dispatched(batches, given, ours)
    elif isinstance(given, DataLoaderShard):
        for batch in batches:
            yield from _real(batch, _real_examples(given, batch, ours))
    elif (sampler := _distributed_sampler(given)) is not None:
        yield from _without_repeated(batches, sampler)
    else:
        walked = 0
        for number, batch in enumerate(batches):
            walked = _checksum(batch, walked)
            if number % ours.count == ours.number:
                yield batch
        ours.walked = walked


def _checksum(batch: Batch, before: int) -> int:
    for name, value in sorted(batch.items()):
        if torch.is_tensor(value):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            before = zlib.crc32(data, zlib.crc32(f"{name}{tuple(value.shape)}".encode(), before))
    return before


def _dispatched(batches: Data, given: DataLoaderDispatcher, ours: Group) -> Iterator[Batch]:
    kept: list[Batch] = []
    try:
        # The processes wait for each other at every batch: all of it is read before anything can fail between two.
        for batch in batches:
            kept += _real(batch, _real_examples(given, batch, ours))
    except Exception:
        # The others wait for a batch, not for an exchange: they end when this process is gone.
        ours.ended = True
        raise
    yield from kept


def _size(batch: Batch) -> int:
    return max((len(value) for value in batch.values() if torch.is_tensor(value) and value.ndim), default=0)


def _real_examples(loader: Any, batch: Batch, ours: Group) -> int:
    """How many examples of a batch that accelerate gave this process belong to it; the others were repeated."""
    size = _size(batch)
    sampler = loader.batch_sampler
    repeats = not isinstance(sampler, BatchSamplerShard) or sampler.even_batches
    if isinstance(loader, DataLoaderDispatcher):
        repeats = True
    if not (loader.end_of_dataloader and loader.remainder > 0 and repeats):
        return size
    return min(max(int(loader.remainder) - ours.number * size, 0), size)


def _real(batch: Batch, count: int) -> Iterator[Batch]:
    """The first examples of a batch; nothing if there are none."""
    size = _size(batch)
    if count == size:
        yield batch
    elif count:
        yield {
            name: value[:count] if isinstance(value, torch.Tensor | list | tuple) and _length(value) == size else value
            for name, value in batch.items()
        }


def _length(value: Any) -> int:
    return 0 if torch.is_tensor(value) and not value.ndim else len(value)


def _without_repeated(batches: Data, sampler: DistributedSampler[Any]) -> Iterator[Batch]:
    total, replicas = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]  # Sized, as it demands
    repeats = not sampler.drop_last and sampler.rank + (sampler.num_samples - 1) * replicas >= total
    last: Batch | None = None
    for batch in batches:
        if last is not None:
            yield last
        last = batch
    if last is not None:
        yield from _real(last, _size(last) - repeats)
