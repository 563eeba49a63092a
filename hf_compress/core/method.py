"""What a compression method is: one config, two functions, and the paper it comes from."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a method was published; rendered into model cards."""

    title: str
    identifier: str
    bibtex: str


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in get_args(hint))
    return (
        "None" if hint is type(None) else str(getattr(hint, "__name__", hint)) if get_args(hint) == () else str(hint)
    )


def _fits(value: Any, hint: Any) -> bool:
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
    return isinstance(value, hint)


def check_field_types(config: Any) -> None:
    """Compare every dataclass field with its annotation.

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
    """Base of the method configs: what a compressed model *is*, saved in its `config.json`.

    Subclasses are keyword-only dataclasses whose fields all have defaults. `flat` names the fields that live as
    plain fields of the model's config, where `from_pretrained(path, name=value)` can override them; all others
    are written into the step of the record.
    """

    flat: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_field_types(self)
        self.check()

    def check(self) -> None:
        """Raise `ValueError` when the values contradict each other or are out of range."""

    def to_record(self) -> dict[str, Any]:
        """The fields that go into the step, without those that still have the value None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.flat}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to change a model. `compress` may look at weights and data; `rebuild` may not.

    Args:
        name: The folder's name, the word in `config.json` and on the command line.
        config_class: The method's `MethodConfig`.
        compress: `(model, config, data) -> completed config`; changes a live model in place. The completed config
            says which sizes came out, so that `rebuild` needs nothing else.
        rebuild: `(model, completed config) -> None`; gives a dense skeleton (possibly on the meta device) the same
            module tree. `compress(model).state_dict()` must load strictly into it.
        paper: The source.
        check: `(model, config) -> None`; raises `ValueError` when the config is impossible for the model, before
            anything is changed.
        plain: `(model, completed config) -> dict`; the config fields with which stock transformers builds the same
            modules, or `ValueError` that says which layer prevents it. None: never expressible.
        repeatable: Whether a model may go through it more than once.
        needs: Parts of a dense model that must still be there, in words that end up in messages.
        replaces: Parts of a dense model that are something else afterwards; no method that needs one may follow.
        check_loaded: `(model) -> None`; called when a saved model was opened, to say what its weights contradict.
        implied: `(model config) -> config or None`; the method config that flat fields written by hand ask for, for
            models that have no such step yet.
        start_training: `(model) -> None`; called before training.
        training_callback: `(callbacks of the trainer) -> callback or None`, for training a model that went through the
            method.
        check_resume: `(model config, config of the checkpoint) -> None`; raises `ValueError` when the checkpoint is
            of another kind of training.
        loss_terms: `(model, live tokens of the forward pass) -> weighted terms` added to the loss in training.
        measures: `(model, live tokens) -> name: (sum, sum it is relative to)`, averaged and logged.
        parameter_groups: `(model) -> optimizer groups` for parameters that are trained differently and clipped apart.
    """

    name: str
    config_class: type[MethodConfig]
    compress: Callable[..., MethodConfig]
    rebuild: Callable[..., None]
    paper: Paper
    check: Callable[..., None] | None = None
    plain: Callable[..., dict[str, Any]] | None = None
    repeatable: bool = True
    needs: frozenset[str] = frozenset()
    replaces: frozenset[str] = frozenset()
    check_loaded: Callable[..., None] | None = None
    implied: Callable[..., MethodConfig | None] | None = None
    start_training: Callable[..., None] | None = None
    training_callback: Callable[..., Any] | None = None
    check_resume: Callable[..., None] | None = None
    loss_terms: Callable[..., dict[str, Tensor]] | None = None
    measures: Callable[..., dict[str, tuple[Tensor, Tensor]]] | None = None
    parameter_groups: Callable[..., list[dict[str, Any]]] | None = None


def check_order(earlier: Sequence[Method], method: Method) -> None:
    """Refuse a method that cannot follow those that a model went through.

    Args:
        earlier: The methods of the model's steps, in order.
        method: The next one.

    Raises:
        ValueError: If it may not be repeated, or needs a part of the model that was replaced.
    """
    for before in earlier:
        if before is method and not method.repeatable:
            raise ValueError(f"Steps must not repeat {method.name}: a model goes through it once.")
        for part in sorted(method.needs & before.replaces):
            raise ValueError(
                f"{method.name} cannot follow {before.name}: it needs {part}, which {before.name} has replaced."
            )
