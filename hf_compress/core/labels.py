"""Matches labels by name: the outputs of one model with those of another, or with the classes of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def says_nothing(names: Sequence[str]) -> bool:
    """Whether label names are only transformers' defaults (LABEL_0, LABEL_1, ...).

    Example:
        >>> says_nothing(["LABEL_0", "LABEL_1"]), says_nothing(["LABEL_1", "LABEL_0"])
        (True, False)
    """
    return all(name == f"LABEL_{place}" for place, name in enumerate(names))


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()


def places_by_name(ours: Sequence[str], theirs: Sequence[str]) -> list[int | None]:
    """Find for each of our label names its index among theirs; None if they have no such name.

    Case, spaces and underscores count only if names differ by nothing else.

    Example:
        >>> places_by_name(["not_entailment", "entailment"], ["Entailment", "Not entailment"])
        [1, 0]
    """
    fold: Callable[[str], str] = _folded
    if any(len({_folded(name) for name in names}) < len(names) for names in (ours, theirs)):
        fold = str.strip
    places = {fold(name): place for place, name in enumerate(theirs)}
    return [places.get(fold(name)) for name in ours]
