"""Arguments of two trainers in one class, for a trainer that is derived from both."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments


_SUFFIXES = ("TrainingArguments", "Arguments", "Config")
# What was made before: the same class for the same two.
_MADE: dict[tuple[type, type], type[Any]] = {}


def join_arguments(ours: type[TrainingArguments], theirs: type[TrainingArguments]) -> type[Any]:
    """Make the class of arguments that has the fields of both.

    Written by hand, `class Both(ours, theirs)` would have the defaults of `TrainingArguments` in place of those that
    `theirs` changes, such as a learning rate: a dataclass takes over inherited fields from each of its bases.

    Args:
        ours: Arguments of a trainer of this package.
        theirs: Those of another one.

    Returns:
        One of them if it is derived from the other, and the same class for the same two at every call.

    Raises:
        ValueError: If both have added a field of the same name.

    Example:
        >>> from transformers import Seq2SeqTrainingArguments
        >>> from hf_compress.training.arguments import DistillationArguments
        >>> join_arguments(DistillationArguments, Seq2SeqTrainingArguments).__name__
        'DistillationSeq2SeqArguments'
    """
    if issubclass(ours, theirs):
        return ours
    if issubclass(theirs, ours):
        return theirs
    if (ours, theirs) not in _MADE:
        _MADE[ours, theirs] = _joined(ours, theirs)
    return _MADE[ours, theirs]


def _joined(ours: type[TrainingArguments], theirs: type[TrainingArguments]) -> type[Any]:
    usual, own, other = (
        {entry.name: entry for entry in dataclasses.fields(k)} for k in (TrainingArguments, ours, theirs)
    )
    twice = [name for name in other if name in own and name not in usual]
    if twice:
        raise ValueError(
            f"{ours.__name__} and {theirs.__name__} must not both have {', '.join(twice)}: one value would mean two "
            "things. Derive the trainer from another class."
        )
    changed = [entry for name, entry in other.items() if name not in usual or _default(entry) != _default(usual[name])]
    fields = [(entry.name, entry.type, _copied(entry)) for entry in changed]
    name = "".join(_stem(kind) for kind in (ours, theirs)) + "Arguments"
    made = dataclasses.make_dataclass(name, fields, bases=(ours, theirs), namespace={"__reduce__": _reduced})
    made.__module__, made.__doc__ = theirs.__module__, f"The arguments of {ours.__name__} and {theirs.__name__}."
    made.joined = (ours, theirs)  # type: ignore[attr-defined]
    return made


def _stem(kind: type) -> str:
    name = kind.__name__
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def _default(entry: dataclasses.Field[Any]) -> Any:
    made = entry.default_factory
    return entry.default if made is dataclasses.MISSING else made()


def _copied(entry: dataclasses.Field[Any]) -> Any:
    given: Any = {"default": entry.default}
    if entry.default is dataclasses.MISSING:
        given = {"default_factory": entry.default_factory}
    return dataclasses.field(metadata=entry.metadata, init=entry.init, repr=entry.repr, **given)


def _reduced(arguments: Any) -> tuple[Any, ...]:
    # `Trainer` pickles its arguments and copies them, and no module has this class.
    kind = type(arguments)
    made = (_blank_joined, kind.joined) if "joined" in vars(kind) else (_blank, (kind,))
    return (*made, vars(arguments))


def _blank_joined(ours: type[TrainingArguments], theirs: type[TrainingArguments]) -> Any:
    return _blank(join_arguments(ours, theirs))


def _blank(kind: type[Any]) -> Any:
    return object.__new__(kind)
