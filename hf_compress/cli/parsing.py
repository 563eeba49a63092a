"""Flags and YAML into dataclasses; every mistake becomes one line that says what to change."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from transformers import HfArgumentParser


class BadInput(ValueError):
    """Something the user can put right; becomes exit code 2 and one line."""


class _Parser(HfArgumentParser):
    """`HfArgumentParser` that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> None:
        raise BadInput(message)

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """As the parent, which knows lists only: a tuple is one or more values, a dict among them is JSON."""
        choices = get_args(field.type) if get_origin(field.type) in (Union, types.UnionType) else (field.type,)
        item = next((get_args(choice)[0] for choice in choices if get_origin(choice) is tuple), None)
        if item is None:
            HfArgumentParser._parse_dataclass_field(parser, field)
            return
        kind = json.loads if get_origin(item) is dict else item
        parser.add_argument(f"--{field.name}", type=kind, nargs="+", default=field.default)


def _fields(kinds: Sequence[type]) -> list[str]:
    return [field.name for kind in kinds for field in dataclasses.fields(kind) if field.init]


def _reject_unknown(names: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"{where}: {name!r} is not an option.{hint}")


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise BadInput(f"config must be a readable YAML file, got {file!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"config {file!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise BadInput(f"config must hold 'name: value' lines, got {type(content).__name__} in {file!r}.")
    return content


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict):
            flags += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            flags += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def parse(kinds: Sequence[type], arguments: Sequence[str], program: str, defaults: dict[str, Any]) -> tuple[Any, ...]:
    """Fill dataclasses from `--config file.yaml` and flags; flags win over YAML, YAML over defaults.

    Args:
        kinds: Dataclasses whose fields are the options.
        arguments: What stands after the command.
        program: For the help text.
        defaults: Values that replace the dataclasses' own defaults for this command.

    Raises:
        BadInput: Unknown option, wrong value, missing required option.
    """
    # One field may stand in two dataclasses (seed of the training, seed of a method): the first one owns the flag.
    parser = _Parser(kinds, prog=program, allow_abbrev=False, conflict_handler="resolve")
    parser.add_argument("--config", help="YAML file with defaults for the options below.")
    known = [*_fields(kinds), "config"]
    given = [a.split("=")[0][2:].replace("-", "_") for a in arguments if a.startswith("--") and a not in ("--help",)]
    _reject_unknown([name for name in given if not name.startswith("no_") or name[3:] not in known], known, "flags")
    arguments = [_underscored(a) for a in arguments]
    preset = {name: value for name, value in defaults.items() if name in known}
    probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    probe.add_argument("--config")
    config = probe.parse_known_args(arguments)[0].config
    if config:
        content = _read_yaml(config)
        _reject_unknown(list(content), known, f"config {config!r}")
        preset.update(content)
    preset = {name: value for name, value in preset.items() if name not in given}
    single = {action.dest for action in parser._actions if action.nargs in (None, "?")}
    for name, value in preset.items():
        if name in single and isinstance(value, list):
            raise BadInput(f"config {config!r}: {name} must be one value, got {value}.")
    try:
        namespaces = parser.parse_args_into_dataclasses([*_as_flags(preset), *arguments], look_for_args_file=False)
    except (argparse.ArgumentTypeError, TypeError) as error:
        raise BadInput(str(error)) from error
    return namespaces[: len(kinds)]


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def wants_help(arguments: Sequence[str]) -> bool:
    return any(a in ("-h", "--help") for a in arguments)


def fail(message: str) -> int:
    """Print one line to standard error and give the exit code of bad input."""
    print(f"hf-compress: {' '.join(str(message).split())}", file=sys.stderr)
    return 2
