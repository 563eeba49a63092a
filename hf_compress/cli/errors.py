"""Tells errors of the user's input, which take one line, from errors of the program, which need a traceback."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path


_PACKAGE = str(Path(__file__).resolve().parents[1])
_RAISE = dis.opmap["RAISE_VARARGS"]


class BadInput(ValueError):
    """An error that the user can correct; it becomes exit code 2 and one line."""


def is_bad_input(error: BaseException) -> bool:
    """Say whether an exception tells the user what to change.

    A `ValueError` does if a `raise` statement of this package, or of one that adds a method, threw it: that is how
    library code refuses input. One from another library, or from an expression such as `int(...)` or a failed
    unpacking in our own code, was not foreseen and is a bug. A subclass of `ValueError` would be plainer, but then
    each of some 350 checks, those of other packages included, would have to raise it, and a forgotten one would turn a
    mistake of the user into a traceback; the file of the `raise` is always known. An `OSError` does if it names a
    file or a reason (a full disk, a folder without write permission).

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


def _packages() -> Iterator[str]:
    """The folders of this package and, once methods are loaded, of those that add some."""
    yield _PACKAGE
    loaded = sys.modules.get("hf_compress.methods")
    for method in loaded.METHODS.values() if loaded is not None else ():
        home = sys.modules[method.config_class.__module__.partition(".")[0]]
        yield str(Path(str(home.__file__)).resolve().parent)


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    inside = str(Path(code.co_filename).resolve()).startswith(tuple(_packages()))
    return inside and code.co_code[trace.tb_lasti] == _RAISE


def describe(error: BaseException) -> str:
    """Describe an exception in the one line that the user reads.

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
