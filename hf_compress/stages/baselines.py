"""The trainings that a proximal distillation is compared with: same beginning, same arguments, other teacher."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from hf_compress.core.output_layer import zero_output_layers_
from hf_compress.core.saving import write_json
from hf_compress.stages.models import ModelArguments, head_config, open_model
from hf_compress.stages.students import StudentArguments, long_enough_
from hf_compress.stages.training import add_teacher_columns, prepare, run_training, trainer_arguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.task import Processor, Task
from hf_compress.training.checkpoints import last_whole_checkpoint
from hf_compress.training.proximal import ProximalTrainer
from hf_compress.training.proximal_arguments import ProximalArguments
from hf_compress.training.trainer import CompressionTrainer


logger = logging.getLogger(__name__)

_Training = Callable[[ProximalArguments], dict[str, Any]]
FOLDER = "baselines"
# Name -> what the log says about it.
BASELINES = {
    "hard_labels": "the student alone, on the labels",
    "distillation": "the student from a teacher that was fine-tuned before",
    "lambda_0": "student and teacher together, the teacher not held near the student",
}
_TUNED_TEACHER = "tuned_teacher"
# In the folder of a finished baseline: what its results depend on.
_SETTINGS = "baseline.json"
# Arguments that change where a training writes and what it tells, not what it computes.
_WHERE = {
    "output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token", "run_name", "report_to",
    "disable_tqdm", "log_level", "log_level_replica", "logging_dir", "local_rank", "save_total_limit",
}  # fmt: skip
# The fields of a teacher that learns, which a fixed one has no use for.
_OF_A_LEARNER = ("proximal_weight", "prox_mode", "dual_epsilon", "dual_beta", "dual_learning_rate", "evaluate_teacher")


@dataclass(frozen=True)
class Pair:
    """A student and a teacher before their training.

    Args:
        student: Which model is the student.
        teacher: Hub name or folder of the teacher.
        data: The task.
    """

    student: StudentArguments
    teacher: str
    data: DataArguments

    def train(self, args: ProximalArguments, teacher: str | None = None) -> dict[str, Any]:
        """Open both anew, train, evaluate and save.

        Args:
            args: How.
            teacher: Another teacher than the pair's.

        Raises:
            ValueError: If the teacher does not learn and has no head, or models and data do not fit together.
        """
        name = teacher or self.teacher
        task, processor, student, rows = self._prepared(args)
        if not args.teacher_learning_rate and head_config(name, task) is None:
            raise ValueError(
                f"teacher_name_or_path must be a model that was fine-tuned for this task when teacher_learning_rate "
                f"is 0, got {name!r} without a head for {task.describe_head()}: fine-tune it first, or let it learn."
            )
        common = trainer_arguments(task, student, processor, args, rows)
        taught = open_model(name, task, fresh_head=True)
        if args.teacher_learning_rate:
            long_enough_(taught, student)
        add_teacher_columns(common, task, self.data, name)
        return run_training(ProximalTrainer(teacher_model=taught, **common), task, student, processor, args, name)

    def train_student(self, args: ProximalArguments) -> dict[str, Any]:
        """Train the student alone, on the labels."""
        task, processor, student, rows = self._prepared(args)
        if args.zero_init_heads and args.resume_from_checkpoint is None:
            zero_output_layers_({"student": student})
        trainer = CompressionTrainer(**trainer_arguments(task, student, processor, args, rows))
        return run_training(trainer, task, student, processor, args)

    def train_teacher(self, args: ProximalArguments) -> dict[str, Any]:
        """Fine-tune the teacher, for as many updates as the pair learns."""
        task, processor, model, rows = prepare(ModelArguments(self.teacher), self.data, args.seed)
        trainer = CompressionTrainer(**trainer_arguments(task, model, processor, args, rows))
        return run_training(trainer, task, model, processor, args)

    def _prepared(self, args: ProximalArguments) -> tuple[Task, Processor, PreTrainedModel, dict[str, Dataset]]:
        # Where the teacher has a head, a new one of the student takes its labels.
        labels = self.teacher if head_config(self.teacher) is not None else None
        return prepare(self.student.beside(self.teacher), self.data, args.seed, teacher=labels)


class BaselineTrainings:
    """Trains baselines, each into a folder of its own. With `resume_from_checkpoint`, finished ones are read.

    Args:
        pair: The models.
        args: Those of the training to compare with.
    """

    def __init__(self, pair: Pair, args: ProximalArguments) -> None:
        self.pair, self.args = pair, args

    def check(self, names: Sequence[str]) -> None:
        """Refuse finished baselines of other arguments, before anything is trained.

        Raises:
            ValueError: Names a folder and what differs.
        """
        for name in names:
            for baseline, args, _ in self._trainings(name):
                self._done(baseline, args)

    def run(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Name -> results; those of the fine-tuned teacher are among them when it was needed.

        Raises:
            ValueError: As `check`.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            logger.info("Baseline %s: %s.", name, BASELINES[name])
            for baseline, args, train in self._trainings(name):
                known = self._done(baseline, args)
                if known is None:
                    known = train(args)
                    if args.process_index == 0:
                        write_json(self._folder(baseline) / _SETTINGS, self._settings(args))
                found[baseline] = known
        return found

    def _trainings(
        self, name: str
    ) -> list[tuple[str, ProximalArguments, Callable[[ProximalArguments], dict[str, Any]]]]:
        """The trainings of a baseline in order: name, arguments, what trains with them."""
        if name == "hard_labels":
            return [(name, self._arguments(name), self.pair.train_student)]
        if name == "lambda_0":
            return [(name, self._arguments(name, **{**_defaults(), "proximal_weight": 0.0}), self.pair.train)]
        tuned = self._arguments(_TUNED_TEACHER, learning_rate=self.args.teacher_learning_rate)
        fixed = self._arguments(name, **_defaults(), teacher_learning_rate=0.0)
        distil = partial(self.pair.train, teacher=str(tuned.output_dir))
        return [(_TUNED_TEACHER, tuned, self.pair.train_teacher), (name, fixed, distil)]

    def _folder(self, name: str) -> Path:
        return Path(str(self.args.output_dir), FOLDER, name)

    def _resumes(self) -> bool:
        return str(self.args.resume_from_checkpoint or "no").lower() not in ("false", "0", "no")

    def _settings(self, args: ProximalArguments) -> dict[str, Any]:
        """What a baseline's results depend on, as JSON has it."""
        fields = {name: value for name, value in args.to_dict().items() if name not in _WHERE}  # type: ignore[no-untyped-call]  # of transformers
        found = {**fields, **{part.name: getattr(self.pair, part.name) for part in dataclasses.fields(self.pair)}}
        plain = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in found.items()}  # type: ignore[arg-type]  # no class
        settings: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        return settings

    def _done(self, name: str, args: ProximalArguments) -> dict[str, Any] | None:
        """The results of a baseline that an interrupted run has finished."""
        folder = self._folder(name)
        results, settings = folder / "results.json", folder / _SETTINGS
        if not self._resumes() or not (results.is_file() and settings.is_file()):
            return None
        before, now = json.loads(settings.read_text()), self._settings(args)
        other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if other:
            raise ValueError(
                f"output_dir holds the finished baseline {str(folder)!r} of other arguments: {other[0]} was "
                f"{before.get(other[0])!r}, and now it is {now.get(other[0])!r}. Remove that folder to train it "
                "again, or take another output_dir."
            )
        logger.info("%s is finished: its results are read.", folder)
        found: dict[str, Any] = json.loads(results.read_text())
        return found

    def _arguments(self, name: str, **changes: Any) -> ProximalArguments:
        """The arguments of a baseline: a folder of its own, no upload."""
        # Not built again from their fields, which were completed when they were made.
        found = copy.copy(self.args)
        folder = self._folder(name)
        started = self._resumes() and folder.is_dir() and last_whole_checkpoint(folder, found.world_size) is not None
        own = {"output_dir": str(folder), "push_to_hub": False, "resume_from_checkpoint": "true" if started else None}
        for field, value in {**own, **changes}.items():
            setattr(found, field, value)
        found.check()
        return found


def _defaults() -> dict[str, Any]:
    """The defaults of the fields that say how a teacher learns."""
    return {
        entry.name: entry.default for entry in dataclasses.fields(ProximalArguments) if entry.name in _OF_A_LEARNER
    }
