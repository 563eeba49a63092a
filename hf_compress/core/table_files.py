"""Files of labelled texts, column by column: CSV, TSV, JSON and Parquet.

Only the columns that a task needs are read, so what stands in the others does not matter.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features

from hf_compress.core.errors import first_line


_T = TypeVar("_T")

SUFFIXES = (".parquet", ".tsv", ".csv", ".json", ".jsonl")
# A running text, line by line; of use where no labels are needed.
TEXT = ".txt"


@dataclass(frozen=True)
class Table:
    """One split, unchecked.

    Args:
        where: How messages name it.
        columns: Names, in order.
        read: Column name -> its values as Python objects.
        typed: Whether numbers and texts are told apart; the cells of CSV and TSV files are all texts.
        class_names: Column name -> names of its ids, where the file has them.
        row_of: Value -> the row (from 1) that it stands in, where a row has several values; both count from 1.
        between: What stands between rows in the file, if they are parts of one text.
    """

    where: str
    columns: tuple[str, ...]
    read: Callable[[str], list[Any]]
    typed: bool = True
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    row_of: Callable[[int], int] = int
    between: str | None = None


def table_of(rows: Dataset, where: str) -> Table:
    """A split that `datasets` has loaded."""
    return Table(where, tuple(rows.column_names), lambda name: list(rows[name]), True, _class_names(rows.features))


def read_table(file: Path, split: str) -> Table:
    """Open a file.

    Args:
        file: Its suffix says what it is.
        split: Named in messages.

    Raises:
        ValueError: If it is not there, empty, damaged, no text in UTF-8, or its rows and columns are ambiguous.
    """
    return open_table(file, f"{split}_file {str(file)!r}")


def open_table(file: Path, where: str) -> Table:
    """Open a file, as `read_table`; messages name it by `where`."""
    if not file.is_file():
        raise ValueError(f"{where} must exist and be a file.")
    suffix = file.suffix.lower()
    if suffix not in (*SUFFIXES, TEXT):
        raise ValueError(f"{where} must end in one of {', '.join((*SUFFIXES, TEXT))}.")
    try:
        if not file.stat().st_size:
            raise ValueError(f"{where} must not be empty.")
        if suffix == ".parquet":
            table = _parquet(file, where)
        elif suffix == TEXT:
            lines = _text(file, where).removesuffix("\n").split("\n")
            table = Table(where, ("text",), lambda name: lines, between="\n")
        elif suffix in (".json", ".jsonl"):
            table = _from_objects(_objects(_text(file, where), where), where)
        else:
            table = _delimited(_text(file, where), suffix == ".tsv", where)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or first_line(error)}.") from error
    twice = [name for i, name in enumerate(table.columns) if name and name in table.columns[:i]]
    if twice:
        raise ValueError(f"{where} has the column {twice[0]!r} more than once: rename or drop one of them.")
    return table


def _class_names(features: Features) -> dict[str, tuple[str, ...]]:
    """The class names of columns of classes and of lists of classes."""
    kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    return {name: tuple(kind.names) for name, kind in kinds.items() if isinstance(kind, ClassLabel)}


def _parquet(file: Path, where: str) -> Table:
    def guarded(call: Callable[[], _T]) -> _T:
        try:
            return call()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read as Parquet: {first_line(error)}.") from error

    schema: pyarrow.Schema = guarded(lambda: pyarrow.parquet.read_schema(file))

    def read(name: str) -> list[Any]:
        return guarded(lambda: list(pyarrow.parquet.ParquetFile(file).read(columns=[name]).column(0).to_pylist()))

    described = b"huggingface" in (schema.metadata or {})
    names = _class_names(Features.from_arrow_schema(schema)) if described else {}
    return Table(where, tuple(schema.names), read, True, names)


def _text(file: Path, where: str) -> str:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{where} is not text in UTF-8 (line {line}): save it in that encoding.") from error
    if "\0" in text:
        raise ValueError(f"{where} holds binary data in line {text[: text.index(chr(0))].count(chr(10)) + 1}.")
    return text


def _objects(text: str, where: str) -> list[dict[str, Any]]:
    try:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            # A file of one object a line is no JSON document from its second line on.
            if error.msg != "Extra data":
                raise
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{where} cannot be read as JSON, neither as a list of objects nor as one object a line: {error}."
        ) from error
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{where} must hold objects like {{'text': 'fine', 'label': 1}}: row {number} is none.")
    return rows


def _from_objects(rows: list[dict[str, Any]], where: str) -> Table:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(where, columns, lambda name: [row.get(name) for row in rows])


def _records(text: str, **options: Any) -> list[list[str]]:
    # Texts may be longer than what the reader takes for a field by default, 131072 characters.
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), strict=True, **options) if row]
    finally:
        csv.field_size_limit(limit)


def _unquoted_or_quoted(text: str) -> list[list[str]]:
    """Many TSV files do not quote; there, a quote that opens a text would swallow the rows after it."""
    plain = _records(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        quoted = _records(text, delimiter="\t")
    except csv.Error:
        return plain
    if len(plain) != len(quoted) and all(len(row) == len(plain[0]) for row in plain):
        return plain
    return quoted


def _delimited(text: str, tabs: bool, where: str) -> Table:
    name = "tabs" if tabs else "commas"
    try:
        rows = _unquoted_or_quoted(text) if tabs else _records(text, delimiter=",")
    except csv.Error as error:
        raise ValueError(
            f"{where} cannot be read as columns separated by {name}: {error}. A quote inside a quoted text must be "
            "doubled."
        ) from error
    if not rows:
        raise ValueError(f"{where} must hold at least one row, got none.")
    header, body = [column.strip() for column in rows[0]], rows[1:]
    wrong = next((i for i, row in enumerate(body) if len(row) != len(header)), None)
    if wrong is not None:
        raise ValueError(
            f"{where} has {len(header)} columns, but row {wrong + 1} has {len(body[wrong])}: "
            f"columns must be separated by {name}, and texts that hold one quoted."
        )
    if len(header) == 1 and any(other in header[0] for other in ",;\t|"):
        raise ValueError(f"{where} has only the column {header[0]!r}: its columns must be separated by {name}.")
    return Table(where, tuple(header), lambda name: [row[header.index(name)] for row in body], typed=False)
