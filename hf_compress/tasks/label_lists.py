"""Columns whose rows hold several labels: the tags of words, or the classes of a text that has more than one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from hf_compress.core.table_files import Table
from hf_compress.tasks.label_values import Labels, read_labels


@dataclass(frozen=True)
class LabelLists:
    """A column of lists of labels.

    Args:
        values: Split -> the class ids of every row.
        labels: What is known of the classes.
    """

    values: Mapping[str, list[list[int]]]
    labels: Labels


def holds_lists(table: Table, column: str) -> bool:
    """Whether a column begins with a list."""
    return isinstance(next(iter(table.read(column)), None), list | tuple)


def read_lists(table: Table, column: str) -> list[list[Any]]:
    """The lists of one split.

    Raises:
        ValueError: Names the first row that holds none.
    """
    values = table.read(column)
    for row, value in enumerate(values, 1):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{table.where}: {column} holds lists, but {value!r} in row {row}.")
    return [list(value) for value in values]


def read_label_lists(tables: Mapping[str, Table], column: str) -> LabelLists:
    """The labels of all splits as lists of class ids.

    Args:
        tables: Split -> its table.
        column: Where the lists stand.

    Raises:
        ValueError: Names file, column and the first row that holds no list, or an empty or odd label.
    """
    lists = {split: read_lists(table, column) for split, table in tables.items()}
    if not any(row for rows in lists.values() for row in rows):
        raise ValueError(f"{next(iter(tables.values())).where}: {column} has no label in any row.")
    labels = read_labels({split: _flat(tables[split], column, rows) for split, rows in lists.items()}, column)
    if not labels.names:
        raise ValueError(f"{column} must hold lists of classes; the lists hold numbers such as 0.5.")
    values = {}
    for split, rows in lists.items():
        bounds = [0, *accumulate(map(len, rows))]
        values[split] = [[int(label) for label in labels.values[split][a:b]] for a, b in pairwise(bounds)]
    return LabelLists(values, labels)


def _flat(table: Table, column: str, rows: list[list[Any]]) -> Table:
    ends = list(accumulate(map(len, rows)))
    flat = [value for row in rows for value in row]
    return replace(table, read=lambda name: flat, row_of=lambda place: bisect_right(ends, place - 1) + 1)
