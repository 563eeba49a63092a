"""Finding checkpoints: which of them are whole, which belong to the same run, and why one cannot be read."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_compress.core.errors import BROKEN_FILE, first_line


logger = logging.getLogger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# In a checkpoint: the run that wrote it and the files that belong to it. In an output folder that holds checkpoints
# of several runs: the run that trained there last.
RUN_FILE = "training_run.json"
# Where a teacher is saved, below its student. A name that holds "optimizer" or "pytorch_model" would change how
# transformers reads a checkpoint.
TEACHER_FOLDER = "teacher"
_BINARY = {".safetensors", ".pt", ".pth", ".bin"}


def checkpoints_of(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-<step>` of a training, by step; other names (`checkpoint-best`) are not among them."""
    found = (path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2]))


def run_note(folder: Path) -> dict[str, Any]:
    """What `RUN_FILE` in a folder says; empty where there is none that can be read."""
    try:
        found = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def binary_files(checkpoint: Path) -> list[str]:
    """The files of weights and states in a checkpoint, relative to it."""
    return sorted(str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.suffix in _BINARY and f.is_file())


def intact(file: Path) -> bool:
    """Whether a file has the length that its own table of contents says."""
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)
    try:
        with safe_open(file, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def missing_part(checkpoint: Path, num_processes: int = 1) -> str | None:
    """What a checkpoint lacks, or None.

    Args:
        checkpoint: Its folder.
        num_processes: Of the training that goes on; each reads a random state of its own.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        # `Trainer` itself writes this file last.
        return f"{TRAINER_STATE_NAME} is missing or damaged"
    files = binary_files(checkpoint)
    note = run_note(checkpoint)
    expected = set(note.get("files", ()))
    # In checkpoints of earlier versions. Later ones are listed whole: a machine with a disk of its own may hold the
    # part of its processes alone.
    if num_processes > 1 and "processes" not in note and any(name.startswith("rng_state_") for name in files):
        expected |= {f"rng_state_{rank}.pth" for rank in range(num_processes)}
    missing = sorted(expected - set(files))
    return f"{missing[0]} is missing" if missing else None


def require_same_processes(checkpoint: Path, num_processes: int) -> None:
    """Refuse a checkpoint that another number of processes wrote: each goes on with random numbers of its own.

    Raises:
        ValueError: Says how many there were.
    """
    written = run_note(checkpoint).get("processes")
    if written is None:
        # Of an earlier version of this package, or of a stock `Trainer`.
        written = len(list(checkpoint.glob("rng_state_*.pth"))) or int((checkpoint / "rng_state.pth").is_file())
    if written not in (0, num_processes):
        raise ValueError(
            f"resume_from_checkpoint {str(checkpoint)!r} was written by {written} process{'es' * (written > 1)}, and "
            f"this training has {num_processes}: it would read other batches. Start {written}, or begin a new "
            "training with the weights of the checkpoint as its model."
        )


def defect(checkpoint: Path, num_processes: int = 1) -> str | None:
    """Why training cannot go on from a checkpoint, or None when it is whole.

    Args:
        checkpoint: Its folder.
        num_processes: Of the training that goes on; each reads a random state of its own.
    """
    damaged = (f"{name} is damaged" for name in binary_files(checkpoint) if not intact(checkpoint / name))
    return missing_part(checkpoint, num_processes) or next(damaged, None)


def last_whole_checkpoint(folder: str | os.PathLike[str], num_processes: int = 1) -> Path | None:
    """Find the checkpoint from which the last training of a folder resumes.

    Checkpoints of an earlier run in the same folder are not taken, nor are damaged ones.

    Returns:
        Its folder, or None where the training has none yet.

    Raises:
        ValueError: If it was a training of another number of processes.
    """
    folder, note = Path(folder), run_note(Path(folder))
    found = checkpoints_of(folder)
    if note:
        others = [path.name for path in found if run_note(path).get("run") != note.get("run")]
        found = [path for path in found if path.name not in others]
        if note.get("resumed_from"):
            found.insert(0, folder / note["resumed_from"])
        elif others and not found:
            logger.warning("%s in %s belong to earlier trainings: name one to resume from it.", others, folder)
    for checkpoint in reversed(found):
        require_same_processes(checkpoint, num_processes)
        reason = defect(checkpoint, num_processes)
        if reason is None:
            return checkpoint
        logger.warning("%s is not resumed from: %s.", checkpoint, reason)
    return None


@contextmanager
def readable(checkpoint: str | os.PathLike[str], part: str) -> Iterator[None]:
    """Say in one line which part of a checkpoint cannot be read, and why.

    Args:
        checkpoint: Its folder.
        part: What the block reads from it.

    Raises:
        ValueError: If a file is truncated, holds something else, or fits another model.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BROKEN_FILE as error:
        raise ValueError(
            f"resume_from_checkpoint {str(checkpoint)!r}: its {part} cannot be read: {first_line(error)} "
            "Resume from another checkpoint, or begin anew."
        ) from error
