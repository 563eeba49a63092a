"""The texts of a corpus, from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_compress.core.errors import one_line
from hf_compress.core.table_files import SUFFIXES, open_table


def corpus_texts(files: Sequence[str]) -> list[str]:
    """Read all texts of some files, each text once.

    Args:
        files: Text files, of which each line is a text, or tables, of which every column is read that holds texts or
            lists of words.

    Raises:
        ValueError: If a file is not there, cannot be read, or if there is no text in any of them.
    """
    texts = list(dict.fromkeys(text for name in files for text in _texts(Path(name)) if text.strip()))
    if not texts:
        raise ValueError(f"corpus must hold at least one text, got none in {', '.join(map(repr, files))}.")
    return texts


def _texts(file: Path) -> Iterator[str]:
    if file.suffix.lower() in SUFFIXES:
        table = open_table(file, f"corpus {str(file)!r}")
        for name in table.columns:
            yield from _texts_in(table.read(name))
        return
    if not file.is_file():
        raise ValueError(
            f"corpus {str(file)!r} must exist and be a file of texts. Texts themselves go to prune_vocabulary."
        )
    with one_line(f"corpus {str(file)!r} is not text in UTF-8", OSError, UnicodeDecodeError):
        yield from file.read_text(encoding="utf-8-sig").splitlines()


def _texts_in(values: list[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            yield " ".join(value)
