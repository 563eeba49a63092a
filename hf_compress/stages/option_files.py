"""Reads options from YAML files; a name that is no option is refused with the nearest one that is."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, but it refuses a name that occurs twice instead of taking its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} occurs twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_options(file: str, noun: str = "config") -> dict[Any, Any]:
    """Read a YAML file of 'name: value' lines.

    Args:
        file: The file.
        noun: What messages call it.

    Raises:
        ValueError: If it cannot be read, is not valid YAML, names something twice, or holds anything else.
    """
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{noun} must be a readable YAML file, got {file!r}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{noun} {file!r} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{noun} must hold 'name: value' lines, got {type(content).__name__} in {file!r}.")
    return content


def nearest(name: str, known: Iterable[str], alike: float = 0.5) -> str:
    """Say which known name a wrong one may stand for; empty where none is near.

    Args:
        name: What a user wrote.
        known: The names that exist.
        alike: How alike they must be, from 0 to 1.

    Example:
        >>> nearest("mac_ration", ["mac_ratio", "seed"])
        " Did you mean 'mac_ratio'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=alike)
    return f" Did you mean {near[0]!r}?" if near else ""


def reject_unknown(names: Iterable[Any], known: Sequence[str], where: str) -> None:
    """Raise `ValueError` for the first name that is no option.

    Args:
        names: What a user wrote.
        known: The options.
        where: Where they were written, for the message.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: {name!r} is not an option; names are words, as in 'learning_rate: 1e-4'.")
        if name not in known:
            raise ValueError(f"{where}: {name!r} is not an option.{nearest(name, known)}")


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The types that a union joins; any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def takes_many(kind: Any) -> bool:
    """Whether an option of that type takes several values.

    Example:
        >>> takes_many(list[int] | None), takes_many(float)
        (True, False)
    """
    return any(get_origin(choice) in (list, tuple) for choice in choices_of(kind))
