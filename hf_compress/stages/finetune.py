"""Fine-tune a model on a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from hf_compress.stages.arguments import DeviceArguments, StageArguments
from hf_compress.stages.models import ModelArguments
from hf_compress.stages.training import prepare, run_training, trainer_arguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.training.trainer import CompressionTrainer


@dataclass(frozen=True, kw_only=True)
class Finetune(StageArguments):
    """What `finetune` takes.

    Args:
        model: What to start from; it gets a head when it has none.
        data: The task.
        device: Where the training runs.
        training: As for `transformers.Trainer`.
    """

    model: ModelArguments
    data: DataArguments
    device: DeviceArguments = DeviceArguments()
    training: TrainingArguments


def finetune(arguments: Finetune) -> dict[str, Any]:
    """Fine-tune a model on a task, evaluate it and save it.

    Returns:
        Metrics of the validation split (of `test` where there is none) and the training time in seconds.

    Raises:
        ValueError: If model, tokenizer and data do not fit together, or the loss is not finite.
    """
    task, tokenizer, model, rows = prepare(arguments.model, arguments.data, arguments.training.seed)
    trainer = CompressionTrainer(**trainer_arguments(task, model, tokenizer, arguments.training, rows))
    return run_training(trainer, task, model, tokenizer, arguments.training)
