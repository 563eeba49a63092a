"""Collects what stages print and log in one file, so that the terminal shows the progress of the recipe alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


FILE = "recipe.log"
# Libraries whose handlers write to the terminal on their own.
_OWN_HANDLERS = ("transformers", "datasets", "huggingface_hub", "hf_compress")


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Append to a file all that the block prints, warns of and logs; nothing of it reaches the terminal."""
    with ExitStack() as stack:
        stream = stack.enter_context(open(file, "a", encoding="utf-8", buffering=1))
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        root = logging.getLogger()
        stack.enter_context(_handlers(root, [handler], root.propagate))
        for name in _OWN_HANDLERS:
            stack.enter_context(_handlers(logging.getLogger(name), [], True))
        stack.enter_context(redirect_stdout(stream))
        stack.enter_context(redirect_stderr(stream))
        yield


@contextmanager
def _handlers(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> Iterator[None]:
    before = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = handlers, propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before
