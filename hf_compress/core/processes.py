"""Several processes that compress one model together: each reads a share of the data, and what they count adds up.

Inside `together`, `added_up` sums statistics over all processes; everywhere else it does nothing. Each exchange begins
with whether a process has failed: then all of them end, instead of waiting for the one that is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.digests import weights_digest
from hf_compress.core.launcher import LostProcess, lost_process_named


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Values that are sent in one message: many small ones take their time by waiting.
_BUNDLE = 2**20


class Addable(Protocol):
    """A statistic that several processes can each collect a part of."""

    def sums(self) -> Iterable[Tensor]:
        """Tensors that add up over the processes; they are changed in place."""


class OtherProcessFailed(ValueError):
    """This process ends because another one failed on its own share of the work."""


class Group:
    """The processes that work together, and this one's place among them.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        # NCCL sends from accelerators only.
        self._device = device if "gloo" in dist.get_backend() else torch.device("cuda", torch.cuda.current_device())
        # What was read in the pass that has just ended, as `share_of` sums it up; None: judged already, or no pass.
        self.walked: int | None = None
        # Whether the others know already that this process will exchange nothing any more.
        self.ended = False

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            with lost_process_named(self.count, "compression", " The model is unchanged"):
                yield
        except RuntimeError:
            self.ended = True
            raise

    def exchange(self, value: Any, failure: str | None = None) -> list[Any]:
        """Give each process what all of them have; every one has to call it at the same point.

        Raises:
            LostProcess: If another process is gone.
            OtherProcessFailed: If another process has failed.
            ValueError: If the processes have read different data since the last exchange.
        """
        told: list[Any] = [None] * self.count
        with self._talking():
            dist.all_gather_object(told, (failure, self.walked, value))
        if failure is not None:
            return []
        for number, (failed, _, _) in enumerate(told):
            if failed is not None:
                self.ended = True
                raise OtherProcessFailed(f"Process {number} stopped: {failed}")
        walked = [seen for _, seen, _ in told]
        if None not in walked:
            self.walked = None
            if len(set(walked)) > 1:
                self.ended = True
                raise ValueError(
                    "data must be the same on every process, in the same order: each of them takes its share of the "
                    "batches. Seed the processes alike (set_seed) or do not shuffle; data that are a share already "
                    "must come from accelerator.prepare or a DistributedSampler."
                )
        return [entry for _, _, entry in told]

    def add_up_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        self.exchange(None)
        for bundle in _bundles(tensors):
            sent = torch.cat([tensor.reshape(-1) for tensor in bundle])
            half = sent.is_floating_point() and sent.element_size() < 4
            sent = sent.to(self._device_for(sent), torch.float32 if half else sent.dtype)
            with self._talking():
                dist.all_reduce(sent)
            parts = torch.split(sent, [tensor.numel() for tensor in bundle])
            for tensor, part in zip(bundle, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def spread(self, tensor: Tensor) -> Tensor:
        """Give every process the first one's tensor; it is changed in place if that is possible."""
        sent = tensor.detach().to(self._device_for(tensor)).contiguous()
        with self._talking():
            dist.broadcast(sent, src=0)
        return sent.to(tensor.device)

    def _device_for(self, tensor: Tensor) -> torch.device:
        return tensor.device if "gloo" in dist.get_backend() else self._device


def _bundles(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that are sent together: small ones of one type, or one large one."""
    open_bundles: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bundle = open_bundles.setdefault((tensor.dtype, tensor.device), [])
        if bundle and sum(other.numel() for other in bundle) + tensor.numel() > _BUNDLE:
            yield bundle
            open_bundles[tensor.dtype, tensor.device] = bundle = []
        bundle.append(tensor)
    yield from open_bundles.values()


_GROUP: ContextVar[Group | None] = ContextVar("group", default=None)


def group() -> Group | None:
    """The processes that compress a model together now; None: this one is alone."""
    return _GROUP.get()


def several_processes() -> bool:
    """Whether this program runs as several processes that know each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_number() -> int:
    """The number of this process among those that know each other; 0 where it is alone."""
    return dist.get_rank() if several_processes() else 0


def is_first_process() -> bool:
    """Whether this process is the one that writes and prints for all."""
    return process_number() == 0


@contextmanager
def together(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Let all processes do the work of a block together, and end in all of them if it fails in one.

    Args:
        model: The model that the block changes.
        wanted: Whether they shall; False, or with one process: nothing is different inside the block.

    Raises:
        LostProcess: If another process is gone.
        OtherProcessFailed: If the block failed in another process; names its error.
    """
    if not (wanted and several_processes()):
        yield
        return
    ours = Group(model.device)
    if ours.number == 0:
        logger.info("%d processes share the calibration data; each of them has to get here.", ours.count)
    token = _GROUP.set(ours)
    try:
        yield
    except Exception as error:
        if not ours.ended:
            # One that was killed cannot be told.
            with suppress(OtherProcessFailed, LostProcess):
                ours.exchange(None, failure=str(error) if isinstance(error, ValueError) else repr(error))
        raise
    finally:
        _GROUP.reset(token)


@contextmanager
def added_up(*statistics: Addable) -> Iterator[None]:
    """Make statistics those of all processes, at the end of a block in which each process adds its share to them.

    Example:
        >>> class Count:
        ...     def __init__(self):
        ...         self.value = torch.zeros(())
        ...     def sums(self):
        ...         return [self.value]
        >>> count = Count()
        >>> with added_up(count):           # with one process, or outside of `together`: as without it
        ...     count.value += 1
        >>> float(count.value)
        1.0
    """
    ours = group()
    if ours is None:
        yield
        return
    tensors = [tensor for statistic in statistics for tensor in statistic.sums()]
    if ours.number:
        # What was there before is the same in all processes, and counts once.
        for tensor in tensors:
            tensor.zero_()
    yield
    ours.add_up_(tensors)


def add_up_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all processes; every one has to call it with as many, of the same shapes."""
    if (ours := group()) is not None:
        ours.add_up_(tensors)


def place_in_data(number: int) -> int:
    """The place in the whole data of the batch that this process reads as its batch `number`."""
    ours = group()
    return number if ours is None else number * ours.count + ours.number


def all_told(value: T) -> list[T]:
    """What every process has to say, in their order; every one has to call it."""
    ours = group()
    return [value] if ours is None else ours.exchange(value)


def first_told(value: T | None) -> T | None:
    """What the first process says that has something to say; every one has to call it."""
    return next((told for told in all_told(value) if told is not None), None)


def require_same_model(model: PreTrainedModel, *settings: Any) -> None:
    """Check that all processes do the same to the same model.

    Raises:
        ValueError: If they do not.
    """
    if group() is None:
        return
    ours = {"model": weights_digest(model), "configs": repr(settings)}
    told = all_told(ours)
    for name, value in ours.items():
        if any(each[name] != value for each in told):
            raise ValueError(
                f"{name} must be the same on every process, got different ones. Open one file on all of them, and "
                "seed new weights alike (set_seed)."
            )


def make_equal_(model: PreTrainedModel) -> None:
    """Give every process the weights of the first one, where other kernels or processors made them differ.

    Raises:
        ValueError: If their shapes differ.
    """
    ours = group()
    if ours is None:
        return
    digest = weights_digest(model)
    if all(told == digest for told in all_told(digest)):
        return
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if any(told != shapes for told in all_told(shapes)):
        raise ValueError(
            "The processes chose different sizes from the same numbers: they run on different kinds of processors. "
            "Compress in one process, or on machines of one kind."
        )
    for tensor in tensors.values():
        # Not in place: if anything fails later, the old values are restored.
        tensor.data = ours.spread(tensor.detach().clone())
