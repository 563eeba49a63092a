"""Whether a class made of a user's trainer and one of ours still computes our loss."""

from __future__ import annotations

import logging


logger = logging.getLogger(__name__)


def _first_with_loss(kind: type) -> type:
    return next(base for base in kind.__mro__ if "compute_loss" in vars(base))


def _explanation(kind: type, ours: type) -> str:
    owner = _first_with_loss(kind)
    other = next(base for base in kind.__mro__[1:] if issubclass(base, ours))
    return (
        f"{owner.__name__}.compute_loss replaces that of {other.__name__}: what it adds to the loss, such as a "
        f"teacher's terms, is left out. Let it call super().compute_loss(...), name {other.__name__} first "
        f"(class {kind.__name__}({other.__name__}, ...)), or override loss_terms instead."
    )


def require_our_loss(kind: type, ours: type) -> None:
    """Refuse a class in which a mixin's `compute_loss` hides ours and cannot call it.

    Args:
        kind: The class of a trainer.
        ours: The class whose `compute_loss` shall run.

    Raises:
        ValueError: Names the class that hides it, and the remedy.
    """
    owner = _first_with_loss(kind)
    code = getattr(vars(owner)["compute_loss"], "__code__", None)
    if issubclass(owner, ours) or code is None:
        return
    # What names another `compute_loss`, or wraps a function, may come to ours: the first training step tells.
    if "compute_loss" not in code.co_names and not code.co_freevars:
        raise ValueError(_explanation(kind, ours))


def report_other_loss(kind: type, ours: type) -> None:
    """Say that a training step was made without our loss.

    Raises:
        ValueError: If that was a mixin's doing; a class derived from ours may mean to replace the loss.
    """
    if not issubclass(_first_with_loss(kind), ours):
        raise ValueError(_explanation(kind, ours))
    logger.warning(_explanation(kind, ours))
