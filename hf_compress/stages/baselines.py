"""The trainings that a proximal distillation is compared with: same beginning, same arguments, other teacher."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from hf_compress.core.output_layer import zero_output_layers_
from hf_compress.stages.models import ModelArguments, head_config, open_model
from hf_compress.stages.students import StudentArguments, long_enough_
from hf_compress.stages.training import add_teacher_columns, prepare, run_training, trainer_arguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.task import Processor, Task
from hf_compress.training.proximal import ProximalTrainer
from hf_compress.training.proximal_arguments import ProximalArguments
from hf_compress.training.trainer import CompressionTrainer


logger = logging.getLogger(__name__)

FOLDER = "baselines"
# Name -> what the log says about it.
BASELINES = {
    "hard_labels": "the student alone, on the labels",
    "distillation": "the student from a teacher that was fine-tuned before",
    "lambda_0": "student and teacher together, the teacher not held near the student",
}
_TUNED_TEACHER = "tuned_teacher"
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
        return run_training(ProximalTrainer(teacher_model=taught, **common), task, student, processor, args)

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

    def run(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Name -> results; those of the fine-tuned teacher are among them when it was needed."""
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            logger.info("Baseline %s: %s.", name, BASELINES[name])
            if name == "hard_labels":
                found[name] = self._done(name) or self.pair.train_student(self._arguments(name))
            elif name == "lambda_0":
                free = self._arguments(name, **{**_defaults(), "proximal_weight": 0.0})
                found[name] = self._done(name) or self.pair.train(free)
            else:
                tuned = self._arguments(_TUNED_TEACHER, learning_rate=self.args.teacher_learning_rate)
                found[_TUNED_TEACHER] = self._done(_TUNED_TEACHER) or self.pair.train_teacher(tuned)
                fixed = self._arguments(name, **_defaults(), teacher_learning_rate=0.0)
                found[name] = self._done(name) or self.pair.train(fixed, str(tuned.output_dir))
        return found

    def _folder(self, name: str) -> Path:
        return Path(str(self.args.output_dir), FOLDER, name)

    def _resumes(self) -> bool:
        return str(self.args.resume_from_checkpoint or "no").lower() not in ("false", "0", "no")

    def _done(self, name: str) -> dict[str, Any] | None:
        """The results of a baseline that an interrupted run has finished."""
        file = self._folder(name) / "results.json"
        if not self._resumes() or not file.is_file():
            return None
        logger.info("%s is finished: its results are read.", self._folder(name))
        results: dict[str, Any] = json.loads(file.read_text())
        return results

    def _arguments(self, name: str, **changes: Any) -> ProximalArguments:
        """The arguments of a baseline: a folder of its own, no upload."""
        # Not built again from their fields, which were completed when they were made.
        found = copy.copy(self.args)
        folder = self._folder(name)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # type: ignore[no-untyped-call]  # of HF
        started = self._resumes() and last is not None
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
