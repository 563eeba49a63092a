"""Finds the columns of a table that hold texts and labels, and checks every row of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_compress.core.table_files import Table
from hf_compress.tasks.arguments import DataArguments


# The usual names; pairs come first, and earlier ones win.
_PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("text1", "text2"), ("text_a", "text_b"), ("text", "text_pair"), ("query", "passage"), ("anchor", "positive"),
)  # fmt: skip
_STANDARD_TEXTS = ("sentence", "text")
_OTHER_TEXTS = (
    "utterance", "query", "question", "review", "content", "comment", "message", "tweet", "document", "body",
)  # fmt: skip
_OTHER_LABELS = ("labels", "intent", "target", "category", "class", "sentiment", "topic", "emotion")


def _named(table: Table, name: str) -> str | None:
    """The column of that name, in whatever case."""
    if name in table.columns:
        return name
    return next((column for column in table.columns if column.casefold() == name), None)


def _only(table: Table, names: Sequence[str], flag: str) -> str | None:
    found = [column for name in names if (column := _named(table, name)) is not None]
    if len(found) > 1:
        raise ValueError(f"{table.where} has the columns {' and '.join(found)}: choose one with --{flag}.")
    return found[0] if found else None


def _given(table: Table, flag: str, name: str) -> str:
    if name not in table.columns:
        raise ValueError(f"{flag} {name!r} is no column of {table.where}, which has {_listed(table)}.")
    return name


def _listed(table: Table) -> str:
    return ", ".join(name or "(a column without a name)" for name in table.columns)


def text_columns(
    table: Table, text: str | None = None, pair: str | None = None, known: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """The column of texts, or the two of pairs.

    Args:
        table: Where to look.
        text, pair: The user's choice, if any.
        known: What a published task calls them.

    Raises:
        ValueError: Lists the columns and names the flags.
    """
    if pair is not None and text is None:
        raise ValueError(f"text_pair_column {pair!r} needs text_column, which names the first text of each pair.")
    if text is not None:
        chosen = [("text_column", text), *([("text_pair_column", pair)] if pair is not None else [])]
        if text == pair:
            raise ValueError(f"text_column and text_pair_column must be two columns, got {text!r} for both.")
        return tuple(_given(table, flag, name) for flag, name in chosen)
    for names in ([known] if known else []) + [*_PAIRS, *((name,) for name in _STANDARD_TEXTS)]:
        found = tuple(column for name in names if (column := _named(table, name)) is not None)
        if len(found) == len(names):
            return found
    other = _only(table, _OTHER_TEXTS, "text_column")
    if other is None:
        raise ValueError(
            f"{table.where} has the columns {_listed(table)}: name the one with the texts by --text_column (for "
            f"pairs, --text_pair_column too), or call it {', '.join((*_STANDARD_TEXTS, *_OTHER_TEXTS[:4]))}."
        )
    return (other,)


def label_column(table: Table, given: str | None = None) -> str:
    """The column of labels.

    Raises:
        ValueError: Lists the columns and names the flag.
    """
    if given is not None:
        return _given(table, "label_column", given)
    found = _named(table, "label") or _only(table, _OTHER_LABELS, "label_column")
    if found is None:
        raise ValueError(
            f"{table.where} has the columns {_listed(table)}: name the one with the labels by --label_column, or call "
            f"it {', '.join(('label', *_OTHER_LABELS[:5]))} (missing: label)."
        )
    return found


def find_column(table: Table, given: str | None, usual: Sequence[str]) -> str | None:
    """The column that the user named, or the first of the usual ones that a table has; None where it has none."""
    if given is not None:
        return given if given in table.columns else None
    return next((found for name in usual if (found := _named(table, name)) is not None), None)


def chosen_column(table: Table, given: str | None, flag: str, what: str, usual: Sequence[str]) -> str:
    """The column that the user named, or the only usual one.

    Args:
        table: Where to look.
        given: The user's choice, if any.
        flag: That names it.
        what: Stands in it.
        usual: Its usual names.

    Raises:
        ValueError: Lists the columns and names the flag.
    """
    if given is not None:
        return _given(table, flag, given)
    found = _only(table, usual, flag)
    if found is None:
        raise ValueError(
            f"{table.where} has the columns {_listed(table)}: name the one with the {what} by --{flag}, or call it "
            f"{', '.join(usual)}."
        )
    return found


def finds_texts(table: Table, args: DataArguments) -> bool:
    """Whether a table has columns of texts, named by the user or as usual."""
    return _found(lambda: text_columns(table, args.text_column, args.text_pair_column))


def finds_label(table: Table, args: DataArguments) -> bool:
    """Whether a table has a column of labels, named by the user or as usual."""
    return _found(lambda: label_column(table, args.label_column))


def _found(choose: Callable[[], object]) -> bool:
    try:
        choose()
    except ValueError:
        return False
    return True


def require_columns(table: Table, columns: Sequence[str]) -> None:
    """Raise `ValueError` unless a split has the columns that another one has."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(
            f"{table.where} must have the columns {', '.join(columns)} of the other splits; it has {_listed(table)} "
            f"(missing: {', '.join(missing)})."
        )


def read_texts(table: Table, columns: Sequence[str], lenient: bool = False) -> dict[str, list[str]]:
    """The texts of every row.

    Args:
        table, columns: Where they are.
        lenient: Whether one text of a pair may be empty, as in QQP as it was published.

    Raises:
        ValueError: Names the column and the first row whose text is missing, empty or no text.
    """
    texts = {column: table.read(column) for column in columns}
    if not texts[columns[0]]:
        raise ValueError(f"{table.where} must hold at least one row, got none.")
    empty: list[set[int]] = []
    for column, values in texts.items():
        for number, value in enumerate(values, 1):
            if value is None or not isinstance(value, str):
                raise ValueError(f"{table.where}: {column} must be a text in every row, row {number} {_has(value)}.")
        empty.append({number for number, value in enumerate(values, 1) if not value.strip()})
    both = lenient and len(columns) == 2
    blank = set.intersection(*empty) if both else set.union(*empty)
    if blank:
        number = min(blank)
        column = next(name for name, rows in zip(columns, empty, strict=True) if number in rows)
        raise ValueError(
            f"{table.where}: {column} must not be empty, row {number} is ({len(blank)} such "
            f"row{'s' if len(blank) > 1 else ''}): fill in or drop them."
        )
    return texts


def _has(value: Any) -> str:
    if value is None:
        return "has none"
    shown = repr(value)
    return f"has {shown[:60]}{'...' if len(shown) > 60 else ''} ({type(value).__name__})"
