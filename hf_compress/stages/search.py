"""Searches for the fastest student that loses little: which of several cuts to start from, and how to train it."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from hf_compress.core.devices import chosen_device
from hf_compress.core.digests import weights_digest
from hf_compress.core.saving import write_json
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.quality import Measured, evaluated
from hf_compress.stages.arguments import DeviceArguments, StageArguments, TeacherArguments
from hf_compress.stages.distill import Distill, distill
from hf_compress.stages.measured import measured
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.stages.processors import has_tokenizer, open_tokenizer
from hf_compress.stages.search_space import Dial, read_dials
from hf_compress.stages.students import ShallowStudentArguments
from hf_compress.stages.training import add_teacher_columns, prepare, trainer_arguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.task import Task
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.distillation import DistillationTrainer


logger = logging.getLogger(__name__)

FILE = "trials.json"
_SPEEDS_FILE = "speeds.json"
# No model of a user is called so.
_TEACHER = ""
# What a point of the metric is worth beside speed, so that of two equally fast students the better one is kept.
_POINT = 1e-3


@dataclass
class SearchArguments:
    """What is tried, and what is wanted.

    Args:
        models: Folders of the compressed models that a trial may start from, all with one tokenizer.
        space: What each trial draws beside the model: 'option=low:high' (a range; on a logarithmic scale where the
            ends are far apart) or 'option=a|b|c' (choices), for options of the training.
        trials: How many trainings the search may take; the chosen one runs once more.
        max_drop: How many points of the task's metric, that is hundredths, the student may lose against the teacher.
        freeze_embeddings: Do not train word and position embeddings; halves a small model's step on a CPU.
        latency_batch_sizes: Batch sizes whose latency is timed; the geometric mean of the speedups counts.
        latency_repeats: How many rounds are timed; the models take turns in each.
        latency_examples: How many examples are timed, evenly spread over the lengths.
    """

    models: list[str]
    space: list[str] = field(default_factory=lambda: ["learning_rate=1e-5:3e-4"])
    trials: int = 10
    max_drop: float = 1.0
    freeze_embeddings: bool = False
    latency_batch_sizes: list[int] = field(default_factory=lambda: [1])
    latency_repeats: int = 5
    latency_examples: int = 64

    def __post_init__(self) -> None:
        for name in ("trials", "latency_repeats", "latency_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop must be a number of points, at least 0, got {self.max_drop}.")
        if min(self.latency_batch_sizes, default=0) < 1:
            raise ValueError(f"latency_batch_sizes must be at least 1, got {self.latency_batch_sizes}.")
        if len(set(self.models)) < len(self.models) or not self.models:
            raise ValueError(f"models must name at least one model, each once, got {self.models}.")


@dataclass(frozen=True, kw_only=True)
class Search(StageArguments):
    """What `search` takes.

    Args:
        searched: What is tried, and what is wanted.
        teacher: The teacher, which is also what speed and quality are compared with.
        data: The task. The split that is measured in training chooses: report the result on another one.
        device: Where the trainings run.
        distillation: Weights of the losses and everything else about training that no trial draws.
    """

    searched: SearchArguments
    teacher: TeacherArguments
    data: DataArguments
    device: DeviceArguments = DeviceArguments()
    distillation: DistillationArguments

    def __post_init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Each process would measure speeds of its own, and choose by them.
            raise ValueError("search must be started as one process, got several.")
        super().__post_init__()
        if find_spec("optuna") is None:
            raise ValueError("search must have optuna, which is not installed: pip install 'hf_compress[search]'.")
        read_dials(self.searched.space, self.distillation)
        if not self.distillation.uses_teacher:
            raise ValueError(
                "alpha_output, alpha_layer or alpha_similarity must be above 0: the teacher would teach nothing."
            )


def search(arguments: Search) -> dict[str, Any]:
    """Train students with drawn settings, and save the fastest that loses at most `max_drop` points.

    Where none loses so little, the one that loses least is saved.

    Returns:
        Of the saved student what `distill` returns, `model` and `settings` that it was made of, its `drop` in points
        and `speedup` on the split that chose it, whether it is `within` the bound, and `trials`, all of them.

    Raises:
        ValueError: If models, teacher and data do not fit together, or the task has no metric that is better when it
            is higher.
    """
    wanted, args = arguments.searched, copy.copy(arguments.distillation)
    folder = Path(str(args.output_dir))
    # The trials save nothing: the chosen one is trained again, with its checkpoints.
    args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
    trainer, task = _trainer(arguments, args)
    split = task.measured_split()
    if task.lower_is_better:
        raise ValueError(f"search must have a metric that is better when it is higher, got {task.main_metric}.")
    teacher = measured(arguments.teacher.teacher_name_or_path, task, split, arguments.data.max_length)
    dense = evaluated(teacher).metrics()[task.main_metric]
    trials = _Trials(wanted, read_dials(wanted.space, args), dense, _speeds(arguments, teacher, task, folder), folder)
    _run_trials(trainer, trials, f"eval_{task.main_metric}", args.seed)
    best = trials.best()
    logger.info("Trained again and saved: %s", best)
    results = _train(arguments, best)
    found = {**results, **best, "trials": trials.done}
    write_json(folder / "results.json", {**json.loads((folder / "results.json").read_text(encoding="utf-8")), **found})
    return found


class _Trials:
    """What the trials of a search drew and reached."""

    def __init__(
        self, wanted: SearchArguments, dials: Sequence[Dial], dense: float, speeds: Mapping[str, float], folder: Path
    ) -> None:
        self.number = wanted.trials
        self._wanted, self._dials, self._dense, self._speeds, self._folder = wanted, dials, dense, speeds, folder
        self._settings: dict[str, float] = {}
        self._model = ""
        self.done: list[dict[str, Any]] = []

    def draw(self, trial: Any) -> dict[str, float]:
        """The settings of a trial; which model it starts from is no setting of the training."""
        self._model = _drawn_model(trial, self._wanted)
        self._settings = {dial.name: dial.draw(trial) for dial in self._dials}
        return self._settings

    def note(self, metric: float) -> float:
        """Note what a trial reached; returns what it is worth."""
        drop = 100 * (self._dense - metric)
        entry = {"model": self._model, "settings": self._settings, "drop": drop, "speedup": self._speeds[self._model]}
        self.done.append({**entry, "within": drop <= self._wanted.max_drop})
        write_json(self._folder / FILE, self.done)
        logger.info("Trial %d of %d: %s", len(self.done), self._wanted.trials, self.done[-1])
        return _worth(self.done[-1])

    def best(self) -> dict[str, Any]:
        """The one that is worth most, the first of equal ones."""
        return max(self.done, key=_worth)


def _drawn_model(trial: Any, wanted: SearchArguments) -> str:
    """The model that a trial starts from; the same however often it is asked."""
    return str(trial.suggest_categorical("model", wanted.models))


def _worth(trial: Mapping[str, Any]) -> float:
    """Speed within the bound, and less than any speed beyond it: there, the less is lost the better."""
    speed: float = trial["speedup"]
    return (speed if trial["within"] else -1.0) - _POINT * float(trial["drop"])


def _trainer(arguments: Search, args: DistillationArguments) -> tuple[DistillationTrainer, Task]:
    """A trainer that begins each trial with the model that it drew."""
    wanted, name = arguments.searched, arguments.teacher.teacher_name_or_path
    starts = {each: ModelArguments(each, freeze_embeddings=wanted.freeze_embeddings) for each in wanted.models}
    first = starts[wanted.models[0]]
    task, processor, student, rows = prepare(first, arguments.data, args.seed, teacher=name)
    _require_one_vocabulary(wanted.models)

    def begin(trial: Any) -> PreTrainedModel:
        own = first if trial is None else starts[_drawn_model(trial, wanted)]
        model = own.open(task)[1]
        own.prepare_(model)
        return model

    common = trainer_arguments(task, student, processor, args, rows)
    add_teacher_columns(common, task, arguments.data, name)
    del common["model"]
    return DistillationTrainer(model_init=begin, teacher_model=open_model(name, task), **common), task


def _require_one_vocabulary(models: Sequence[str]) -> None:
    """Refuse candidates that read a text as different tokens."""
    known = [open_tokenizer(name).get_vocab() for name in models if has_tokenizer(name)]
    other = next((name for name, words in zip(models, known, strict=False) if words != known[0]), None)
    if other is not None:
        raise ValueError(f"models must have one tokenizer, but that of {other!r} is not that of {models[0]!r}.")


def _speeds(arguments: Search, teacher: Measured, task: Task, folder: Path) -> dict[str, float]:
    """Model -> how many times as fast as the teacher it is, in the geometric mean over the batch sizes.

    They are stored: what an interrupted search draws when it begins again depends on them. Of other models, data or
    settings they are measured again.
    """
    wanted, file = arguments.searched, folder / _SPEEDS_FILE
    device = chosen_device(arguments.device.device)
    models: dict[str, Any] = {_TEACHER: teacher.model, **{name: open_model(name, task) for name in wanted.models}}
    settings = [wanted.latency_batch_sizes, wanted.latency_repeats, wanted.latency_examples, device, arguments.data]
    weights = {name: weights_digest(model) for name, model in models.items()}
    measured_of = {"settings": repr(settings), "weights": weights}
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("measured_of") == measured_of:
            known: dict[str, float] = stored["speeds"]
            return known
    for model in models.values():
        model.to(device)
    found: dict[str, list[float]] = {name: [] for name in wanted.models}
    for size in wanted.latency_batch_sizes:
        batches = unpadded_batches(
            teacher.rows, teacher.processor, min(size, len(teacher.rows)), wanted.latency_examples
        )
        faster = speedups(measure_latency(models, batches, wanted.latency_repeats, warmup=1), _TEACHER)
        for name in wanted.models:
            found[name].append(faster[name].median)
    speeds = {name: math.prod(each) ** (1 / len(each)) for name, each in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"measured_of": measured_of, "speeds": speeds})
    return speeds


def _run_trials(trainer: DistillationTrainer, trials: _Trials, metric: str, seed: int) -> None:
    from optuna.samplers import TPESampler

    trainer.hyperparameter_search(
        hp_space=trials.draw,
        compute_objective=lambda metrics: trials.note(metrics[metric]),
        n_trials=trials.number,
        direction="maximize",
        backend="optuna",
        sampler=TPESampler(seed=seed),
    )


def _train(arguments: Search, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Train the chosen student as `distill` does."""
    args = copy.copy(arguments.distillation)
    for name, value in chosen["settings"].items():
        setattr(args, name, value)
    student = ShallowStudentArguments(chosen["model"], freeze_embeddings=arguments.searched.freeze_embeddings)
    return distill(Distill(
        model=student, teacher=arguments.teacher, data=arguments.data, device=arguments.device, distillation=args
    ))  # fmt: skip
