"""Says what a job is made of (options, content of files, code, earlier jobs), so that the same is not made twice."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_compress import __version__
from hf_compress.recipes.jobs import Job, Result
from hf_compress.recipes.sources import sources_of
from hf_compress.stages.table import Stage


# Options that name what a stage writes: what lies there is no input.
_WRITTEN = ("output_file", "teacher_cache_dir", "logging_dir")
# States of trainings, what programs leave while they run, and pages for people: they do not decide what a model or a
# data set is.
_NO_INPUT = ("checkpoint-", ".", "_", "README")


def code_version(stage: Stage) -> dict[str, str]:
    """What computes a stage: the releases, and a digest of the sources that it can run."""
    return {
        "hf_compress": __version__,
        "sources": sources_of(stage),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def file_digest(file: str | Path) -> str:
    """Compute a digest of a file's content; one that was not written to since is not read again."""
    found = os.stat(file)
    return _digest(str(file), found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(file: str, size: int, changed: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as content:
        while part := content.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def files_in(place: Path) -> list[Path]:
    """The files of a folder that decide what it holds; a file is the only one of itself.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.csv", "a.csv", ".lock"):
        ...     _ = (folder / name).write_text("")
        >>> [file.name for file in files_in(folder)]
        ['a.csv', 'b.csv']
    """
    if place.is_file():
        return [place]
    found = []
    for folder, below, names in os.walk(place, followlinks=True):
        below[:] = [name for name in below if not name.startswith(_NO_INPUT)]
        found += [Path(folder, name) for name in names if not name.startswith(_NO_INPUT)]
    return sorted(file for file in found if file.is_file())


def _places(value: Any) -> Iterator[Path]:
    """The files and folders that the value of an option names."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str) and each:
            found = sorted(glob.glob(each)) if glob.has_magic(each) else [each]
            yield from (Path(name) for name in found if os.path.exists(name))


def inputs_of(job: Job, keys: Mapping[str, str], commits: Mapping[str, str | None]) -> dict[str, Any]:
    """What decides the result of a job.

    Args:
        job: The job.
        keys: Name -> key of the jobs before it.
        commits: Name on the Hub -> the commit that would be read.

    Returns:
        `options`: name -> value, where a file or folder is its own name alone, without the path to it; `files`: option
        and file -> digest; `stages`: the keys of the jobs it reads; `code`; all in terms that JSON holds.
    """
    files: dict[str, str] = {}
    options: dict[str, Any] = {}
    for name, value in sorted(job.options.items()):
        if name in _WRITTEN:
            continue
        for place in _places(value):
            for file in files_in(place):
                within = file.relative_to(place) if place.is_dir() else ""
                files[f"{name}: {Path(place.name, within)}"] = file_digest(file)
        options[name] = [_plain(each) for each in value] if isinstance(value, list) else _plain(value)
    several = (value if isinstance(value, list) else [value] for value in job.options.values())
    named = {each for values in several for each in values if isinstance(each, str)}
    return {
        "stage": job.entry.stage.name,
        "options": options,
        "files": files,
        "hub": {name: commit for name, commit in commits.items() if commit is not None and name in named},
        "stages": {name: keys[name] for name in job.needs()},
        "code": code_version(job.entry.stage),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return {"result": value.job, "rest": value.rest}
    # The name of a folder may choose a metric; the path to it decides nothing.
    return Path(value).name if isinstance(value, str) and os.path.exists(value) else value


def key_of(inputs: Mapping[str, Any]) -> str:
    """Compute the key of a job: equal for equal inputs."""
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs between the inputs of two runs of a job.

    Example:
        >>> differences({"options": {"seed": 1}, "files": {}}, {"options": {"seed": 2}, "files": {"data_dir": "f3"}})
        ['seed', 'data_dir']
    """
    changed: list[str] = []
    for part, value in now.items():
        old = before.get(part)
        if isinstance(value, dict) and isinstance(old, dict):
            names = [name for name in {**old, **value} if old.get(name) != value.get(name)]
            words = {"stages": [f"stage {name!r}" for name in names], "code": ["the code"] if names else []}
            changed += words.get(part, names)
        elif old != value:
            changed.append(part)
    return changed
