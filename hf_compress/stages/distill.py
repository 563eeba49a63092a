"""Trains a student with a fixed teacher, a teacher that is fine-tuned beside it, or a teacher's saved states."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_compress.stages.arguments import DeviceArguments, StageArguments, TeacherArguments
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.stages.students import ShallowStudentArguments, long_enough_
from hf_compress.stages.training import add_teacher_columns, prepare, run_training, trainer_arguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.training.arguments import DistillationArguments, JointTeacherArguments, SnapshotTeacherArguments
from hf_compress.training.distillation import DistillationTrainer
from hf_compress.training.joint_teacher import JointTeacherTrainer
from hf_compress.training.snapshot_teacher import SnapshotTeacherTrainer


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Distill(StageArguments):
    """What `distill` takes.

    Args:
        model: The student, or the deeper model that it is cut out of.
        teacher: The teacher. When it has another tokenizer, each example is encoded twice.
        data: The task.
        device: Where the training runs.
        distillation: Weights of the losses and everything else about training.
    """

    model: ShallowStudentArguments
    teacher: TeacherArguments
    data: DataArguments
    device: DeviceArguments = DeviceArguments()
    distillation: DistillationArguments


@dataclass(frozen=True, kw_only=True)
class JointDistill(StageArguments):
    """What `joint_distill` takes.

    Args:
        model: The student, for example a linearized pretrained encoder.
        teacher: The teacher before fine-tuning; when it has no head yet, it starts with the student's.
        data: The task.
        device: Where the training runs.
        distillation: Losses, the teacher's learning rate and schedule, everything else about training.
    """

    model: ModelArguments
    teacher: TeacherArguments
    data: DataArguments
    device: DeviceArguments = DeviceArguments()
    distillation: JointTeacherArguments

    def folders_written(self) -> list[str]:
        return [self.output_dir, f"{self.output_dir}/teacher"]


@dataclass(frozen=True, kw_only=True)
class SnapshotDistill(StageArguments):
    """What `snapshot_distill` takes.

    Args:
        model: The student, for example a linearized pretrained encoder.
        data: The task.
        device: Where the training runs.
        distillation: Losses, the teacher's snapshots, everything else about training.
    """

    model: ModelArguments
    data: DataArguments
    device: DeviceArguments = DeviceArguments()
    distillation: SnapshotTeacherArguments


def distill(arguments: Distill) -> dict[str, Any]:
    """Teach a (compressed) student what a fixed teacher knows, evaluate it and save it.

    Returns:
        Metrics of the validation split (of `test` where there is none) and the training time in seconds.

    Raises:
        ValueError: If student, teacher and data do not fit together, or the loss is not finite.
    """
    args, name = arguments.distillation, arguments.teacher.teacher_name_or_path
    teaches = name if args.uses_teacher else None
    task, tokenizer, student, rows = prepare(arguments.model.beside(name), arguments.data, args.seed, teacher=teaches)
    common = trainer_arguments(task, student, tokenizer, args, rows)
    teacher = None
    if args.uses_teacher:
        teacher = open_model(name, task)
        add_teacher_columns(common, task, arguments.data, name)
    trainer = DistillationTrainer(teacher_model=teacher, **common)
    return run_training(trainer, task, student, tokenizer, args, teaches)


def joint_distill(arguments: JointDistill) -> dict[str, Any]:
    """Train a student beside a teacher that is fine-tuned on the same batches (trajectory guided).

    Returns:
        Metrics of the validation split (of `test` where there is none) and the training time in seconds.

    Raises:
        ValueError: If student, teacher and data do not fit together, or a loss is not finite.
    """
    args, name = arguments.distillation, arguments.teacher.teacher_name_or_path
    task, tokenizer, student, rows = prepare(arguments.model, arguments.data, args.seed)
    common = trainer_arguments(task, student, tokenizer, args, rows)
    teacher = None
    if args.uses_teacher:
        teacher = open_model(name, task, fresh_head=True)
        _share_new_head_(teacher, student, name)
        long_enough_(teacher, student)
        add_teacher_columns(common, task, arguments.data, name)
    trainer = JointTeacherTrainer(teacher_model=teacher, **common)
    return run_training(trainer, task, student, tokenizer, args, name if args.uses_teacher else None)


def _share_new_head_(teacher: PreTrainedModel, student: PreTrainedModel, teacher_name: str) -> None:
    """Give a teacher the student's values where its own files have none: both start from one head and pooler."""
    opened: Any = type(teacher).from_pretrained(teacher_name, config=teacher.config, output_loading_info=True)
    missing = opened[1]["missing_keys"]
    ours, theirs = teacher.state_dict(), student.state_dict()
    values = {name: theirs[name] for name in missing if name in theirs and theirs[name].shape == ours[name].shape}
    if values:
        teacher.load_state_dict(values, strict=False)
        logger.info("The teacher starts with the student's head (%d tensors).", len(values))


def snapshot_distill(arguments: SnapshotDistill) -> dict[str, Any]:
    """Train a student on the saved states of a teacher's fine-tuning, one after the other (waypoint guided).

    Returns:
        Metrics of the validation split (of `test` where there is none) and the training time in seconds.

    Raises:
        ValueError: If student, teachers and data do not fit together, or the loss is not finite.
    """
    args = arguments.distillation
    task, tokenizer, student, rows = prepare(arguments.model, arguments.data, args.seed)
    common = trainer_arguments(task, student, tokenizer, args, rows)
    teacher = None
    if args.uses_teacher and args.teacher_snapshots:
        add_teacher_columns(common, task, arguments.data, args.teacher_snapshots[0])
        teacher = " to ".join(dict.fromkeys(Path(args.teacher_snapshots[end]).name for end in (0, -1)))
    return run_training(SnapshotTeacherTrainer(**common), task, student, tokenizer, args, teacher)
