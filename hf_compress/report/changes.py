"""Counts the answers that a compressed model lost and gained, and lists examples of the lost ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_compress.tasks.answers import Answers


_EXAMPLES, _CHARACTERS = 5, 80


def changed_answers(before: Answers, after: Answers, text_of: Callable[[int], str]) -> dict[str, Any] | None:
    """Compare the answers of two models to the same examples.

    Args:
        before, after: Of the baseline and of the model.
        text_of: Gives the text of an example.

    Returns:
        `both_right`, `lost`, `gained`, `both_wrong` (counts) and `examples` of what was lost; None where answers are
        not right or wrong.
    """
    was, is_ = before.right(), after.right()
    if was is None or is_ is None:
        return None
    lost = [int(example) for example in (was & ~is_).nonzero()[0][:_EXAMPLES]]
    return {
        "both_right": int((was & is_).sum()),
        "lost": int((was & ~is_).sum()),
        "gained": int((~was & is_).sum()),
        "both_wrong": int((~was & ~is_).sum()),
        "examples": [
            {
                "text": _cut(text_of(example)),
                "label": before.describe(example)[0],
                "answer": after.describe(example)[1],
            }
            for example in lost
        ],
    }


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..."
