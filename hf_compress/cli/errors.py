"""What went wrong: the user's input, which one line can say, or the program, which needs a traceback."""

from __future__ import annotations

import dis
import sys
from pathlib import Path


_PACKAGE = str(Path(__file__).resolve().parents[1])
_RAISE = dis.opmap["RAISE_VARARGS"]


class BadInput(ValueError):
    """Something the user can put right; becomes exit code 2 and one line."""


def is_bad_input(error: BaseException) -> bool:
    """Whether an exception tells the user what to change.

    A `ValueError` does when a `raise` statement of this package threw it: that is how library code refuses input.
    One that comes out of another library, or out of an expression such as `int(...)` or a failed unpacking in our own
    code, was not foreseen and is a bug. An `OSError` does when it names a file or a reason (a full disk, a folder
    without write permission).

    Example:
        >>> is_bad_input(BadInput("mac_ratio must be in (0, 1], got 2."))
        True
        >>> try:
        ...     int("two")
        ... except ValueError as error:
        ...     is_bad_input(error)
        False
    """
    if isinstance(error, OSError):
        return error.filename is not None or error.errno is not None
    if isinstance(error, BadInput):
        return True
    return isinstance(error, ValueError) and _raised_here(error)


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    inside = str(Path(code.co_filename).resolve()).startswith(_PACKAGE)
    return inside and code.co_code[trace.tb_lasti] == _RAISE


def describe(error: BaseException) -> str:
    """The one line that the user reads.

    Example:
        >>> describe(FileNotFoundError(2, "No such file or directory", "data.csv"))
        'No such file or directory: data.csv'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str) -> int:
    """Print one line to standard error and give the exit code of bad input."""
    print(f"hf-compress: {' '.join(message.split())}", file=sys.stderr)
    return 2
