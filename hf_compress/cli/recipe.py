"""`hf-compress run recipe.yaml` and `hf-compress demo`: checks a recipe, prints its plan or runs it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_compress.cli.commands import filled_from, quiet_files
from hf_compress.cli.errors import BadInput
from hf_compress.cli.output import print_demo
from hf_compress.recipes.demo import RECIPE, RECOVERED, REPORT, compare_reloaded, output_dir, with_embedded
from hf_compress.recipes.plan import plan_of
from hf_compress.recipes.reading import read_recipe
from hf_compress.recipes.running import run_plan
from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.table import Stage


def run_recipe(arguments: Sequence[str]) -> None:
    """Check a recipe and run it, or only print what would be done.

    Args:
        arguments: The recipe's file, `--dry_run`, and `--name value` for values that replace those of the recipe.

    Raises:
        ValueError: If anything in the recipe is wrong, before any work.
    """
    file, values, dry_run = _read(arguments)
    if not file:
        raise BadInput("run must be given a recipe: hf-compress run recipe.yaml (--help says what is in one).")
    _run(file, values, dry_run)


def run_demo(arguments: Sequence[str]) -> None:
    """Run the demo's recipe, print its report, and open its model in a fresh process.

    Args:
        arguments: As of `run_recipe`, without a file.

    Raises:
        ValueError: If anything is wrong, before any work.
    """
    start = time.perf_counter()
    quiet_files()
    file, values, dry_run = _read(arguments)
    if file is not None:
        raise BadInput(f"demo takes no recipe, got {file!r}: hf-compress run {file}")
    results = _run(RECIPE, with_embedded(values), dry_run)
    if not dry_run:
        folder = Path(output_dir(values))
        print_demo(folder, results[REPORT], compare_reloaded(str(folder / RECOVERED)))
        print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


def _run(file: str, values: Mapping[str, Any], dry_run: bool) -> Mapping[str, Mapping[str, Any]]:
    """Check a recipe, then run it or print its plan; returns the results of its stages, of a plan none."""
    quiet_files()
    plan = plan_of(read_recipe(file, values), _fill)
    if dry_run:
        print("\n".join(plan.lines()))
        return {}
    results = run_plan(plan, _fill, lambda line: print(line, flush=True))
    print(f"done: results and recipe.log are in {plan.recipe.output_dir}")
    return results


def _fill(stage: Stage, values: Mapping[str, Any], shared: Collection[str]) -> StageArguments:
    return filled_from(stage, (), ("options", values), shared)


def _read(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any], bool]:
    """The file, if one is named, the values, and whether nothing is to be run."""
    file: str | None = None
    values: dict[str, list[Any]] = {}
    name: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name in values:
                raise BadInput(f"{name} is given twice.")
            values[name] = [_value(name, value)] if equals else []
        elif name is not None and name != "dry_run":
            values[name].append(_value(name, argument))
        elif name == "dry_run" and argument in ("true", "false") and not values[name]:
            values[name].append(argument == "true")
        elif file is None:
            file = argument
        else:
            raise BadInput(f"run takes one recipe, got {file!r} and {argument!r}.")
    asked = values.pop("dry_run", [False])
    for name, found in values.items():
        if not found:
            raise BadInput(f"{name} is empty: give it a value or leave it out.")
    return file, {name: found[0] if len(found) == 1 else found for name, found in values.items()}, asked != [False]


def _value(name: str, text: str) -> Any:
    """A value as YAML reads it."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{name} must be text, a number or true or false, got {text!r}.") from error
    if not isinstance(found, str | int | float):
        raise BadInput(f"{name} must be text, a number or true or false, got {text!r}.")
    return found
