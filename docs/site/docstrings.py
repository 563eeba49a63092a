"""Docstrings as the API reference reads them: one entry for each parameter, doctests as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*)$")


def for_the_reference(docstring: str) -> str:
    """A docstring whose parameters stand alone (`a, b: text` is one entry for both), with its doctest named as such.

    Example:
        >>> print(for_the_reference("Sum.\\n\\nArgs:\\n    a, b: Numbers.\\n\\nExample:\\n    >>> 1\\n    1"))
        Sum.
        <BLANKLINE>
        Args:
            a: Numbers.
            b: Numbers.
        <BLANKLINE>
        Examples:
            >>> 1
            1
    """
    entries: list[list[str]] = []
    for line in docstring.splitlines():
        deeper = bool(entries) and len(entries[-1]) > 1 and bool(re.match(r" {8,}\S", line))
        if deeper:
            entries[-1] = [f"{entry}\n{line}" for entry in entries[-1]]
        elif match := _SHARED.match(line):
            entries.append([f"{match[1]}{name}: {match[3]}" for name in match[2].split(", ")])
        else:
            entries.append(["Examples:" if line == "Example:" else line])
    return "\n".join(entry for group in entries for entry in group)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = for_the_reference(obj.docstring.value)
