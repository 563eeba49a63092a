"""What all peers share: the task, the dense model, how long and how fast students learn, and how they are exported."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments

import hf_compress as hc
from hf_compress.core.errors import first_line
from hf_compress.export.onnx_model import GRAPH
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task
from hf_compress.tasks.task import Processor, Task


# As in the records: how far int8 may move the outputs, and how many training sentences say so.
INT8_BOUND, INT8_EXAMPLES = 0.2, 64
# Sentences on which what was saved is compared with what was made.
COMPARED = 32
# What the commands of this package train with unless told otherwise: a fraction of the steps, and of the weights.
WARMUP, DECAY = 0.1, 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dense", required=True, help="The fine-tuned model that all peers begin with.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)


class Setting:
    """The task and the dense model of one table.

    Args:
        args: With what `add_arguments` adds, and in `make` the options of training.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        data = DataArguments(data_dir=args.data_dir, max_length=args.max_length)
        self.task: Task = load_task(data).matched(self.open().config)
        self.tokenizer: Processor = open_tokenizer(args.dense)

    def open(self, folder: str | os.PathLike[str] | None = None) -> PreTrainedModel:
        """A model in evaluation mode: the dense one unless another folder is named."""
        return open_model(str(folder or self.args.dense)).eval()

    def rows(self, split: str) -> Dataset:
        return self.task.encode(split, self.tokenizer, self.args.max_length)

    @cached_property
    def train(self) -> Dataset:
        return self.rows("train")

    def batches(self, count: int, size: int = 32) -> list[dict[str, Tensor]]:
        """Training sentences, with labels."""
        return hc.calibration_batches(self.train, self.tokenizer, count, self.args.seed, size)

    def inputs(self, count: int, size: int = 32) -> list[dict[str, Tensor]]:
        """Training sentences, without labels."""
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in self.batches(count, size)]

    def training(self, folder: Path) -> TrainingArguments:
        """What the compressed models of this package were trained with."""
        return TrainingArguments(
            str(folder / "training"), num_train_epochs=self.args.epochs, learning_rate=self.args.learning_rate,
            per_device_train_batch_size=self.args.batch_size, bf16=self.args.bf16, seed=self.args.seed, use_cpu=True,
            warmup_steps=WARMUP, weight_decay=DECAY, train_sampling_strategy="group_by_length",
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip

    def export(self, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
        """Write a model for ONNX Runtime as the command `export --int8` does; returns what the export noted."""
        examples = self.batches(INT8_EXAMPLES)
        return hc.export_onnx(model, folder / "exported", examples, self.tokenizer, True, INT8_BOUND)

    @torch.no_grad()
    def difference(self, one: nn.Module, other: nn.Module) -> float:
        """The largest difference of two models' logits on some sentences."""
        return max(float((one(**x).logits - other(**x).logits).abs().max()) for x in self.inputs(COMPARED))

    def opened(self, folder: Path, made: PreTrainedModel) -> dict[str, Any]:
        """Whether plain `from_pretrained` opens a folder, and how far the outputs are from those of what was saved."""
        try:
            found = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        except Exception as error:
            # Whatever it raises is what a user sees.
            return {"from_pretrained": False, "error": first_line(error)}
        return {"from_pretrained": True, "difference": self.difference(found, made.eval())}


def exported(folder: Path) -> bool:
    return (folder / "exported" / GRAPH).exists()


def clocked(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a function returns, and the seconds it took: of the clock, and of the processor with child processes."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    found = run()
    return found, {"wall": round(time.perf_counter() - wall, 1), "cpu": round(sum(os.times()[:4]) - cpu, 1)}
