"""Turns errors of other libraries into one line about bad input."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


# The errors that transformers, safetensors, torch and json raise for broken, truncated and foreign files.
BROKEN_FILE = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if the message is empty.

    If the first line only introduces a list, as in torch's errors of `load_state_dict`, the second line is added.

    Example:
        >>> first_line(OSError("no such file\\nhint"))
        'no such file'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def one_line(about: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise errors of the given classes as a `ValueError` of one line.

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
