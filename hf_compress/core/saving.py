"""Directories that are whole or do not load: everything is written aside first, the weights are moved last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _opens_last(file: Path) -> tuple[bool, bool]:
    """Sort key: weights after everything else, and what makes shards findable after the shards."""
    weights = ".safetensors" in file.suffixes
    return weights, weights and (file.suffix == ".json" or "-of-" not in file.name)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, target: Path) -> None:
    # A folder without weights never opens; one without config.json may, with a class's default sizes.
    for old in (*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")):
        old.unlink()
    files = [path for path in staged.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda file: (_opens_last(file), file.name)):
        _sync(path)
        place = target / path.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


@contextmanager
def complete_or_absent(directory: str | os.PathLike) -> Iterator[Path]:
    """Write a model directory so that a crash never leaves one that loads but is incomplete.

    Args:
        directory: Where the files shall be. Other files there stay.

    Yields:
        An empty folder beside the target to write into. When the block ends without an error, its files are synced
        and moved, the weights last; after an error they are removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with complete_or_absent(f"{place}/model") as staged:
        ...         _ = (staged / "config.json").write_text("{}")
        ...     os.listdir(f"{place}/model")
        ['config.json']
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    staged = target / ".incomplete"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        _publish(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_json(file: str | os.PathLike, content: Any) -> None:
    """Write a JSON file in one step: readers see the old content or the new, never a part."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.incomplete")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    _sync(aside)
    os.replace(aside, file)
