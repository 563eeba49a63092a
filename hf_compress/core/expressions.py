"""Regular expressions that select modules by name. They come from files, too, so none may take for ever."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import regex


# The longest expression, and the largest product of its repetition counts: compiling unrolls them.
_LENGTH, _COUNTS = 1000, 1000
# For one expression on one name; ordinary ones take microseconds.
_SECONDS = 0.2


def check_expressions(field: str, expressions: Iterable[str]) -> None:
    """Refuse what is no regular expression, or one that is too large.

    Args:
        field: The name of the setting, for messages.
        expressions: In the syntax of Python's `re`.

    Raises:
        ValueError: Names the expression.
    """
    for expression in expressions:
        counts = [
            max(map(int, filter(None, pair))) for pair in re.findall(r"\{(\d*),?(\d*)\}", expression) if any(pair)
        ]
        if len(expression) > _LENGTH or math.prod(counts) > _COUNTS:
            raise ValueError(
                f"{field} must be regular expressions of at most {_LENGTH} characters that repeat nothing more than "
                f"{_COUNTS} times, got {expression[:80]!r}."
            )
        try:
            re.compile(expression)
            regex.compile(expression)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{field} must be regular expressions, got {expression!r}: {error}.") from error


def matches(name: str, expressions: Sequence[str]) -> bool:
    """Whether one of some checked expressions is found in a module's name.

    Raises:
        ValueError: If that takes too long to find out.

    Example:
        >>> matches("encoder.layer.0.attention.query", ["query$"])
        True
    """
    for expression in expressions:
        try:
            if regex.search(expression, name, timeout=_SECONDS):
                return True
        except TimeoutError as error:
            raise ValueError(
                f"The expression {expression!r} takes more than {_SECONDS} s on the name {name!r}: repeat no group "
                "that holds repetitions or alternatives that overlap."
            ) from error
    return False
