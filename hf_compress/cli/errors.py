"""What went wrong: the user's input, which one line can say, or the program, which needs a traceback."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path


_PACKAGE = str(Path(__file__).resolve().parents[1])
_RAISE = dis.opmap["RAISE_VARARGS"]


class BadInput(ValueError):
    """Something the user can put right; becomes exit code 2 and one line."""


def is_bad_input(error: BaseException) -> bool:
    """Whether an exception tells the user what to change.

    A `ValueError` does when a `raise` statement of this package, or of one that adds a method, threw it: that is how
    library code refuses input. One that comes out of another library, or out of an expression such as `int(...)` or a
    failed unpacking in our own code, was not foreseen and is a bug. A subclass of `ValueError` would say so more
    plainly, but only if every one of some 350 checks, those of methods in other packages included, raised it, and each
    that forgot would turn a user's mistake into a traceback; where an error was raised is known without anybody's
    help. An `OSError` does when it names a file or a reason (a full disk, a folder without write permission).

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
