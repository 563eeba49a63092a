"""Saved states of a teacher: opened one at a time, all of them checked before the training begins."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_compress.api import apply_implied, check_finite
from hf_compress.core.errors import BROKEN_FILE, one_line
from hf_compress.core.loaded import require_complete
from hf_compress.training.given_teacher import move_
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teachers import FixedTeacher


logger = logging.getLogger(__name__)

# Fields of a config in which all snapshots must agree.
_SHAPE = ("architectures", "num_labels", "id2label", "vocab_size", "hidden_size", "num_hidden_layers")


class SnapshotFolders:
    """The folders of a teacher's saved states, from the youngest to the finished model.

    Args:
        folders: In order of age.
    """

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def open(self, student: PreTrainedModel) -> PreTrainedModel:
        """The first snapshot.

        Raises:
            ValueError: If it cannot be opened, or a later one could not take its place.
        """
        first = open_snapshot(self.folders[0])
        check_snapshots(self.folders, first)
        return first

    def origins(self) -> dict[str, str]:
        """Name of each snapshot -> its folder."""
        return {f"the teacher's state {number}": folder for number, folder in enumerate(self.folders)}


class SnapshotTeacher(FixedTeacher):
    """A series of saved models, used one after the other for equal shares of the training.

    Args:
        folders: In order of age.
        model: The first of them, opened, on the device where all shall run.
        wanted, dropout, label_order: As for `FixedTeacher`.

    Source:
        CALD specification 3.3: with n snapshots and T updates, update s is guided by number
        `min(s // (T // n), n - 1)`.
    """

    def __init__(
        self,
        folders: list[str],
        model: PreTrainedModel,
        wanted: WantedSignals | None = None,
        dropout: bool = False,
        label_order: list[int] | None = None,
    ) -> None:
        super().__init__(model, wanted, dropout, label_order=label_order)
        self.folders = folders
        self.device = model.device
        self.index = 0
        self.share = 1

    def begin(self, trainer: Trainer, num_updates: int) -> None:
        self.set_length(num_updates)

    def set_length(self, num_updates: int) -> None:
        """Divide a training among the snapshots.

        Raises:
            ValueError: If there are more snapshots than updates.
        """
        if len(self.folders) > num_updates:
            raise ValueError(
                f"teacher_snapshots must be at most the {num_updates} updates of the training, "
                f"got {len(self.folders)}."
            )
        self.share = num_updates // len(self.folders)

    def before_update(self, update: int) -> None:
        index = min(update // self.share, len(self.folders) - 1)
        if index != self.index:
            # The old one goes before the new one comes: there is never room needed for two.
            del self.model
            self.model = move_(open_snapshot(self.folders[index]), self.device).requires_grad_(False)
            self.index = index
            logger.info("Update %d: the teacher is now %s.", update, self.folders[index])


def open_snapshot(folder: str) -> PreTrainedModel:
    """The model of a saved directory or Trainer checkpoint, in the class it was saved from.

    Raises:
        ValueError: If there is none, or its files lack weights.
    """
    with _opening(folder):
        config = AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, str((config.architectures or ["none"])[0]), None)
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            raise ValueError(f"its config.json names no model class of transformers: {config.architectures}")
        opener: Any = kind
        model, loaded = opener.from_pretrained(folder, output_loading_info=True)
        require_complete(loaded)
        check_finite(model)
        return apply_implied(model)


def _opening(folder: str) -> AbstractContextManager[None]:
    return one_line(f"teacher_snapshots must be saved models, got {folder!r}", *BROKEN_FILE)


def check_snapshots(folders: list[str], first: PreTrainedModel) -> None:
    """Check every snapshot now, so that no later one can end the training.

    Args:
        folders: In order of age.
        first: The first of them, opened.

    Raises:
        ValueError: If a snapshot has other labels or sizes than the first, or its weights cannot be read.
    """
    expected = {name: getattr(first.config, name, None) for name in _SHAPE}
    tensors = _tensors(folders[0]) if len(folders) > 1 else {}
    for folder in folders[1:]:
        with _opening(folder):
            config = AutoConfig.from_pretrained(folder)
        found = {name: getattr(config, name, None) for name in _SHAPE}
        differ = [name for name in _SHAPE if found[name] != expected[name]]
        if differ:
            raise ValueError(
                f"teacher_snapshots must be states of one model: {folder!r} has "
                f"{', '.join(f'{name}={found[name]}' for name in differ)}, {folders[0]!r} has "
                f"{', '.join(f'{name}={expected[name]}' for name in differ)}."
            )
        if _tensors(folder) != tensors:
            # Another layout of the files may hold the same model; opening it tells.
            open_snapshot(folder)


def _tensors(folder: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's weight files; reads headers and, with them, the files' sizes."""
    shapes: dict[str, tuple[int, ...]] = {}
    with _opening(folder):
        for file in _weight_files(Path(folder)):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
            else:
                held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                shapes.update({name: tuple(value.shape) for name, value in held.items()})
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read, in its order of preference."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = json.loads((folder / index).read_text())["weight_map"].values()
            return [folder / name for name in sorted(set(shards))]
    raise ValueError(f"it holds none of {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} and their indices")
