"""Reads the tensors of a saved model one by one, from one file of safetensors or from shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_compress.core.errors import BROKEN_FILE, first_line, one_line


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SavedWeights:
    """The tensors in the weight files of a folder, under the names that a model has for them.

    Only headers are read until tensors are asked for. Where the index names a shard, the shard must be whole and hold
    what the index says.

    Args:
        folder: Of a saved model.

    Raises:
        ValueError: If there is no such folder, it has no weights as safetensors, the index is broken, or a shard is
            missing, torn or lacks a tensor.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"source must be a folder with a saved model, got {str(folder)!r}.")
        self._folder = folder
        # Name in the files -> its file.
        self._places: dict[str, Path] = {}
        # Name in a model -> name in the files.
        self._names: dict[str, str] = {}
        self._sizes: dict[Path, tuple[int, int]] = {}
        listed = self._listed()
        for file in sorted({*listed.values()}):
            held = self._held(file)
            if lacking := sorted(name for name, place in listed.items() if place == file and name not in held):
                raise ValueError(
                    f"{INDEX} of {str(folder)!r} says that {file.name} holds {lacking[0]}, but it does not. Copy or "
                    "save the model again."
                )
            self._places.update(dict.fromkeys(held, file))

    def _listed(self) -> dict[str, Path]:
        """Tensor -> file, as the index says; of a single file, one entry for it."""
        if (self._folder / WEIGHTS).is_file():
            return dict.fromkeys(self._held(self._folder / WEIGHTS), self._folder / WEIGHTS)
        index = self._folder / INDEX
        if not index.is_file():
            raise ValueError(
                f"source must hold {WEIGHTS} or {INDEX}, and {str(self._folder)!r} has neither. Save the model as "
                "safetensors (save_pretrained)."
            )
        with one_line(f"{INDEX} of {str(self._folder)!r} is broken", *BROKEN_FILE):
            entries: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named = {str(name): str(file) for name, file in entries.items()}
        for name, file in named.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{INDEX} of {str(self._folder)!r} names {file!r} for {name}: shards are files of safetensors in "
                    "the same folder."
                )
        return {name: self._folder / file for name, file in named.items()}

    def _held(self, file: Path) -> list[str]:
        if not file.is_file():
            raise ValueError(f"{file.name} is missing in {str(self._folder)!r}: copy or save the model again.")
        self._sizes[file] = (file.stat().st_size, file.stat().st_mtime_ns)
        try:
            with safe_open(file, framework="pt") as saved:
                return list(saved.keys())
        except BROKEN_FILE as error:
            raise ValueError(
                f"{file.name} in {str(self._folder)!r} is torn or no file of safetensors ({first_line(error)}): copy "
                "or save the model again."
            ) from error

    @property
    def files(self) -> list[Path]:
        return list(self._sizes)

    def identity(self) -> list[list[Any]]:
        """Name, size and time of change of each file: other weights have another one."""
        return sorted([file.name, *facts] for file, facts in self._sizes.items())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the first tensor of floating-point numbers, as transformers finds it."""
        for name, file in self._places.items():
            with safe_open(file, framework="pt") as saved:
                if (kind := saved.get_slice(name).get_dtype()) in _FLOATS:
                    return _FLOATS[kind]
        return torch.get_default_dtype()

    def match(self, expected: Mapping[str, Tensor], prefix: str) -> list[str]:
        """Find a model's tensors in the files, which may leave out or add the base model's name.

        Args:
            expected: Name -> parameter or buffer, as the model's `state_dict` names them.
            prefix: The base model's name.

        Returns:
            The names in the files that no part of the model reads.
        """
        start, unread = f"{prefix}.", dict.fromkeys(self._places)
        for name in expected:
            for candidate in (name, f"{start}{name}", name.removeprefix(start)):
                if candidate in self._places:
                    self._names[name] = candidate
                    unread.pop(candidate, None)
                    break
        return list(unread)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as they are in the files; their memory is that of the file, which the system may take away."""
        found = {}
        for name in names:
            # Each file is closed at once: memory of an open one counts as the program's.
            with safe_open(self._places[self._names[name]], framework="pt") as saved:
                found[name] = saved.get_tensor(self._names[name])
        return found
