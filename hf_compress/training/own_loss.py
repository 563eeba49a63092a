"""Checks that a class derived from a user's trainer and one of ours still computes our loss."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


logger = logging.getLogger(__name__)


class OwnLoss:
    """Finds a `compute_loss` of a user that hides ours.

    Args:
        kind: The class of a trainer.
        ours: The class whose `compute_loss` shall run.

    Raises:
        ValueError: If a mixin's `compute_loss` hides ours and cannot call it; names its class and the remedy.
    """

    def __init__(self, kind: type, ours: type) -> None:
        self.kind, self.ours = kind, ours
        self._computed = self._told = False
        owner = self._first_with_loss()
        code = getattr(vars(owner)["compute_loss"], "__code__", None)
        if issubclass(owner, ours) or code is None:
            return
        # What names another `compute_loss`, or wraps a function, may come to ours: the first training step tells.
        if "compute_loss" not in code.co_names and not code.co_freevars:
            raise ValueError(self._explanation())

    def _first_with_loss(self) -> type:
        return next(base for base in self.kind.__mro__ if "compute_loss" in vars(base))

    def _explanation(self) -> str:
        owner, kind = self._first_with_loss(), self.kind
        other = next(base for base in kind.__mro__[1:] if issubclass(base, self.ours))
        return (
            f"{owner.__name__}.compute_loss replaces that of {other.__name__}: what it adds to the loss, such as a "
            f"teacher's terms, is left out. Let it call super().compute_loss(...), name {other.__name__} first "
            f"(class {kind.__name__}({other.__name__}, ...)), or override loss_terms instead."
        )

    def computed(self) -> None:
        """Called by our `compute_loss`."""
        self._computed = True

    @contextlib.contextmanager
    def required(self) -> Iterator[None]:
        """Say once when the block, a training step, was made without our loss.

        Raises:
            ValueError: If that was a mixin's doing; a class derived from ours may mean to replace the loss.
        """
        self._computed = False
        yield
        if self._computed or self._told:
            return
        self._told = True
        if not issubclass(self._first_with_loss(), self.ours):
            raise ValueError(self._explanation())
        logger.warning(self._explanation())
