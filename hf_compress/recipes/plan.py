"""Checks a recipe from end to end without computing anything, and says what would be done."""

from __future__ import annotations

import dataclasses
import glob
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_compress.api import method_of
from hf_compress.core.method import MethodConfig
from hf_compress.core.saving import require_own_folder
from hf_compress.methods.vocabulary_pruning.corpus import corpus_texts
from hf_compress.recipes.estimates import bytes_of, duration, seconds_of
from hf_compress.recipes.examples import Data, Examples, data_of, measures
from hf_compress.recipes.inputs import inputs_of, key_of
from hf_compress.recipes.jobs import Job, Result, jobs_of
from hf_compress.recipes.origins import Models, Origin, after, is_new_bilstm, new_bilstm
from hf_compress.recipes.reading import Recipe
from hf_compress.recipes.state import BEFORE, State, state_of
from hf_compress.recipes.target import NAME as TARGET
from hf_compress.recipes.target import check_metric
from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.table import Stage
from hf_compress.training.arguments import LearningTeacherArguments


# Fills the arguments of a stage: the stage, its options, and which of them were written for all stages.
Fill = Callable[[Stage, Mapping[str, Any], Collection[str]], StageArguments]


@dataclass(frozen=True)
class Planned:
    """A job that was checked.

    Args:
        job: The job.
        folder: Where its result goes.
        values: Its options, with the folders of earlier results in place.
        inputs: What it is made of.
        state: Where it stands.
        seconds: How long it takes: as the last time, or an estimate.
        bytes: How much it writes, estimated.
        reads: What it reads, in words.
    """

    job: Job
    folder: Path
    values: Mapping[str, Any]
    inputs: Mapping[str, Any]
    state: State
    seconds: float
    bytes: int
    reads: str

    @property
    def to_do(self) -> bool:
        return self.state.kind != "done"


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked.

    Args:
        recipe: The recipe.
        jobs: Its jobs, in order.
    """

    recipe: Recipe
    jobs: tuple[Planned, ...]

    @property
    def seconds_left(self) -> float:
        """How long the jobs take that are not done."""
        return sum(planned.seconds for planned in self.jobs if planned.to_do)

    def title(self, place: int) -> str:
        """The number, counted from 1, and the name of a job, as wide as all of them."""
        width = max(len(planned.job.name) for planned in self.jobs)
        return f"[{place}/{len(self.jobs)}] {self.jobs[place - 1].job.name:{width}s}"

    def lines(self) -> list[str]:
        """The plan in words, one line for each job."""
        lines = [f"{self.title(place)}  {doing(planned)}" for place, planned in enumerate(self.jobs, start=1)]
        written = sum(planned.bytes for planned in self.jobs if planned.to_do)
        if any(planned.state.kind == "changed" for planned in self.jobs):
            lines.append(f"finished results that are made again are first moved to {self.recipe.output_dir}/{BEFORE}")
        total = f"in all about {duration(self.seconds_left)} (a rough estimate) and {written / 1e9:.2f} GB"
        return [*lines, f"{total}, in {self.recipe.output_dir}"]


def doing(planned: Planned) -> str:
    """What is done with a job, in words."""
    state, stage, about = planned.state, planned.job.entry.stage.name, f"about {duration(planned.seconds)}"
    if state.kind == "done":
        return f"{stage}: done before with the same inputs"
    if state.kind == "begun":
        return f"{stage}: goes on ({state.why or 'it was interrupted'}), {about}"
    again = f"again ({state.why}), " if state.kind == "changed" else ""
    return f"{stage}: {again}{planned.reads}{about}"


def plan_of(recipe: Recipe, fill: Fill) -> Plan:
    """Check a recipe: options, models, data, order and budgets of methods, folders, disk space.

    Args:
        recipe: The recipe.
        fill: Fills the arguments of a stage.

    Raises:
        ValueError: Names the stage, what is wrong and what to do. Nothing was written.
    """
    jobs, folder = jobs_of(recipe), Path(recipe.output_dir)
    require_own_folder(folder)
    checks = _Checks(recipe, fill)
    planned = tuple(checks.planned(job) for job in jobs)
    _require_space(folder, sum(each.bytes for each in planned if each.to_do))
    return Plan(recipe, planned)


def _require_space(folder: Path, needed: int) -> None:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"output_dir {str(folder)!r} must have room for about {needed / 1e9:.2f} GB, got {free / 1e9:.2f} GB: "
            "name a folder on another disk, or keep fewer states of trainings (save_total_limit)."
        )


class _Checks:
    """Checks one job after the other; remembers what the models of a recipe will be."""

    def __init__(self, recipe: Recipe, fill: Fill) -> None:
        self._recipe, self._fill = recipe, fill
        self._folder = Path(recipe.output_dir)
        self._models = Models()
        self._data = Data(self._models)
        self._origins: dict[str, Origin] = {}
        self._keys: dict[str, str] = {}

    def planned(self, job: Job) -> Planned:
        """Check a job whose earlier jobs were checked."""
        try:
            return self._planned(job)
        except ValueError as error:
            raise ValueError(f"recipe {self._recipe.file!r}, stage {job.name!r}: {error}") from error

    def _planned(self, job: Job) -> Planned:
        values = job.values(self._folder)
        if "output_dir" in job.entry.kinds:
            values["output_dir"] = str(self._folder / job.name)
        with _snapshots_present(job, values) as present:
            arguments = self._fill(job.entry.stage, present, job.entry.shared)
        if corpus := arguments.option("corpus"):
            corpus_texts(corpus)
        model, others = self._origins_read(job, arguments)
        teacher = others.get("teacher_name_or_path")
        examples = self._examples(job, arguments, model, teacher)
        self._origins[job.name] = after(job.entry.stage, arguments, model, self._models)
        seconds = seconds_of(arguments, model, examples, teacher, len(values.get("models", [])))
        reads = ""
        if examples is not None:
            reads = f"{examples.task.name} ({examples.train} training rows, {examples.tokens:.0f} tokens each), "
        folder = self._folder / job.name
        inputs = inputs_of(job, self._keys, self._models.commits())
        self._keys[job.name] = key_of(inputs)
        state = state_of(folder, inputs)
        if state.kind == "foreign":
            raise ValueError(
                f"{str(folder)!r} holds files that no recipe wrote ({state.why}): name another output_dir, or another "
                "name for the stage."
            )
        writes = bytes_of(arguments, model) if job.entry.stage.saves_model else 0
        return Planned(job, folder, values, inputs, state, state.seconds or seconds, writes, reads)

    def _origin(self, value: Any) -> Origin:
        """What is known of a model that an option names."""
        if isinstance(value, Result):
            return self._origins[value.job]
        return self._models.origin(sorted(glob.glob(value))[0] if glob.has_magic(value) else value)

    def _origins_read(self, job: Job, arguments: StageArguments) -> tuple[Origin, dict[str, Origin]]:
        """The model that a job starts from, or the first that it reads, and option -> the others."""
        options = job.options
        others: dict[str, Origin] = {}
        if isinstance(options.get("teacher_name_or_path"), str | Result):
            others["teacher_name_or_path"] = self._origin(options["teacher_name_or_path"])
        several = [
            self._origin(each) for name in ("models", "teacher_snapshots") for each in options.get(name, []) if each
        ]
        named = options.get("model_name_or_path")
        if is_new_bilstm(arguments):
            tokenizer = options.get("tokenizer_name", options.get("teacher_name_or_path"))
            origin = self._origin(tokenizer)
            words = getattr(self._models.config(origin.name), "vocab_size", 0) if origin.name else 0
            return new_bilstm(arguments, words), others
        if named is not None:
            return self._origin(named), others
        # A student without a name of its own is made of its teacher.
        return (several or list(others.values()) or [Origin(None)])[0], others

    def _examples(self, job: Job, arguments: StageArguments, model: Origin, teacher: Origin | None) -> Examples | None:
        """What a job reads; None where it reads no data."""
        data, training = data_of(arguments), arguments.training_arguments
        reads = measures(arguments) or _calibrates(arguments)
        if data is None:
            if reads or training is not None:
                raise ValueError(
                    "task_name, data_dir or train_file must say where the examples are, got none of them."
                )
            return None
        found = self._data.examples(arguments, model, data)
        if self._recipe.target is not None and job.name == TARGET:
            check_metric(self._recipe.target, found.task.main_metric, found.task.lower_is_better)
        if reads and training is None:
            self._require_head("the model", model, found)
        if teacher is not None and training is not None and not isinstance(training, LearningTeacherArguments):
            self._require_head("teacher_name_or_path", teacher, found)
        return found

    def _require_head(self, title: str, origin: Origin, examples: Examples) -> None:
        if origin.made or origin.name is None or type(examples.task).has_head(self._models.config(origin.name)):
            return
        raise ValueError(
            f"{title} must be one that was trained for the task, got {origin.name!r} without a head for "
            f"{examples.task.describe_head()}: train it in an earlier stage (finetune) and name that stage."
        )


def _calibrates(arguments: StageArguments) -> bool:
    """Whether a method of the stage looks at examples."""
    configs = (group for group in arguments.groups().values() if isinstance(group, MethodConfig))
    return any(method_of(config).needs_of(config).passes > 0 for config in configs)


@contextmanager
def _snapshots_present(job: Job, values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Options with a stand-in for the states of a training that comes first: arguments refuse what is not there."""
    if not any(option == "teacher_snapshots" for option, _ in job.results()):
        yield values
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "checkpoint-1")
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_text("{}")
        yield {**values, "teacher_snapshots": [str(folder)]}


def refreshed(planned: Planned) -> Planned:
    """A job whose state is read again."""
    return dataclasses.replace(planned, state=state_of(planned.folder, planned.inputs))
