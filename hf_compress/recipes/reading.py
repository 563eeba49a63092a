"""Reads a recipe: values for all stages, and a list of stages with a name and options each."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from hf_compress.recipes.log import FILE as LOG_FILE
from hf_compress.recipes.target import NAME as TARGET
from hf_compress.recipes.target import Target, read_target
from hf_compress.stages.arguments import options_of
from hf_compress.stages.option_files import nearest, read_options, reject_unknown
from hf_compress.stages.table import Stage, all_stages


# The word by which a stage names the recipe's own model.
BASE = "base"
# What the recipe decides, and no stage.
_DECIDED = {
    "output_dir": "each stage is saved in a folder of its own in the recipe's output_dir",
    "resume_from_checkpoint": "a stage that was interrupted goes on by itself",
    "push_to_hub": "a recipe uploads with a stage of its own",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Entry:
    """One entry of a recipe.

    Args:
        name: What other stages call it.
        stage: What it runs.
        options: What was written for it, and the values for all stages that it has an option for.
        shared: Names of the latter.
        kinds: Option -> its type, of all options of the stage.
    """

    name: str
    stage: Stage
    options: Mapping[str, Any]
    shared: frozenset[str]
    kinds: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was written.

    Args:
        file: Where it was read.
        output_dir: The folder of all results.
        base: The model that stages name by the word `base`; None where the recipe names none.
        entries: Its stages, in order; a report for `target` is the last.
        target: What to choose among their models; None: nothing.
    """

    file: str
    output_dir: str
    base: str | None
    entries: tuple[Entry, ...]
    target: Target | None = None


def read_recipe(file: str, values: Mapping[str, Any]) -> Recipe:
    """Read a recipe and check every name in it.

    Args:
        file: YAML file.
        values: Values for all stages that replace those of the file.

    Raises:
        ValueError: If the file cannot be read, lacks `output_dir` or `stages`, or names a stage or an option that does
            not exist; with the nearest one that does.
    """
    where = f"recipe {file!r}"
    content = read_options(file, "recipe")
    written = content.pop("stages", None)
    target = read_target(content.pop(TARGET), where) if TARGET in content else None
    if not isinstance(written, list) or not written:
        raise ValueError(f"{where}: stages must be a list with at least one stage, got {written!r}.")
    if target is not None:
        written = [*written, {"stage": "report", "name": TARGET, **target.options}]
    stages = [_stage(place, entry, where) for place, entry in enumerate(written, start=1)]
    shared = {**content, **values}
    kinds = [options_of(stage) for stage in stages]
    _check_shared(shared, {name for known in kinds for name in known}, where)
    output_dir, base = (_text(shared, name, where) for name in ("output_dir", "model_name_or_path"))
    if output_dir is None:
        raise ValueError(f"{where}: output_dir must name the folder of all results.")
    rest = {name: value for name, value in shared.items() if name not in ("output_dir", "model_name_or_path")}
    entries = [
        _entry(place, entry, stage, known, rest, where)
        for place, (entry, stage, known) in enumerate(zip(written, stages, kinds, strict=True), start=1)
    ]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two stages are called {name!r}; give each a name of its own (name: ...).")
    return Recipe(file, output_dir, base, tuple(entries), target)


def _check_shared(shared: Mapping[Any, Any], used: Set[str], where: str) -> None:
    """Refuse values for all stages that no stage of the recipe takes.

    Args:
        shared: The values.
        used: The options of the stages that the recipe has.
        where: Of the recipe, for messages.
    """
    own = {"output_dir", "model_name_or_path"}
    _refuse_decided([name for name in shared if name != "output_dir"], where)
    reject_unknown(shared, sorted({*used, *_every_option(), *own} - set(_DECIDED) | own), where)
    for name, value in shared.items():
        if value in (None, "", []):
            raise ValueError(f"{where}: {name} has no value.")
        if name not in used | own:
            raise ValueError(f"{where}: no stage of the recipe has the option {name!r}: leave it out.")


@functools.cache
def _every_option() -> frozenset[str]:
    return frozenset(name for stage in all_stages().values() for name in options_of(stage))


def _stage(place: int, entry: Any, where: str) -> Stage:
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
        raise ValueError(f"{where}: stage {place} must be lines such as 'stage: finetune', got {entry!r}.")
    known = all_stages()
    by_command = {stage.command: stage for stage in known.values()}
    stage = known.get(entry["stage"]) or by_command.get(entry["stage"])
    if stage is None:
        hint = nearest(entry["stage"], [*known, *by_command])
        raise ValueError(f"{where}: stage must be one of {', '.join(known)}, got {entry['stage']!r}.{hint}")
    return stage


def _entry(
    place: int,
    written: Mapping[Any, Any],
    stage: Stage,
    kinds: Mapping[str, Any],
    shared: Mapping[str, Any],
    where: str,
) -> Entry:
    name = written.get("name", stage.name)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (BASE, LOG_FILE):
        raise ValueError(
            f"{where}: the name of stage {place} must be a word of letters, digits, '_', '-' and '.', and not "
            f"{BASE!r} or {LOG_FILE!r}, got {name!r}."
        )
    where = f"{where}, stage {name!r}"
    own = {option: value for option, value in written.items() if option not in ("stage", "name")}
    _refuse_decided(own, where)
    reject_unknown(own, sorted(set(kinds) - set(_DECIDED)), where)
    for option, value in own.items():
        if value is None or value in ("", []):
            raise ValueError(f"{where}: {option} has no value.")
    # A value for all stages is none that a single stage must be able to use.
    taken = {option: shared[option] for option in shared if option in kinds and option not in {*own, *stage.unused}}
    return Entry(name, stage, {**taken, **own}, frozenset(taken), kinds)


def _refuse_decided(names: Sequence[Any] | Mapping[Any, Any], where: str) -> None:
    for name in names:
        if name in _DECIDED:
            raise ValueError(f"{where}: {name} must be left out: {_DECIDED[name]}.")


def _text(values: Mapping[str, Any], name: str, where: str) -> str | None:
    value = values.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{where}: {name} must be text, got {value!r}.")
    return value
