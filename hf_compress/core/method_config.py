"""The base class of the method configs, and the check of their fields against their annotations.

`huggingface_hub.dataclasses.strict` would check types, too. It refuses a whole number for a float and, where a tuple
is expected, the list that JSON gives back; it lets NaN and infinity through; and what it raises is no `ValueError` and
takes two lines.

The loader imports this module while transformers may be in the middle of importing its models: it needs none of them.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


def _describe(hint: object) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in get_args(hint))
    if hint is type(None):
        return "None"
    return str(hint) if get_args(hint) else str(getattr(hint, "__name__", hint))


def _fits(value: object, hint: object) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin in (list, tuple):
        items = get_args(hint)[:1]
        return isinstance(value, list | tuple) and all(_fits(item, items[0]) for item in value if items)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def check_field_types(config: Any) -> None:
    """Compare every field of a dataclass instance with its annotation.

    Raises:
        ValueError: Names the field, the rule and the value.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} must be finite, got {value}.")
        if not _fits(value, hints[field.name]):
            raise ValueError(f"{field.name} must be {_describe(hints[field.name])}, got {value!r}.")


@dataclasses.dataclass(kw_only=True)
class MethodConfig:
    """Base class of the method configs. A config describes a compressed model and is saved in its `config.json`.

    Subclasses are keyword-only dataclasses whose fields all have defaults. `flat` names the fields that live as
    plain fields of the model's config, where `from_pretrained(path, name=value)` can override them; all others
    are written into the step of the record. `retired` names fields that records of older releases hold and that no
    longer mean anything.
    """

    flat: ClassVar[tuple[str, ...]] = ()
    retired: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_field_types(self)
        self.check()

    def check(self) -> None:
        """Raise `ValueError` if the values contradict each other or are out of range."""

    def to_record(self) -> dict[str, Any]:
        """The fields that are written into the step, without those that are None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.flat}
        return {name: value for name, value in values.items() if value is not None}
