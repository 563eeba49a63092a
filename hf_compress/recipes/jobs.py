"""Makes the jobs of a recipe: one for each stage, or several where an option has several values (a family)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.export.onnx_model import INT8_GRAPH
from hf_compress.recipes.reading import BASE, Entry, Recipe
from hf_compress.stages.arguments import MODEL_OPTIONS
from hf_compress.stages.option_files import nearest, takes_many


# Options that may name an earlier stage.
REFERRING = (*MODEL_OPTIONS, "tokenizer_name", "second_baseline")
# Those among them whose models are only measured: an exported one will do.
_MEASURED = ("models", "second_baseline")

Axis = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """What an earlier job saved.

    Args:
        job: Its name.
        rest: A place within its folder; empty: the model itself.
    """

    job: str
    rest: str = ""

    def path(self, folder: Path) -> str:
        """Where it is, in the folder of all results."""
        return str(folder / self.job / self.rest) if self.rest else str(folder / self.job)


@dataclass(frozen=True)
class Job:
    """One run of a stage.

    Args:
        name: Of its folder: the stage's name, and the values by which the members of a family differ.
        entry: The stage.
        options: One value for each option; `Result` where it names an earlier job.
        axes: (stage, option) -> value, of the families that it belongs to.
    """

    name: str
    entry: Entry
    options: Mapping[str, Any]
    axes: Mapping[Axis, Any] = field(default_factory=dict)

    def needs(self) -> list[str]:
        """The names of the jobs whose results it reads, each once."""
        return list(dict.fromkeys(result.job for _, result in self.results()))

    def results(self) -> Iterator[tuple[str, Result]]:
        """(option, earlier result) of all that it reads."""
        for name, value in self.options.items():
            yield from ((name, each) for each in (value if isinstance(value, list) else [value]) if _is_result(each))

    def values(self, folder: Path) -> dict[str, Any]:
        """The options with the folders of earlier results in place."""
        return {name: _placed(value, folder) for name, value in self.options.items()}


def _is_result(value: Any) -> bool:
    return isinstance(value, Result)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_placed(each, folder) for each in value]
    return value.path(folder) if isinstance(value, Result) else value


def jobs_of(recipe: Recipe) -> list[Job]:
    """The jobs of a recipe, in order.

    Raises:
        ValueError: If a stage needs one that does not exist, comes later or needs it in turn, or a family has a
            member twice.
    """
    where = f"recipe {recipe.file!r}"
    _refuse_cycles(recipe.entries, where)
    families: dict[str, list[Job]] = {}
    for entry in recipe.entries:
        made = list(_members(entry, recipe, families, f"{where}, stage {entry.name!r}"))
        families[entry.name] = made
    jobs = [job for made in families.values() for job in made]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two results would be called {name!r}; give the stages other names.")
    return jobs


def _named(entry: Entry) -> Iterator[tuple[str, str]]:
    """(option, name) of all models that an entry names."""
    for option in REFERRING:
        value = entry.options.get(option, [])
        yield from (
            (option, each) for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)
        )


def _refuse_cycles(entries: Sequence[Entry], where: str) -> None:
    names = [entry.name for entry in entries]
    needs = {entry.name: [each.partition("/")[0] for _, each in _named(entry)] for entry in entries}
    needs = {name: [each for each in found if each in names] for name, found in needs.items()}
    for name in names:
        path = _way_back(name, needs)
        if path:
            raise ValueError(f"{where}: stages must not need each other, got {' -> '.join(path)} (-> needs).")
        for needed in needs[name]:
            if names.index(needed) > names.index(name):
                raise ValueError(f"{where}: stage {name!r} needs {needed!r}, which comes later: put it before.")


def _way_back(start: str, needs: Mapping[str, Sequence[str]]) -> list[str]:
    """A way from a stage over what it needs back to it; empty where there is none."""
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop()
        for needed in needs[way[-1]]:
            if needed == start:
                return [*way, start]
            if needed not in seen:
                seen.add(needed)
                ways.append([*way, needed])
    return []


def _members(entry: Entry, recipe: Recipe, families: Mapping[str, Sequence[Job]], where: str) -> Iterator[Job]:
    """The members of the family that an entry makes; a single one where no option has several values."""
    listed = [name for name in REFERRING if isinstance(entry.options.get(name), str) and takes_many(entry.kinds[name])]
    written = {**entry.options, **{name: [entry.options[name]] for name in listed}}
    several = {
        name: value for name, value in written.items() if isinstance(value, list) and not takes_many(entry.kinds[name])
    }
    for name, values in several.items():
        if len({str(value) for value in values}) < len(values):
            raise ValueError(f"{where}: {name} must have different values, got {values}.")
    for chosen in itertools.product(*several.values()):
        own = dict(zip(several, chosen, strict=True))
        options = {**written, **own}
        axes = {(entry.name, name): value for name, value in own.items()}
        yield from _with_results(entry, options, axes, recipe, families, where)


def _with_results(
    entry: Entry,
    options: Mapping[str, Any],
    axes: Mapping[Axis, Any],
    recipe: Recipe,
    families: Mapping[str, Sequence[Job]],
    where: str,
) -> Iterator[Job]:
    single = [name for name in REFERRING if isinstance(options.get(name), str)]
    found = [_candidates(options[name], name, recipe, families, where) for name in single]
    for candidates in itertools.product(*found):
        joined = _joined(axes, [each_axes for _, each_axes in candidates])
        if joined is None:
            continue
        values = {**options, **{name: value for name, (value, _) in zip(single, candidates, strict=True)}}
        for name in REFERRING:
            if isinstance(options.get(name), list):
                expanded = [
                    each for item in options[name] for each in _candidates(item, name, recipe, families, where)
                ]
                values[name] = [value for value, other in expanded if _joined(joined, [other]) is not None]
        yield Job("-".join([entry.name, *map(_word, joined.values())]), entry, values, joined)


def _joined(axes: Mapping[Axis, Any], others: Sequence[Mapping[Axis, Any]]) -> dict[Axis, Any] | None:
    """All axes together, those of earlier stages first; None where members of one family would be mixed."""
    joined: dict[Axis, Any] = {}
    for each in (*others, axes):
        for axis, value in each.items():
            if joined.setdefault(axis, value) != value:
                return None
    return joined


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", str(value).rstrip("/").rpartition("/")[2])


def _candidates(
    name: Any, option: str, recipe: Recipe, families: Mapping[str, Sequence[Job]], where: str
) -> list[tuple[Any, Mapping[Axis, Any]]]:
    """(value, axes) of everything that a name may stand for."""
    if name == BASE:
        if recipe.base is None:
            raise ValueError(f"{where}: {option} is {BASE!r}, but the recipe has no model_name_or_path of its own.")
        return [(recipe.base, {})]
    first, _, rest = str(name).partition("/")
    by_name = {job.name: [job] for jobs in families.values() for job in jobs}
    jobs = {**by_name, **families}.get(first)
    if jobs is None:
        _refuse_near_miss(str(name), option, [*families, *by_name], where)
        return [(name, {})]
    for job in jobs:
        _require_model(job, rest, option, f"{where}: {option} is {name!r}, but")
    return [(Result(job.name, rest), job.axes) for job in jobs]


def _require_model(job: Job, rest: str, option: str, where: str) -> None:
    """Refuse a stage that saves nothing that the option can use."""
    stage = job.entry.stage
    if stage.saves_model:
        return
    if not stage.saves_exported:
        raise ValueError(f"{where} {stage.name} saves no model.")
    if option not in _MEASURED:
        raise ValueError(f"{where} {stage.name} saves a model that can only be measured: name what it was made of.")
    if rest not in ("", INT8_GRAPH):
        raise ValueError(f"{where} {stage.name} saves no {rest!r}: name the stage, or {job.name}/{INT8_GRAPH}.")
    if rest and not job.options.get("int8"):
        raise ValueError(f"{where} {stage.name} saves it with int8: true only.")


def _refuse_near_miss(name: str, option: str, known: Sequence[str], where: str) -> None:
    """A name without a slash that is no folder here, but nearly that of a stage, was meant as one."""
    hint = nearest(name, known, alike=0.8)
    if hint and "/" not in name and not Path(name).exists():
        raise ValueError(f"{where}: {option} is {name!r}, which is no earlier stage and no folder.{hint}")
