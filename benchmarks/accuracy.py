"""What accuracy benchmarks share: arguments, the task, the training, a result file that goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from header import commit, machine
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.core.saving import write_json
from hf_compress.report.quality import evaluate_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, Task, load_task


class Results:
    """A JSON file of cells, each computed once."""

    def __init__(self, file: str, header: dict) -> None:
        self.file = Path(file)
        self.content = json.loads(self.file.read_text()) if self.file.exists() else {"header": header, "cells": {}}

    def cell(self, name: str, compute: Callable[[], dict]) -> dict:
        if name not in self.content["cells"]:
            start = time.time()
            value = compute()
            self.content["cells"][name] = {**value, "seconds": round(time.time() - start, 1), "commit": commit()}
            write_json(self.file, self.content)
            print(name, self.content["cells"][name], flush=True)
        return self.content["cells"][name]


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every accuracy benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--work_dir", default="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    return parser


def open_task(args: argparse.Namespace) -> tuple[DataArguments, Task, PreTrainedTokenizerBase, dict[str, Any]]:
    """Where the data is, the task, the model's tokenizer, and the tokenized rows of every split."""
    data = DataArguments(
        task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length,
        max_train_samples=args.max_train_samples, max_eval_samples=args.max_eval_samples,
    )  # fmt: skip
    task, tokenizer = load_task(data), open_tokenizer(args.model)
    return data, task, tokenizer, {x: task.encode(x, tokenizer, args.max_length) for x in task.splits}


def open_results(args: argparse.Namespace, rows: dict[str, Any], **more: Any) -> Results:
    """The result file of a command; of models and data the name is kept and the folder is not."""
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "plot", "work_dir", "model", "data_dir")}
    return Results(args.out, {
        "arguments": kept, "model": Path(args.model).name, "data": Path(args.data_dir).name, **more,
        "rows": {name: len(split) for name, split in rows.items()}, "environment": machine(),
    })  # fmt: skip


def mean_tokens(rows: Any) -> float:
    """Tokens of an average example, padding not counted."""
    return sum(map(len, rows["input_ids"])) / len(rows)


def stem(args: argparse.Namespace, seed: int, kind: str = "") -> str:
    """Where the models of one seed lie, without the last part of their names."""
    return f"{args.work_dir}/{kind}{Path(args.data_dir).name}-{Path(args.model).name}-{seed}"


def training(args: argparse.Namespace, output_dir: str, seed: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a training that saves its end only."""
    return {
        "output_dir": output_dir, "num_train_epochs": args.epochs, "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": 64, "warmup_steps": 0.06,
        "weight_decay": 0.01, "train_sampling_strategy": "group_by_length", "save_strategy": "no",
        "logging_steps": 50, "report_to": "none", "seed": seed, "disable_tqdm": True, **changes,
    }  # fmt: skip


def scores(model: PreTrainedModel, rows: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The task's metrics on everything but the training rows."""
    return {name: evaluate_model(model, split, tokenizer, 64) for name, split in rows.items() if name != "train"}


def label_of(fields: dict[str, Any]) -> str:
    """The name of the settings of a method in a result file."""
    return ",".join(f"{name}={value}" for name, value in sorted(fields.items())) or "default"
