"""Collects what stages print and log in one file, so that the terminal shows the progress of the recipe alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


FILE = "recipe.log"
# Libraries whose handlers write to the terminal on their own.
_PACKAGE = __name__.partition(".")[0]
_OWN_HANDLERS = ("transformers", "datasets", "huggingface_hub", "optuna", _PACKAGE)


class WarningCount(logging.Handler):
    """Counts the warnings of this package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.found += record.name.startswith(_PACKAGE)


@contextmanager
def logged_to(file: Path) -> Iterator[WarningCount]:
    """Append to a file all that the block prints, warns of and logs; nothing of it reaches the terminal.

    Yields:
        How many warnings of this package are among it.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(open(file, "a", encoding="utf-8", buffering=1))
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        root = logging.getLogger()
        count = WarningCount()
        stack.enter_context(_handlers(root, [handler, count], root.propagate))
        for name in _OWN_HANDLERS:
            stack.enter_context(_handlers(logging.getLogger(name), [], True))
        stack.enter_context(redirect_stdout(stream))
        stack.enter_context(redirect_stderr(stream))
        yield count


@contextmanager
def _handlers(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> Iterator[None]:
    before = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = handlers, propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before
