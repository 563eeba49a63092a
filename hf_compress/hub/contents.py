"""Chooses which files of a saved model are uploaded, and which are not and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hf_compress.core.pickles import is_pickle
from hf_compress.training.checkpoints import TEACHER_FOLDER


_PICKLE = "a pickle can run code when it is read"
_TEACHER = "a teacher is uploaded only when asked for (include_teacher)"


@dataclass
class Contents:
    """What goes into a repository.

    Args:
        files: Name in the repository -> file.
        left_out: Name -> why it is not uploaded; files of trainings (checkpoints, locks) are not listed.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def _of_a_training(part: str) -> bool:
    """Whether a file or folder of this name is a training's own or a program's, and no part of a model."""
    # Recipes note in stage.json which files a job has read.
    return part.startswith((".", "_", "checkpoint-")) or part.endswith(".lock") or part == "stage.json"


def contents_of(folder: str | Path, include_teacher: bool = False) -> Contents:
    """List the files of a saved model that are uploaded.

    Args:
        folder: Of `save_pretrained`, a stage or a training.
        include_teacher: Also those of the teacher that was trained beside it.

    Raises:
        ValueError: If the folder holds no model: `config.json` and weights in safetensors files.
    """
    root, found = Path(folder), Contents()
    if not root.is_dir():
        raise ValueError(f"model_name_or_path must be a folder with a saved model, got {str(folder)!r}.")
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        parts = file.relative_to(root).parts
        name = "/".join(parts)
        if any(map(_of_a_training, parts)):
            continue
        if parts[0] == TEACHER_FOLDER and not include_teacher:
            found.left_out[name] = _TEACHER
        elif is_pickle(file):
            found.left_out[name] = _PICKLE
        else:
            found.files[name] = file
    if "config.json" not in found.files:
        hint = ": merge the adapter first (merge_and_unload)" if "adapter_config.json" in found.files else ""
        raise ValueError(
            f"model_name_or_path {str(folder)!r} must hold a saved model, got no config.json there{hint}."
        )
    if not any(name.endswith(".safetensors") and "/" not in name for name in found.files):
        raise ValueError(
            f"model_name_or_path {str(folder)!r} must hold weights in safetensors files, got none: save the model "
            "with save_pretrained."
        )
    return found
