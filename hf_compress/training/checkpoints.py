"""Checkpoints of a training: written aside, renamed when whole, the oldest removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# Not the name of a checkpoint: `Trainer` neither rotates nor resumes from what is below it.
_STAGING = ".incomplete"

# What readers raise beside the usual classes.
_FORMATS = (UnpicklingError, SafetensorError)


def _step(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name).group(1))


def checkpoints_of(folder: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-<step>` of a training, by step; other names (`checkpoint-best`) are not among them."""
    found = (path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=_step)


def _remove(checkpoint: Path, staging: Path) -> None:
    """Delete a checkpoint so that a crash in between leaves nothing under its name."""
    staging.mkdir(exist_ok=True)
    aside = staging / f"removed-{checkpoint.name}"
    os.replace(checkpoint, aside)
    shutil.rmtree(aside)


@contextmanager
def readable(checkpoint: str | os.PathLike | None, part: str) -> Iterator[None]:
    """Say in one line what of a checkpoint could not be read in the block.

    Args:
        checkpoint: Its folder.
        part: What is read from it.

    Raises:
        ValueError: If a file is truncated, holds something else, or fits another model.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, EOFError, LookupError, RuntimeError, TypeError, *_FORMATS) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # torch names the module in its first line and what does not fit in the second.
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise ValueError(
            f"resume_from_checkpoint {str(checkpoint)!r}: its {part} cannot be read: {reason} "
            "Resume from another checkpoint, or begin anew."
        ) from error


class CheckpointWriter:
    """Puts the checkpoints of one training into its output folder, each in one step.

    Args:
        args: The training's arguments.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        # Where `Trainer` shall write while a checkpoint is incomplete.
        self.staging: str | None = None

    @contextmanager
    def written_aside(self, folder: str | os.PathLike, state: TrainerState) -> Iterator[None]:
        """While the block runs, a checkpoint is written into `self.staging`; then it is moved to `folder`.

        Args:
            folder: Where the checkpoints of this training are.
            state: The training's state. Its best checkpoint is given the name that it has in the end.

        Raises:
            ValueError: If the disk is full or the folder cannot be written.
        """
        root = Path(folder)
        staging, name = root / _STAGING, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        shutil.rmtree(staging, ignore_errors=True)
        self.staging = str(staging)
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            if not isinstance(error, RuntimeError) or "PytorchStreamWriter" in str(error):
                raise ValueError(
                    f"output_dir {str(root)!r} cannot be written: {str(error).splitlines()[0]}"
                ) from error
            raise
        finally:
            self.staging = None
        self._name_best(root, staging / name, state)
        if (root / name).exists():
            _remove(root / name, staging)
        os.replace(staging / name, root / name)
        self._rotate(root, root / name, state)
        shutil.rmtree(staging, ignore_errors=True)

    @staticmethod
    def _name_best(root: Path, written: Path, state: TrainerState) -> None:
        # `Trainer` looks for the best checkpoint beside the one it writes, and so finds no other.
        best = root / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if best.name == written.name or best.is_dir():
            state.best_model_checkpoint = str(best)
            state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _rotate(self, root: Path, newest: Path, state: TrainerState) -> None:
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        spared = {newest.name}
        if state.best_model_checkpoint is not None:
            spared.add(Path(state.best_model_checkpoint).name)
        # By age as in `Trainer`. Its function goes by step where all are written within a second, and takes
        # `checkpoint-best` for one of its own.
        kept = sorted(checkpoints_of(root), key=lambda path: path.stat().st_mtime_ns)
        removable = [path for path in kept if path.name not in spared]
        for path in removable[: max(0, len(kept) - max(limit, len(spared)))]:
            _remove(path, root / _STAGING)
