"""Errors of other libraries in one line, as bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its class where it says nothing.

    Example:
        >>> first_line(OSError("no such file\\nhint"))
        'no such file'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def one_line(about: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise errors of these classes as a `ValueError` of one line.

    Args:
        about: What failed; the message begins with it.
        kinds: Classes of errors.

    Example:
        >>> with one_line("config.json cannot be read", OSError):
        ...     raise OSError("no such file")
        Traceback (most recent call last):
        ValueError: config.json cannot be read: no such file
    """
    try:
        yield
    except kinds as error:
        raise ValueError(f"{about}: {first_line(error)}") from error
