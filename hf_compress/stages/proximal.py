"""Trains a student and a teacher that stays near it (ProKT), and on demand what to compare the student with."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.core.saving import write_json
from hf_compress.stages.arguments import DeviceArguments, StageArguments, TeacherArguments
from hf_compress.stages.baselines import BASELINES, FOLDER, BaselineTrainings, Pair
from hf_compress.stages.students import StudentArguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.training.proximal_arguments import ProximalArguments


logger = logging.getLogger(__name__)


@dataclass
class PretrainedTeacherArguments(TeacherArguments):
    """Which model teaches while it learns.

    Args:
        teacher_name_or_path: Hub name or folder of the model that teaches and learns the task beside the student:
            pretrained, and larger than the student.
    """


@dataclass
class BaselineArguments:
    """What to compare the student with.

    Args:
        baselines: What else to train, with the same arguments and from the same beginning, into
            `<output_dir>/baselines`: hard_labels (the student alone), distillation (a teacher is fine-tuned for as
            long, then the student learns from it), lambda_0 (the teacher is not held near the student).
    """

    baselines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.baselines:
            if name not in BASELINES:
                raise ValueError(f"baselines must be some of {', '.join(BASELINES)}, got {name!r}.")
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError(f"baselines must name each of them once, got {' '.join(self.baselines)}.")


@dataclass(frozen=True, kw_only=True)
class Proximal(StageArguments):
    """What `proximal` takes.

    Args:
        student: The student.
        teacher: The teacher before fine-tuning. When it has another tokenizer, each example is encoded twice.
        data: The task.
        comparison: What else is trained.
        device: Where the training runs.
        distillation: How the teacher is held, weights of losses, everything else about training.
    """

    student: StudentArguments
    teacher: PretrainedTeacherArguments
    data: DataArguments
    comparison: BaselineArguments = field(default_factory=BaselineArguments)
    device: DeviceArguments = DeviceArguments()
    distillation: ProximalArguments

    def __post_init__(self) -> None:
        super().__post_init__()
        needless = [name for name in self.comparison.baselines if name != "hard_labels"]
        if needless and not self.distillation.teacher_learning_rate:
            raise ValueError(
                f"baselines must leave out {' and '.join(needless)} with teacher_learning_rate 0: the training itself "
                "is distillation from a teacher that does not change."
            )

    def folders_written(self) -> list[str]:
        folders = [self.output_dir, f"{self.output_dir}/teacher"]
        return folders + [f"{self.output_dir}/{FOLDER}/{name}" for name in self.comparison.baselines]


def proximal(arguments: Proximal) -> dict[str, Any]:
    """Train a student and its teacher together, evaluate the student and save both; then the baselines.

    Returns:
        Metrics of the validation split (of `test` where there is none) and the training time in seconds; under
        `baselines` the same of each baseline.

    Raises:
        ValueError: If student, teacher and data do not fit together, a loss is not finite, or a finished baseline of a
            resumed run had other arguments.
    """
    pair = Pair(arguments.student, arguments.teacher.teacher_name_or_path, arguments.data)
    wanted, baselines = arguments.comparison.baselines, BaselineTrainings(pair, arguments.distillation)
    baselines.check(wanted)
    results = pair.train(arguments.distillation)
    if wanted:
        found = baselines.run(wanted)
        if arguments.distillation.process_index == 0:
            write_json(Path(arguments.output_dir, FOLDER, "results.json"), {"proximal": results, **found})
        results = {**results, "baselines": found}
    return results
