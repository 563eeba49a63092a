"""Arguments of the trainers that distil, on top of `TrainingArguments`."""

from __future__ import annotations

import copy
import dataclasses
import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from hf_compress.core.launcher import check_launcher
from hf_compress.training.compat import follow_published_
from hf_compress.training.joined_arguments import join_arguments


@dataclass
class DistillationArguments(TrainingArguments):
    """Arguments of `DistillationTrainer`.

    The loss is `alpha_task * task + alpha_output * T^2 * KL(teacher || student) + alpha_layer * layer`. Sentence
    encoders have neither labels nor logits: with `alpha_task` 0, their loss is
    `alpha_output * vector + alpha_similarity * similarity + alpha_layer * layer`.

    Args:
        alpha_task: Weight of the student's own loss on the labels.
        alpha_output: Weight of the divergence of the student's outputs from the teacher's (of their mean squared
            difference in regression; of one minus the cosine between sentence vectors).
        alpha_layer: Weight of the distance between the student's and the teacher's hidden states.
        alpha_similarity: For sentence encoders, weight of the mean squared difference between the student's cosines of
            all pairs of sentences in a micro-batch and the teacher's, whose vectors may have another width.
        temperature: T, which softens both output distributions; must be above 0.
        layer_reduction: Whether the distances of the matched layers are averaged (`mean`) or added (`sum`).
        layer_normalize: Compare hidden states after a LayerNorm without parameters.
        mask_padding: Leave padding positions out of the distance of hidden states.
        layer_map: For each student layer the zero-based teacher layer whose output it imitates, -1 for none. By
            default teacher layers are spread evenly, and the last student layer imitates the last teacher layer.
        max_distill_steps: Number of updates with a teacher; afterwards only the task loss is used and the teacher no
            longer runs.
        teacher_dropout: Run the teacher with dropout in training; it never has dropout in evaluations.
        teacher_cache_dir: Folder in which the teacher's outputs are stored, so that it runs once for each example.
        compat: `cald` trains as the published code of CALD does. The layer loss is the sum over all states, embeddings
            included, of raw mean squared errors over all positions, padding included (it sets `layer_reduction=sum`
            and `mask_padding=False`; `layer_normalize`, `layer_map` and `teacher_cache_dir` must be left out). The
            teacher has dropout (`teacher_dropout=True`), gradients are not clipped (`max_grad_norm=0`), a last,
            shorter group of accumulated micro-batches is divided by the full number of them, and a learning teacher
            follows the student's schedule only in the updates in which it learns (`teacher_schedule=stretched`), which
            are counted anew in every epoch. A value of these settings that is neither their default nor the published
            one is refused. Learning rates, warm-up, weights of terms and weight decay stay as given (published weight
            decay: 0, which the commands use by default).

    Raises:
        ValueError: Names the field, the rule and the value.
    """

    # What `compat` may name.
    published: ClassVar[tuple[str, ...]] = ("cald",)

    alpha_task: float = 1.0
    alpha_output: float = 1.0
    alpha_layer: float = 0.0
    alpha_similarity: float = 0.0
    temperature: float = 2.0
    layer_reduction: Literal["mean", "sum"] = "mean"
    layer_normalize: bool = False
    mask_padding: bool = True
    layer_map: list[int] | None = None
    max_distill_steps: int | None = None
    teacher_dropout: bool = False
    teacher_cache_dir: str | None = None
    compat: Literal["cald"] | None = None

    def __post_init__(self) -> None:
        # Before processes wait for each other.
        check_launcher()
        super().__post_init__()  # type: ignore[no-untyped-call]  # of transformers
        self.check()

    def check(self) -> None:
        """Raise `ValueError` when values are out of range or contradict each other."""
        for name in ("alpha_task", "alpha_output", "alpha_layer", "alpha_similarity"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be zero or positive, got {getattr(self, name)}.")
        if not self.task_weight and not self.uses_teacher:
            raise ValueError("alpha_task, alpha_output and alpha_layer must not all be 0: nothing would be learned.")
        if self.alpha_similarity and self.per_device_train_batch_size < 2:
            raise ValueError(
                "per_device_train_batch_size must be at least 2 with alpha_similarity, which compares the sentences "
                f"of a micro-batch, got {self.per_device_train_batch_size}."
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.max_distill_steps is not None and self.max_distill_steps < 0:
            raise ValueError(f"max_distill_steps must not be negative, got {self.max_distill_steps}.")
        if self.max_distill_steps is not None and not self.task_weight:
            raise ValueError("alpha_task must be above 0 with max_distill_steps: nothing would be learned afterwards.")
        for layer in self.layer_map or ():
            if type(layer) is not int:
                raise ValueError(
                    f"layer_map must hold one teacher layer (an int) for each student layer, got {layer!r} in it."
                )
        for name, choices in (("layer_reduction", ("mean", "sum")), ("compat", (None, *self.published))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.compat is not None:
            follow_published_(self, self.compat)
        if self.layer_map is not None and not self.alpha_layer:
            raise ValueError(
                f"layer_map is {self.layer_map}, but alpha_layer is 0: no layers are compared. Set alpha_layer above "
                "0, or leave layer_map out."
            )
        if self.teacher_cache_dir and self.teacher_dropout:
            raise ValueError("teacher_cache_dir must be unset with teacher_dropout: its outputs differ every time.")
        if self.teacher_cache_dir and self.alpha_layer and not self.mask_padding:
            raise ValueError("teacher_cache_dir must go with mask_padding=True: padding is not stored.")

    @property
    def task_weight(self) -> float:
        """Weight of the student's own loss on the labels."""
        return self.alpha_task

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher."""
        return self.alpha_output > 0 or self.alpha_layer > 0 or self.alpha_similarity > 0


@dataclass
class LearningTeacherArguments(DistillationArguments):
    """What the trainers have in common whose teacher learns beside the student.

    Args:
        teacher_learning_rate: Peak learning rate of the teacher; with 0 its weights never change.
        save_teacher: Save the trained teacher to `<output_dir>/teacher`. With `max_distill_steps` the teacher stops
            learning after that update, too, and is saved before its schedule has ended.
        teacher_dropout: Run the teacher with dropout when it learns.

    Raises:
        ValueError: Names the field, the rule and the value.
    """

    teacher_learning_rate: float = 3e-5
    save_teacher: bool = True
    teacher_dropout: bool = True

    def check(self) -> None:
        """Raise `ValueError` when values are out of range or contradict each other."""
        if self.teacher_cache_dir:
            raise ValueError("teacher_cache_dir must be unset: a learning teacher's outputs change all the time.")
        super().check()
        if not 0 <= self.teacher_learning_rate < float("inf"):
            raise ValueError(f"teacher_learning_rate must be zero or positive, got {self.teacher_learning_rate}.")
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor must be 0: the teacher learns from its own loss, which is not smoothed, "
                f"got {self.label_smoothing_factor}."
            )
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type must not depend on a metric: the teacher has none, got {self.lr_scheduler_type}."
            )


@dataclass
class JointTeacherArguments(LearningTeacherArguments):
    """Arguments of `JointTeacherTrainer`.

    Args:
        teacher_update_cycle: The teacher learns in one of this many updates of the student.
        teacher_schedule: How the teacher's learning rate changes. `own`: its warm-up and decay end with the training;
            `stretched`: the student's schedule, advanced only when the teacher learns, so that the training ends
            before the decay does (as published, and with `compat=cald`).
        teacher_dropout: Run the teacher with dropout in training. On by default: this teacher runs once for each
            batch, for its own loss and for the targets, and fine-tuning trains it with dropout.

    Raises:
        ValueError: Names the field, the rule and the value.
    """

    teacher_update_cycle: int = 1
    teacher_schedule: Literal["own", "stretched"] = "own"

    def check(self) -> None:
        """Raise `ValueError` when values are out of range or contradict each other."""
        super().check()
        if self.teacher_update_cycle < 1:
            raise ValueError(f"teacher_update_cycle must be at least 1, got {self.teacher_update_cycle}.")
        if self.teacher_schedule not in ("own", "stretched"):
            raise ValueError(f"teacher_schedule must be 'own' or 'stretched', got {self.teacher_schedule!r}.")


@dataclass
class SnapshotTeacherArguments(DistillationArguments):
    """Arguments of `SnapshotTeacherTrainer`.

    Args:
        teacher_snapshots: One pattern such as `runs/dense/checkpoint-*`, or folders of saved teachers. Names that all
            end in a number are sorted by it; others stay in the given order.

    Raises:
        ValueError: If nothing is found, some names end in a number and others do not, or a folder holds no model.
    """

    teacher_snapshots: list[str] | None = None

    def check(self) -> None:
        """Raise `ValueError` when values are out of range or contradict each other, or a teacher is not there."""
        if self.teacher_cache_dir:
            raise ValueError("teacher_cache_dir must be unset: it holds the outputs of one teacher only.")
        super().check()
        given = [self.teacher_snapshots] if isinstance(self.teacher_snapshots, str) else self.teacher_snapshots or []
        self.teacher_snapshots = sort_snapshots([found for name in given for found in _expand(name)])
        if not self.teacher_snapshots and self.uses_teacher:
            raise ValueError(f"teacher_snapshots must match at least one saved model, got {given or 'nothing'}.")
        for folder in self.teacher_snapshots:
            if not Path(folder, "config.json").is_file():
                raise ValueError(f"teacher_snapshots must be saved models, got {folder!r} without a config.json.")
            if not any(path.suffix in (".safetensors", ".bin") for path in Path(folder).iterdir()):
                raise ValueError(f"teacher_snapshots must be saved models, got {folder!r} without weights.")


def arguments_like(kind: type[DistillationArguments], args: TrainingArguments | None) -> DistillationArguments:
    """The given arguments with the fields that a trainer needs besides; those it adds have their defaults.

    Args:
        kind: Which class the trainer needs.
        args: Its instances are returned as they are; None gives those of an output folder `tmp_trainer`, as in
            `Trainer`.

    Raises:
        ValueError: If these are no `TrainingArguments`, or what is added has no sensible default.

    Example:
        >>> args = arguments_like(DistillationArguments, TrainingArguments("out", learning_rate=1e-4, use_cpu=True))
        >>> args.learning_rate, args.temperature
        (0.0001, 2.0)
    """
    if args is None:
        return kind("tmp_trainer")
    if isinstance(args, kind):
        return args
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"args must be {kind.__name__} or TrainingArguments, got {type(args).__name__}.")
    if not isinstance(args, DistillationArguments):
        # Those of another kind of trainer keep their own fields.
        kind = join_arguments(kind, type(args))
    # Not built again from its fields: those were completed when it was made, and a user may have changed them since.
    found: Any = copy.copy(args)
    found.__class__ = kind
    for entry in dataclasses.fields(kind):
        if entry.name not in vars(found):
            setattr(found, entry.name, entry.default)
    found.check()
    completed: DistillationArguments = found
    return completed


def _expand(name: str) -> list[str]:
    return sorted(glob.glob(name)) if glob.has_magic(name) else [name]


def sort_snapshots(folders: list[str]) -> list[str]:
    """Folders by the number at the end of their names; in the given order when none has one.

    Raises:
        ValueError: If only some have a number: no order would be right.

    Example:
        >>> sort_snapshots(["run/epoch_10", "run/epoch_2"])
        ['run/epoch_2', 'run/epoch_10']
    """
    numbers = {folder: int(found[1]) for folder in folders if (found := re.search(r"(\d+)$", Path(folder).name))}
    if len(numbers) == len(set(folders)):
        return sorted(folders, key=lambda folder: numbers[folder])
    if numbers:
        raise ValueError(f"teacher_snapshots must all end in a number or none of them, got {folders}.")
    return folders
