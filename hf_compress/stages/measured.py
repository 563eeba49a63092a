"""Opening the models that stages measure on a task: those of transformers, and exported ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from hf_compress.core.devices import chosen_device
from hf_compress.core.exported import ExportedModel
from hf_compress.export.formats import exported_file, open_exported
from hf_compress.report.quality import Measured
from hf_compress.stages.models import fit_labels, open_model
from hf_compress.stages.processors import check_vocabulary, open_processor
from hf_compress.tasks.task import Task


def folder_of(name: str) -> str:
    """Where config and processor of a model are: the name itself, or the folder of an exported file."""
    file = exported_file(name)
    return name if file is None else str(file.parent)


def label_of(name: str) -> str:
    """What a model is called in tables: the end of its name; of an exported file, its folder's and what it holds.

    Example:
        >>> label_of("runs/small_onnx/model_int8.onnx"), label_of("runs/small_onnx"), label_of("google-bert/bert-base")
        ('small_onnx int8', 'small_onnx', 'bert-base')
    """
    path = Path(name)
    if exported_file(name) is None or not path.suffix:
        return path.name or name
    return " ".join([path.parent.name or path.stem, *path.stem.split("_")[1:]])


def common_device(names: Sequence[str], device: str) -> str:
    """The device on which all of these models can be measured.

    Raises:
        ValueError: If one is exported, which computes on the CPU, and another device was asked for.
    """
    exported = next((name for name in names if exported_file(name) is not None), None)
    if exported is None:
        return device
    if device != "auto" and chosen_device(device).type != "cpu":
        raise ValueError(f"device must be auto or cpu, got {device!r}: {exported!r} is exported and runs on the CPU.")
    return "cpu"


def measured(name: str, task: Task, split: str, max_length: int | None, device: str = "cpu") -> Measured:
    """A model with its own tokenizer's reading of a split, in its own order of labels.

    Args:
        name: Hub name or folder; exported folder, or file in one.
        task: Its labels must be the model's, in whatever order.
        split: Which examples.
        max_length: Longest input in tokens; None: as the task is measured by default.
        device: As `chosen_device` takes it.

    Raises:
        ValueError: If model and tokenizer cannot be opened, or do not fit each other or the task.
    """
    file = exported_file(name)
    processor = open_processor(folder_of(name), type(task))
    model = open_model(name, task, match=False) if file is None else _opened(file, task)
    check_vocabulary(model.config, processor)
    matched = fit_labels(task, model, name)
    rows = matched.encode(split, processor, matched.longest(model, processor, max_length))
    if not isinstance(model, ExportedModel):
        model.to(chosen_device(device))  # type: ignore[arg-type]  # transformers declares no device here
    return Measured(model, rows, processor, matched, split)


def _opened(file: Path, task: Task) -> PreTrainedModel:
    """An exported model with the head that a task needs; it is called as a model of transformers is."""
    model = open_exported(file)
    assert model.config is not None
    if not type(task).has_head(model.config):
        raise ValueError(f"{str(file)!r} must be an exported {task.model_noun}, got a {model.facts['model']}.")
    return cast(PreTrainedModel, model)
