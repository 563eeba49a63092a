"""Reads a column of labels: classes as texts or ids, or scores."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.core.table_files import Table


logger = logging.getLogger(__name__)

NUMBER = re.compile(r"-?(0|[1-9]\d*)")
_GENERIC = re.compile(r"LABEL_(0|[1-9]\d*)", re.IGNORECASE)
_BOOLEANS = {"false": False, "true": True}


@dataclass(frozen=True)
class Labels:
    """The label column of all splits.

    Args:
        values: Split -> a class id for every row, or a score for regression.
        names: Class names in the order of the ids; empty for regression.
        numbers: The ids that the files give the classes; None where they name them by texts.
        declared: Whether the files list their classes.
        first_rows: Split -> name -> the first row (from 1) that has it.
    """

    values: Mapping[str, list[int] | list[float]]
    names: tuple[str, ...]
    numbers: tuple[int, ...] | None = None
    declared: bool = False
    first_rows: Mapping[str, Mapping[str, int]] | None = None

    def task_fields(self) -> dict[str, Any]:
        """The fields of a `LabelledTask` that its column of labels decides."""
        return {
            "label_names": self.names,
            "numbers": self.numbers,
            "declared": self.declared,
            "first_rows": self.first_rows or {},
        }


def _refuse(table: Table, column: str, row: int, what: str) -> None:
    raise ValueError(f"{table.where}: {column} {what} in row {table.row_of(row)}.")


def _is_empty(value: Any, typed: bool) -> bool:
    if isinstance(value, str):
        return not value.strip() or (not typed and value.strip().lower() == "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _raw(table: Table, column: str) -> list[Any]:
    """The values of one split, of one kind: bool, int, float or str."""
    values = table.read(column)
    for row, value in enumerate(values, 1):
        if _is_empty(value, table.typed):
            raise ValueError(
                f"{table.where}: {column} must be filled in every row, it is empty in row {table.row_of(row)} "
                f"({sum(_is_empty(v, table.typed) for v in values)} in all)."
            )
        if not isinstance(value, bool | int | float | str):
            _refuse(table, column, row, f"must be one class or number, got {value!r} ({type(value).__name__})")
        if isinstance(value, float) and math.isinf(value):
            _refuse(table, column, row, "must be finite, got infinity")
    return [value.strip() if isinstance(value, str) else value for value in values]


def _parsed(value: str) -> int | float | str:
    """The number in a cell of a file without types, or its text."""
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        # Python also reads 1_000 and nan.
        return number if "_" not in value and math.isfinite(number) else value
    return value


def _as_text(value: str) -> str:
    return value


def _reading(values: Mapping[str, list[Any]], typed: bool) -> Callable[[str], Any]:
    """What the texts of a label column mean: ids where all are digits or LABEL_0, LABEL_1, ..., else names."""
    texts = {value for rows in values.values() for value in rows if isinstance(value, str)}
    if not typed and all(text.lower() in _BOOLEANS for text in texts):
        return lambda text: _BOOLEANS[text.lower()]
    if not typed:
        # Also beside a split with types: 1 in a CSV file is 1 in a Parquet file.
        return (lambda text: int(text[6:])) if all(map(_GENERIC.fullmatch, texts)) else _parsed
    if all(isinstance(value, str) for rows in values.values() for value in rows):
        for pattern, start in ((NUMBER, 0), (_GENERIC, 6)):
            if all(map(pattern.fullmatch, texts)):
                return lambda text: int(text[start:])
    return _as_text


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a text" if isinstance(value, str) else "a number"


def _of_one_kind(tables: Mapping[str, Table], values: dict[str, list[Any]], column: str) -> None:
    first: tuple[str, int, Any] | None = None
    for split, rows in values.items():
        for row, value in enumerate(rows, 1):
            if first is None:
                first = (split, row, value)
            elif _kind(value) != _kind(first[2]):
                here, there = tables[split].row_of(row), tables[first[0]].row_of(first[1])
                raise ValueError(
                    f"{tables[split].where}: {column} is {_kind(value)} in row {here} ({value!r}), but "
                    f"{_kind(first[2])} in row {there} of {first[0]} ({first[2]!r}): write all labels alike."
                )


def read_labels(tables: Mapping[str, Table], column: str, known_labels: int | None = None) -> Labels:
    """The labels of all splits as ids or scores.

    Args:
        tables: Split -> its table.
        column: Where labels stand.
        known_labels: How many labels the published task has; 1 is regression.

    Raises:
        ValueError: Names file, column and the first row that is empty, of another kind, or -1.
    """
    names = next((t.class_names[column] for t in tables.values() if column in t.class_names), None)
    values = {split: _raw(table, column) for split, table in tables.items()}
    read = _reading(values, all(table.typed for table in tables.values()))
    values = {split: [read(v) if isinstance(v, str) else v for v in rows] for split, rows in values.items()}
    _of_one_kind(tables, values, column)
    found = {value for rows in values.values() for value in rows}
    floats = any(isinstance(value, float) for value in found)
    if known_labels == 1 or (floats and not (known_labels and all(float(v).is_integer() for v in found))):
        if any(isinstance(value, str) for value in found):
            raise ValueError(f"{column} must hold scores for regression, got {sorted(map(str, found))[:5]}.")
        return Labels({s: [float(v) for v in rows] for s, rows in values.items()}, ())
    if names is not None and not all(isinstance(value, str) for value in found):
        return _declared(tables, values, column, names)
    return _occurring(tables, values, column, sorted(found))


def _first_rows(values: Mapping[str, list[Any]], name_of: Mapping[Any, str]) -> dict[str, dict[str, int]]:
    first: dict[str, dict[str, int]] = {}
    for split, rows in values.items():
        first[split] = {}
        for row, value in enumerate(rows, 1):
            first[split].setdefault(name_of[value], row)
    return first


def _rows_of(tables: Mapping[str, Table], first: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {split: {n: tables[split].row_of(place) for n, place in rows.items()} for split, rows in first.items()}


def _declared(
    tables: Mapping[str, Table], values: Mapping[str, list[Any]], column: str, names: tuple[str, ...]
) -> Labels:
    for split, table in tables.items():
        own = table.class_names.get(column, names)
        if own != names:
            raise ValueError(f"{table.where}: {column} has the classes {', '.join(own)}, other splits {names}.")
        for row, value in enumerate(values[split], 1):
            if not 0 <= value < len(names):
                _refuse(table, column, row, f"must be in 0..{len(names) - 1} ({', '.join(names)}), got {value}")
    ids = {s: [int(v) for v in rows] for s, rows in values.items()}
    first = _first_rows(ids, dict(enumerate(names)))
    generic = all(name == f"LABEL_{i}" or name == str(i) for i, name in enumerate(names))
    return Labels(ids, names, tuple(range(len(names))) if generic else None, True, _rows_of(tables, first))


def _occurring(
    tables: Mapping[str, Table], values: Mapping[str, list[Any]], column: str, found: Sequence[Any]
) -> Labels:
    numbers, names = None, tuple(map(str, found))
    if not isinstance(found[0], str):
        numbers = tuple(int(value) for value in found)
        if min(numbers) < 0:
            split, row = next((s, rows.index(min(found)) + 1) for s, rows in values.items() if min(found) in rows)
            hint = " (-1 marks rows without a label: drop them)" if min(numbers) == -1 else ""
            _refuse(tables[split], column, row, f"must be a class id of 0 or more{hint}, got {min(numbers)}")
        if isinstance(found[0], bool):
            names = tuple(str(bool(value)) for value in found)
        elif numbers == tuple(range(len(numbers))):
            names = tuple(f"LABEL_{number}" for number in numbers)
        else:
            names = tuple(map(str, numbers))
    places = {value: i for i, value in enumerate(found)}
    ids = {s: [places[v] for v in rows] for s, rows in values.items()}
    first = _first_rows(values, dict(zip(found, names, strict=True)))
    return Labels(ids, names, numbers, False, _rows_of(tables, first))


def without_unlabelled_test(tables: Mapping[str, Table], column: str) -> dict[str, Table]:
    """GLUE publishes test splits without labels, or with -1 in all rows: there is nothing to measure on them."""
    test = tables.get("test")
    if test is None or len(tables) == 1:
        return dict(tables)
    if column in test.columns and not all(str(label) in ("-1", "-1.0") for label in test.read(column)):
        return dict(tables)
    logger.warning("%s has no labels: it is left out.", test.where)
    return {split: table for split, table in tables.items() if split != "test"}
