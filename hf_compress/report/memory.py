"""How much memory one forward pass needs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


CUDA_MEMORY = "parameters, buffers and the growth of torch.cuda.max_memory_allocated"
TENSOR_MEMORY = "parameters, buffers and the tensors alive at once, without workspaces inside kernels"


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    """Counts the bytes of the tensors that operations create, as long as they are alive."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        # Addresses of tensors that were there before: views of them are nothing new.
        self.known = known
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def _release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.known and storage not in self._seen:
                    self._seen.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(sizes.values())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def peak_memory(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[int, str]:
    """The memory that a model and one forward pass need at once, as if nothing else were loaded.

    On CUDA the allocator is asked. Elsewhere process sizes say little, because freed memory stays with the process:
    there the tensors that are alive at once are counted, the same on every machine and in every run.

    Args:
        model: In the mode in which it shall be measured.
        inputs: Tensors on the model's device; not counted.

    Returns:
        Bytes, and what they mean.

    Example:
        >>> peak_memory(nn.Linear(8, 4), {"input": torch.zeros(2, 8)})[0]   # 36 parameters, 2 x 4 outputs
        176
    """
    device = next((t.device for t in _tensors(model)), torch.device("cpu"))
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(**inputs)
            torch.cuda.synchronize(device)
            return resident_bytes(model) + torch.cuda.max_memory_allocated(device) - before, CUDA_MEMORY
        known = {t.untyped_storage().data_ptr() for t in (*_tensors(model), *inputs.values())}
        with _LiveBytes(known) as counter:
            model(**inputs)
        return resident_bytes(model) + counter.peak, TENSOR_MEMORY
