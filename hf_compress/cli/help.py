"""What `--help` prints: our own flags by topic; those of `TrainingArguments` in one line."""

from __future__ import annotations

import textwrap
from typing import Any

from hf_compress.cli.options import REQUIRED, Group, Option, read_group
from hf_compress.cli.table import COMMANDS, Command


_WIDTH = 100


def usage() -> str:
    """The list of commands."""
    lines = ["usage: hf-compress <command> [--config FILE.yaml] [--flag VALUE ...]", "", "commands:"]
    width = max(map(len, COMMANDS))
    lines += [f"  {name:{width}s} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "hf-compress <command> --help explains the flags of a command; --version prints the version.",
        "Exit codes: 0 done, 2 bad input (one line says what to change), 1 anything else.",
    ]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """The flags of one command that are ours, each with its meaning and default."""
    command = COMMANDS[name]
    groups = {topic: read_group(kind) for topic, kind in command.kinds.items()}
    lines = [
        f"usage: hf-compress {name} [--config FILE.yaml] [--flag VALUE ...]",
        "",
        f"{command.summary[0].upper()}{command.summary[1:]}.",
        *textwrap.wrap(command.note, _WIDTH),
        "",
        "General",
        *_entry("--config FILE.yaml", "YAML file of 'name: value' lines for the flags below; flags win over it."),
        *_entry("--traceback", "Print the Python traceback also for bad input."),
    ]
    for topic, group in groups.items():
        if group.options:
            lines += ["", topic]
            for option in group.options:
                lines += _entry(_signature(option), f"{option.help} {_default(option, command)}")
    if any(group.training for group in groups.values()):
        lines += ["", *_training(name, command, list(groups.values()))]
    return "\n".join(lines)


def _training(name: str, command: Command, groups: list[Group]) -> list[str]:
    ours = {option.name for group in groups for option in group.options}
    own = ", ".join(f"--{key} {value}" for key, value in command.defaults.items() if key not in ours)
    lines = [
        "Training: --output_dir, --num_train_epochs, --learning_rate, --seed and all others of "
        f"transformers.TrainingArguments. `hf-compress {name} --help_all` lists them.",
        f"This command's defaults among them: {own}.",
    ]
    return [part for line in lines for part in textwrap.wrap(line, _WIDTH, break_on_hyphens=False)]


def _entry(signature: str, text: str) -> list[str]:
    body = textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return [f"  {signature}", *body]


def _signature(option: Option) -> str:
    kind = option.kind.removesuffix(" | None")
    if kind.startswith("Literal["):
        kind = "|".join(part.strip().strip("'\"") for part in kind[len("Literal[") : -1].split(","))
    elif kind.startswith(("list[", "tuple[")):
        item = "JSON" if "dict" in kind else kind.partition("[")[2].rstrip("]").partition(",")[0].upper()
        kind = f"{item} [{item} ...]"
    elif kind == "bool":
        kind = "true|false"
    else:
        kind = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER"}.get(kind, kind.upper())
    return f"--{option.name} {kind}"


def _default(option: Option, command: Command) -> str:
    default: Any = command.defaults.get(option.name, option.default)
    if default is REQUIRED:
        return "(required)"
    if default is None or default in ("", [], ()):
        return "(default: not set)"
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    return f"(default: {str(default).lower() if isinstance(default, bool) else default})"
