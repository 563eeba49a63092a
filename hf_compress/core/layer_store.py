"""Keeps the weights of layers in files: one layer at a time is in memory, and each that is done gets a file."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.saved_weights import SavedWeights
from hf_compress.core.saving import write_tensors


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
# Numbers that are looked at in one go.
_PART = 2**22


def put_(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module, or one inside of it, another parameter or buffer of a name; a parameter is shared."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        old = owner._parameters[leaf]
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` if a weight is NaN or infinite."""
    parts = torch.split(tensor.reshape(-1), _PART) if tensor.is_floating_point() else ()
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ValueError(f"Weights must be finite, got NaN or infinity in {name}.")


class LayerStore:
    """The weights of a model's layers, in the files of the model and in those of the layers that are done.

    Args:
        model: Its layers are on the meta device.
        layers: Some of its modules.
        weights: Of the model as it was; all tensors of the layers are there and fit.
        folder: Where files of finished layers go.
        device: Where layers are loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        weights: SavedWeights,
        folder: Path,
        device: torch.device,
    ) -> None:
        paths = {id(module): path for path, module in model.named_modules()}
        self._layers, self._paths = list(layers), [paths[id(layer)] for layer in layers]
        self._weights, self._folder, self._device = weights, folder, device

    def __len__(self) -> int:
        return len(self._layers)

    def holds(self, name: str) -> bool:
        """Whether a tensor of the model belongs to one of the layers."""
        return name.startswith(tuple(f"{path}." for path in self._paths))

    def file(self, index: int) -> Path:
        """The file of a finished layer."""
        return self._folder / f"layer-{index:05d}.safetensors"

    @torch.no_grad()
    def load_(self, index: int) -> None:
        """Bring the weights of a layer into memory, as the model has them.

        Raises:
            ValueError: If one of them is not finite.
        """
        layer, path = self._layers[index], self._paths[index]
        for name, empty in layer.state_dict(keep_vars=True).items():
            full = f"{path}.{name}"
            saved = self._weights.read([full])[full]
            require_finite(full, saved)
            # A copy: vector kernels give other last bits at the places where files have their tensors.
            put_(layer, name, saved.to(self._device, empty.dtype, copy=True))

    def write(self, index: int) -> None:
        """Write a layer, as it is now, to its file."""
        tensors = self._layers[index].state_dict()
        write_tensors(self.file(index), {f"{self._paths[index]}.{name}": value for name, value in tensors.items()}, {})

    @torch.no_grad()
    def drop_(self, index: int, done: bool) -> None:
        """Put the weights of a layer, as it is now, back on the meta device.

        Args:
            index: Of the layer.
            done: It will not be loaded again, so that what no file holds may go, too.
        """
        layer = self._layers[index]
        names = [*layer.state_dict(keep_vars=True), *(name for name, _ in layer.named_buffers() if done)]
        for name in dict.fromkeys(names):
            path, _, leaf = name.rpartition(".")
            put_(layer, name, getattr(layer.get_submodule(path), leaf).detach().to("meta"))
        # glibc keeps pages between what is still used: without this, every layer would leave some behind.
        if _trim is not None:
            _trim(0)
