"""Remembers in each job's folder what it was made of, and whether it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_compress.core.saving import write_json
from hf_compress.recipes.inputs import differences, file_digest, files_in, key_of


FILE = "stage.json"
LINEAGE_FILE = "lineage.json"
# Beside the jobs: what each gave last from other inputs. A training of hours is not thrown away for a new release.
BEFORE = ".before"


@dataclass(frozen=True)
class State:
    """Where a job stands.

    Args:
        kind: `done`: made of the same inputs, and whole; `begun`: the same inputs, to be continued; `changed`: there
            is a result of other inputs, which is put aside; `new`: there is nothing; `foreign`: there are files that
            no recipe wrote.
        why: What changed, or what lies there.
        seconds: How long it took the last time; None where that is unknown.
        results: What the stage returned; only of `done`.
    """

    kind: Literal["done", "begun", "changed", "new", "foreign"]
    why: str = ""
    seconds: float | None = None
    results: Mapping[str, Any] | None = None


def state_of(folder: Path, inputs: Mapping[str, Any]) -> State:
    """Read the state of a job.

    Args:
        folder: Its folder; need not exist.
        inputs: What it would be made of now.
    """
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return State("new")
    try:
        note = json.loads((folder / FILE).read_text(encoding="utf-8"))
        known, done, seconds = note["inputs"], note["done"], note["seconds"]
    except FileNotFoundError:
        return State("foreign", min(path.name for path in folder.iterdir()))
    except (ValueError, LookupError, TypeError, OSError):
        # Ours are written in one step: this one is somebody else's, and so may be what lies beside it.
        return State("foreign", FILE)
    if key_of(known) != key_of(inputs):
        return State("changed", _listed(differences(known, inputs)), seconds)
    if not done:
        return State("begun", seconds=seconds)
    damaged = _damaged(folder, note["files"])
    if damaged:
        return State("begun", f"{damaged} is missing or was changed", seconds)
    return State("done", seconds=seconds, results=note["results"])


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} changed"


def _files(folder: Path) -> dict[str, str]:
    found = {str(file.relative_to(folder)): file for file in files_in(folder)}
    return {name: file_digest(file) for name, file in found.items() if name != FILE}


def _damaged(folder: Path, files: Mapping[str, str]) -> str | None:
    now = _files(folder)
    return next((name for name, digest in files.items() if now.get(name) != digest), None)


def _whole(folder: Path) -> bool:
    """Whether a folder holds a finished result."""
    note = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return bool(note["done"]) and _damaged(folder, note["files"]) is None


def begin(folder: Path, inputs: Mapping[str, Any], state: State) -> None:
    """Prepare the folder of a job: what belongs to these inputs stays.

    A whole result of other inputs is moved to `.before`, in place of an older one there; anything else of them goes.
    Whatever moment the process is killed at, files of other inputs are never taken for files of these.
    """
    if state.kind == "changed" and _whole(folder) and not folder.is_symlink():
        aside = folder.parent / BEFORE / folder.name
        if aside.exists():
            shutil.rmtree(aside)
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
    elif state.kind == "changed":
        # The note goes last: as long as it is there, what else is left is known to be of other inputs.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == FILE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"inputs": inputs, "done": False, "seconds": state.seconds, "files": {}, "results": {}})


def finish(folder: Path, inputs: Mapping[str, Any], seconds: float, results: Mapping[str, Any]) -> None:
    """Note that a job is finished, with a digest of each file of its result."""
    note = {"inputs": inputs, "done": True, "seconds": round(seconds, 1), "files": _files(folder), "results": results}
    write_json(folder / FILE, note)
