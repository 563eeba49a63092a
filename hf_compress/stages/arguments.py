"""The argument groups that stages share, and what every stage checks before it does any work."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import nn
from transformers import TrainingArguments

from hf_compress.core.devices import chosen_device
from hf_compress.core.saving import require_own_folder
from hf_compress.methods import METHODS
from hf_compress.stages.launched import join_processes
from hf_compress.stages.table import Stage, stage_of
from hf_compress.tasks.inputs import check_draw
from hf_compress.training.preflight import check_training


# What options that name models are called, in every stage.
MODEL_OPTIONS = ("model_name_or_path", "teacher_name_or_path", "teacher_snapshots", "models")


@dataclass
class OutputArguments:
    """Where the result goes.

    Args:
        output_dir: Folder that receives the result: model, tokenizer and `results.json`, or the files of a report.
    """

    output_dir: str


@dataclass(frozen=True)
class DeviceArguments:
    """The device of a stage.

    Args:
        device: Device that the stage runs on: auto (the accelerator if there is one), cpu, or a device such as cuda.
    """

    device: str = "auto"

    def __post_init__(self) -> None:
        chosen_device(self.device)

    def place_(self, model: nn.Module) -> None:
        """Move a model there; where a launcher started several processes, they find each other first."""
        join_processes(self.device)
        model.to(chosen_device(self.device))


@dataclass(frozen=True)
class MemoryArguments:
    """How much of a model is in memory.

    Args:
        layer_by_layer: Load, compress and write one layer at a time, for a model larger than memory. The model must be
            a folder. A command that was killed goes on at the layer that it had reached when it is given again.
    """

    layer_by_layer: bool = False


@dataclass
class TeacherArguments:
    """Which model teaches.

    Args:
        teacher_name_or_path: Hub name or folder of the model that teaches, usually the fine-tuned dense one.
    """

    teacher_name_or_path: str

    def __post_init__(self) -> None:
        if not self.teacher_name_or_path:
            raise ValueError("teacher_name_or_path must name the model that teaches, got nothing.")


@dataclass
class OptionalTeacherArguments:
    """Which model teaches, if any.

    Args:
        teacher_name_or_path: Hub name or folder of the fine-tuned dense model that teaches. Left out: no teacher.
    """

    teacher_name_or_path: str | None = None

    def __post_init__(self) -> None:
        self.teacher_name_or_path = self.teacher_name_or_path or None


@dataclass(frozen=True)
class CalibrationArguments:
    """The examples that a method reads when nothing is trained.

    Args:
        calibration_samples: How many training examples the method reads; they are drawn without replacement. Left out,
            and the data have fewer: all of them. Language modelling: windows from random places of the training text
            (left out: 128), each as long as max_length says.
        calibration_seed: Random seed of the draw of those examples.
    """

    calibration_samples: int = 512
    calibration_seed: int = 0

    def __post_init__(self) -> None:
        check_draw(self.calibration_samples, self.calibration_seed)


@dataclass(frozen=True, kw_only=True)
class StageArguments:
    """What a stage takes: one dataclass for each topic; their fields are the options of the command.

    Making one checks what holds for all stages: that every option has a use, that the training would train something,
    that it runs where `device` says, and that the result overwrites none of the models that the stage reads.

    Args:
        given: Names of the options that the user wrote; None: those that differ from their defaults. An option that
            would change nothing is refused when it was written.

    Raises:
        ValueError: If one of these does not hold.
    """

    given: frozenset[str] | None = None

    def __post_init__(self) -> None:
        self._require_used()
        training = self.training_arguments
        if training is not None:
            check_training(training)
            _check_device(self.option("device"), training)
        for folder in self.folders_written():
            require_own_folder(folder, self.models_read())

    def _require_used(self) -> None:
        """Raise `ValueError` for an option that would change nothing in this stage."""
        stage, changed = stage_of(type(self)), set(self._changed())
        for name, why in (stage.unused if stage is not None else {}).items():
            if name in changed:
                raise ValueError(f"{name} must be left out, got {self.option(name)}: {why}.")

    def groups(self) -> dict[str, Any]:
        """Topic -> its filled dataclass."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "given"}

    def option(self, name: str) -> Any:
        """The value of an option in whichever group has it; None where none has."""
        return next((getattr(group, name) for group in self.groups().values() if hasattr(group, name)), None)

    @property
    def training_arguments(self) -> TrainingArguments | None:
        return next((group for group in self.groups().values() if isinstance(group, TrainingArguments)), None)

    def models_read(self) -> dict[str, str]:
        """Option -> hub name or folder, of the models that the stage opens."""
        found: dict[str, str] = {}
        for name in MODEL_OPTIONS:
            value = self.option(name)
            if isinstance(value, str):
                found[name] = value
            else:
                title = "the model {}" if name == "models" else f"{name} ({{}})"
                found.update({title.format(each): each for each in value or ()})
        return found

    @property
    def output_dir(self) -> str:
        """The folder that the stage writes; empty where it writes none."""
        return self.option("output_dir") or ""

    def folders_written(self) -> list[str]:
        """The folders that must be the stage's own."""
        return [] if self.option("output_dir") is None else [self.output_dir]

    def calibration_samples(self, available: int) -> int:
        """How many of the available training examples the method reads: no more than there are, unless asked for.

        Asking for more than there are is an error, which the draw explains.
        """
        asked: int = self.option("calibration_samples")
        return asked if "calibration_samples" in self.chosen() else min(asked, available)

    def chosen(self) -> frozenset[str]:
        """Names of the options that the user wrote, equal to the default or not."""
        return self.given if self.given is not None else frozenset(self._changed())

    def command_line(self) -> str:
        """The command that runs the stage with these arguments: what differs from the defaults, or was written."""
        stage, chosen = stage_of(type(self)), {*self.chosen(), *self._changed()}
        words = ["hf-compress", stage.command if stage is not None else ""]
        for group in self.groups().values():
            for field in dataclasses.fields(group):
                value = getattr(group, field.name)
                if field.name in chosen and value is not None:
                    words += [f"--{field.name}", *map(str, value if isinstance(value, list | tuple) else [value])]
        return shlex.join(words)

    def _changed(self) -> Iterator[str]:
        for group in self.groups().values():
            for field in dataclasses.fields(group):
                default = field.default
                if field.default_factory is not dataclasses.MISSING:
                    default = field.default_factory()
                if field.init and getattr(group, field.name) != default:
                    yield field.name


def kinds_of(stage: Stage) -> dict[str, type]:
    """Topic -> dataclass that its options fill."""
    hints = get_type_hints(stage.arguments_class)
    kinds = {entry.name: hints[entry.name] for entry in dataclasses.fields(stage.arguments_class)}
    del kinds["given"]
    if stage.method is not None:
        kinds["method"] = METHODS[stage.name].config_class
    return kinds


def options_of(stage: Stage) -> dict[str, Any]:
    """Option -> its type, of everything that a user may set in a stage."""
    found: dict[str, Any] = {}
    for kind in kinds_of(stage).values():
        hints = get_type_hints(kind)
        settable = (entry for entry in dataclasses.fields(kind) if entry.init and not entry.metadata.get("output"))
        found.update({entry.name: hints[entry.name] for entry in settable})
    return found


def _check_device(device: str | None, training: TrainingArguments) -> None:
    """Refuse a device that is not the one where `Trainer` puts the model."""
    if device in (None, "auto"):
        return
    wanted, used = chosen_device(device), training.device
    if wanted.type != used.type:
        raise ValueError(
            f"device is {device!r}, but these training arguments run on {used.type} (use_cpu is {training.use_cpu}): "
            "leave use_cpu or device out."
        )
    if wanted.index is not None and (wanted.index != (used.index or 0) or training.n_gpu > 1):
        raise ValueError(
            f"device is {device!r}, but a training uses every accelerator that it sees: set CUDA_VISIBLE_DEVICES="
            f"{wanted.index} and leave device out."
        )
