"""Which answers a compressed model changed: how many were lost and gained, and examples of the lost ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_compress.report.quality import Answers


_EXAMPLES, _CHARACTERS = 5, 80


def changed_answers(
    before: Answers, after: Answers, text_of: Callable[[int], str], names: Sequence[str]
) -> dict[str, Any] | None:
    """Compare the classes that two models chose for the same examples.

    Args:
        before, after: Of the baseline and of the model.
        text_of: Gives the text of a row.
        names: Of the classes; their numbers stand for missing ones.

    Returns:
        `both_right`, `lost`, `gained`, `both_wrong` (counts) and `examples` of what was lost; None for regression.
    """
    if before.logits.shape[-1] == 1:
        return None
    old, new = before.logits.argmax(-1), after.logits.argmax(-1)
    was, is_ = old == before.labels, new == after.labels

    def name(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    return {
        "both_right": int((was & is_).sum()),
        "lost": int((was & ~is_).sum()),
        "gained": int((~was & is_).sum()),
        "both_wrong": int((~was & ~is_).sum()),
        "examples": [
            {"text": _cut(text_of(int(row))), "label": name(int(old[row])), "answer": name(int(new[row]))}
            for row in (was & ~is_).nonzero()[0][:_EXAMPLES]
        ],
    }


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..."
