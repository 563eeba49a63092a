"""Turns flags and YAML into dataclasses; each mistake becomes one line that says what to change."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from hf_compress.cli.errors import BadInput, describe
from hf_compress.stages.option_files import choices_of, read_options, reject_unknown


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The parsed options of a command.

    Args:
        values: One filled dataclass for each kind, in their order.
        given: Names of the options that the user wrote, as flags or in the YAML file.
    """

    values: tuple[Any, ...]
    given: frozenset[str]


class _Parser(HfArgumentParser):
    """An `HfArgumentParser` that raises instead of printing its usage and exiting."""

    def __init__(self, kinds: Sequence[type]) -> None:
        classes: Any = list(kinds)
        super().__init__(classes, allow_abbrev=False, add_help=False)
        # argparse takes -1e-3 for the name of an option.
        self._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf)")

    def error(self, message: str) -> NoReturn:
        # argparse names a flag in both spellings, --max_length/--max-length.
        raise BadInput(re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", message))

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        """As the parent, which knows lists only: a tuple is one or more values, a dict among them is JSON.

        A word or a list (`Literal["all"] | list[int]`) is one of the words, or one or more values.
        """
        if field.metadata.get("output"):
            return
        words = [
            word for choice in choices_of(field.type) if get_origin(choice) is Literal for word in get_args(choice)
        ]
        many = [get_args(choice)[0] for choice in choices_of(field.type) if get_origin(choice) is list]
        if words and many:
            kind = _word_or(words, many[0])
            parser.add_argument(f"--{field.name}", type=kind, nargs="+", action=_OneWord, default=field.default)
            return
        item = next((get_args(choice)[0] for choice in choices_of(field.type) if get_origin(choice) is tuple), None)
        if item is None:
            HfArgumentParser._parse_dataclass_field(parser, field)
            return
        kind = json.loads if get_origin(item) is dict else item
        parser.add_argument(f"--{field.name}", type=kind, nargs="+", default=field.default)


def _word_or(words: Sequence[str], kind: type) -> Callable[[str], Any]:
    """A reader of one value of an option that takes a word or several values."""

    def read(text: str) -> Any:
        if text in words:
            return text
        try:
            return kind(text)
        except ValueError as error:
            allowed = f"{', '.join(words)} or one or more values of type {kind.__name__}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}") from error

    return read


class _OneWord(argparse.Action):
    """Stores a single word as it is, and anything else as a list; words stand alone."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        words = [value for value in values if isinstance(value, str)]
        if words and len(values) > 1:
            raise argparse.ArgumentError(self, f"{words[0]!r} must stand alone, got {len(values)} values")
        setattr(namespace, self.dest, words[0] if words else values)


def build_parser(kinds: Sequence[type]) -> HfArgumentParser:
    """Add one flag for each field that the user may set.

    Raises:
        TypeError: If two dataclasses declare the same field: one flag cannot fill both.
    """
    owners: dict[str, type] = {}
    for kind in kinds:
        for field in _settable(kind):
            if field.name in owners:
                raise TypeError(
                    f"{field.name} is a field of {owners[field.name].__name__} and of {kind.__name__}: one flag "
                    "cannot fill both, rename one of them."
                )
            owners[field.name] = kind
    return _Parser(kinds)


def _settable(kind: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init and not field.metadata.get("output")]


def _settable_types(kind: type) -> dict[str, Any]:
    types_of = get_type_hints(kind)
    return {field.name: types_of[field.name] for field in _settable(kind)}


def _flags_of(name: str, value: Any, kind: Any, takes_many: bool, where: str) -> list[str]:
    """Write a YAML value as it would be typed on the command line."""
    choices = choices_of(kind)
    mappings = any(choice is dict or get_origin(choice) is dict for choice in choices)
    if isinstance(value, list):
        if not takes_many:
            raise BadInput(f"{where}: {name} must be one value, got {value}.")
        if not value:
            raise BadInput(f"{where}: {name} has no value.")
        return [f"--{name}", *(_text(name, item, str(kind), where) for item in value)]
    if isinstance(value, dict) and mappings:
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, bool) and bool not in choices:
        raise BadInput(
            f"{where}: {name} must not be {value}. YAML reads yes, no, on and off as true and false: put the word "
            "in quotes."
        )
    return [f"--{name}={_text(name, value, str(kind), where)}"]


def _text(name: str, value: Any, kind: str, where: str) -> str:
    if isinstance(value, dict) and "dict" in kind:
        return json.dumps(value)
    if not isinstance(value, str | int | float):
        raise BadInput(f"{where}: {name} must be text, a number or true or false, got {value!r}.")
    return str(value)


def _refuse_empty(arguments: Sequence[str]) -> None:
    name = "a value"
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            name = flag[2:]
        if not argument.strip() or (argument.startswith("--") and equals and not value.strip()):
            raise BadInput(f"{name} is empty: give it a value or leave it out.")


def _config_file(arguments: Sequence[str]) -> str | None:
    found = None
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            found = value if equals else next(iter(arguments[place + 1 : place + 2]), None)
            if not found or found.startswith("--"):
                raise BadInput("config must name a YAML file, got nothing.")
    return found


def parse(
    kinds: Sequence[type],
    arguments: Sequence[str],
    defaults: Mapping[str, Any],
    defaults_when: Mapping[tuple[str, Any], Mapping[str, Any]] | None = None,
    written: tuple[str, Mapping[Any, Any]] | None = None,
) -> Parsed:
    """Fill dataclasses from `--config file.yaml` and flags; flags win over YAML, YAML over defaults.

    Args:
        kinds: Dataclasses whose fields are the options.
        arguments: The command line after the command.
        defaults: Values that replace the dataclasses' own defaults for this command.
        defaults_when: (option, value) -> further defaults while that option has that value.
        written: What messages call it, and 'name: value' lines that were read already, instead of `--config`.

    Raises:
        BadInput: Unknown option, wrong value, missing required option.
    """
    parser = build_parser(kinds)
    parser.add_argument("--config")
    hints = {name: hint for kind in kinds for name, hint in _settable_types(kind).items()}
    known = [*hints, "config"]
    arguments = [_underscored(argument) for argument in arguments]
    flags = [argument.partition("=")[0][2:] for argument in arguments if argument.startswith("--")]
    given = {_positive(name, hints) for name in flags}
    reject_unknown([name for name in flags if name in given], known, "flags")
    _refuse_empty(arguments)
    preset = {name: (value, "defaults") for name, value in defaults.items() if name in hints}
    config = _config_file(arguments)
    if config is not None:
        written = f"config {config!r}", read_options(config)
    if written is not None:
        where, content = written
        reject_unknown(list(content), list(hints), where)
        preset.update({name: (value, where) for name, value in content.items()})
        given.update(content)

    def parsed() -> argparse.Namespace:
        typed = _typed(parser, {name: preset[name] for name in preset if name not in flags}, hints)
        _refuse_empty(typed)
        namespace, rest = parser.parse_known_args([*typed, *arguments])
        if rest:
            raise BadInput(f"{rest[0]!r} belongs to no option.")
        return namespace

    namespace = parsed()
    for (name, value), further in (defaults_when or {}).items():
        if getattr(namespace, name, None) == value:
            preset.update({k: (v, "defaults") for k, v in further.items() if k in hints and k not in given})
    namespace = parsed()
    return Parsed(tuple(_construct(kind, namespace) for kind in kinds), frozenset(given - {"config"}))


def _positive(name: str, hints: Mapping[str, Any]) -> str:
    """`do_prune` for `no_do_prune`."""
    switched = name.removeprefix("no_")
    return switched if name != switched and bool in choices_of(hints.get(switched)) else name


def _typed(parser: HfArgumentParser, preset: Mapping[str, tuple[Any, str]], hints: Mapping[str, Any]) -> list[str]:
    """Values from YAML and a command's defaults, written as flags."""
    many = {action.dest for action in parser._actions if action.nargs == "+"}
    flags: list[str] = []
    for name, (value, where) in preset.items():
        if value is not None:
            flags += _flags_of(name, value, hints.get(name), name in many, where)
        elif type(None) in choices_of(hints.get(name)):
            parser.set_defaults(**{name: None})
        else:
            raise BadInput(f"{where}: {name} has no value.")
    return flags


def _construct(kind: type, namespace: argparse.Namespace) -> Any:
    """Build a dataclass from the parsed values; an error of its own checks is an error of the user's input."""
    values = {field.name: getattr(namespace, field.name) for field in _settable(kind)}
    try:
        return kind(**values)
    except (ValueError, OSError, ImportError, argparse.ArgumentTypeError) as error:
        raise BadInput(describe(error)) from error
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        if kind.__module__.startswith("hf_compress.") and not _inherits(kind):
            raise
        raise BadInput(f"{type(error).__name__}: {describe(error)}") from error


def _inherits(kind: type) -> bool:
    return any(not parent.__module__.startswith(("hf_compress.", "builtins")) for parent in kind.__mro__)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"
