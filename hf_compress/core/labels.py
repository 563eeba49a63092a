"""Labels are matched by name: which output of one model means which output, or which class of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def says_nothing(names: Sequence[str]) -> bool:
    """Whether label names are those that transformers gives when nobody names them.

    Example:
        >>> says_nothing(["LABEL_0", "LABEL_1"]), says_nothing(["LABEL_1", "LABEL_0"])
        (True, False)
    """
    return all(name == f"LABEL_{place}" for place, name in enumerate(names))


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()


def places_by_name(ours: Sequence[str], theirs: Sequence[str]) -> list[int | None]:
    """For each of our label names its place among theirs, None where they have no such name.

    Case, spaces and underscores make a difference only where names differ by nothing else.

    Example:
        >>> places_by_name(["not_entailment", "entailment"], ["Entailment", "Not entailment"])
        [1, 0]
    """
    fold: Callable[[str], str] = _folded
    if any(len({_folded(name) for name in names}) < len(names) for names in (ours, theirs)):
        fold = str.strip
    places = {fold(name): place for place, name in enumerate(theirs)}
    return [places.get(fold(name)) for name in ours]
