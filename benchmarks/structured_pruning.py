"""Accuracy of structured pruning: dense, without retraining, recovered; four selections, correction on and off.

    python benchmarks/structured_pruning.py --model MODEL --data_dir DATA/sst2_sentences --out x.json \
        --seeds 0 1 2 --selections interpolative fisher magnitude random

Every finished cell is written to the result file at once and skipped when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
from header import commit
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.report.quality import evaluate_model
from hf_compress.stages.finetune import TeacherArguments, distill, finetune
from hf_compress.stages.models import ModelArguments, open_classifier, open_tokenizer
from hf_compress.tasks.inputs import calibration_batches, tokenize
from hf_compress.tasks.sources import DataArguments, load_task


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--work_dir", default="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--selections", nargs="+", default=["interpolative"])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--recovery_epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--recovery_learning_rate", type=float, default=2e-4)
    parser.add_argument("--alpha_layer", type=float, default=1.0)
    parser.add_argument("--uncorrected", action="store_true", help="Also without correction, for every selection.")
    parser.add_argument("--centered", action="store_true", help="Also `center=True`, where it is offered.")
    parser.add_argument("--no_recovery", action="store_true")
    return parser.parse_args()


def training(output_dir: str, args: argparse.Namespace, seed: int, epochs: float, rate: float) -> dict:
    return {
        "output_dir": output_dir,
        "num_train_epochs": epochs,
        "learning_rate": rate,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": "none",
        "seed": seed,
        "disable_tqdm": True,
    }


def variants(selection: str, args: argparse.Namespace) -> list[tuple[str, dict]]:
    """Names and options of what is tried with one selection; the first is the plain one."""
    found = [(selection, {})]
    if args.uncorrected:
        found.append((f"{selection}-uncorrected", {"correction": False}))
    if args.centered and selection != "fisher":
        found.append((f"{selection}-centered", {"center": True}))
    return found


class Results:
    """A JSON file of cells, each computed once."""

    def __init__(self, file: str, header: dict) -> None:
        self.file = Path(file)
        self.content = json.loads(self.file.read_text()) if self.file.exists() else {"header": header, "cells": {}}

    def cell(self, name: str, compute) -> dict:
        if name not in self.content["cells"]:
            start = time.time()
            value = compute()
            self.content["cells"][name] = {**value, "seconds": round(time.time() - start, 1), "commit": commit()}
            write_json(self.file, self.content)
            print(name, self.content["cells"][name], flush=True)
        return self.content["cells"][name]


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data = DataArguments(task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length)
    task = load_task(data)
    tokenizer = open_tokenizer(args.model)
    rows = {name: tokenize(task.split(name), task, tokenizer, args.max_length) for name in task.splits}
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "work_dir", "model", "data_dir")}
    results = Results(args.out, {
        "arguments": kept, "model": Path(args.model).name, "data": Path(args.data_dir).name,
        "rows": {name: len(split) for name, split in rows.items()}, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "machine": platform.machine(),
    })  # fmt: skip

    def scores(model) -> dict:
        return {
            name: evaluate_model(model, rows[name], tokenizer, 64) for name in ("validation", "test") if name in rows
        }

    for seed in args.seeds:
        stem = f"{args.work_dir}/{Path(args.data_dir).name}-{Path(args.model).name}-{seed}"
        dense = f"{stem}-dense"

        def train_dense(seed=seed, dense=dense) -> dict:
            finetune(
                ModelArguments(args.model, freeze_embeddings=True), data,
                TrainingArguments(**training(dense, args, seed, args.epochs, args.learning_rate)),
            )  # fmt: skip
            return scores(open_classifier(dense, task))

        results.cell(f"seed{seed}/dense", train_dense)
        batches = calibration_batches(rows["train"], tokenizer, args.samples, seed)
        for ratio in args.ratios:
            for selection in args.selections:
                for label, options in variants(selection, args):

                    def prune(ratio=ratio, selection=selection, options=options, stem=stem, dense=dense, seed=seed):
                        model = open_classifier(dense, task)
                        before = hc.count_cost(model, 32).params
                        config = hc.StructuredPruningConfig(mac_ratio=ratio, selection=selection, seed=seed, **options)
                        start = time.perf_counter()
                        hc.compress(model, config, data=batches)  # noqa: B023  (called before the next seed)
                        seconds = time.perf_counter() - start
                        if selection == "interpolative" and not options:
                            model.save_pretrained(f"{stem}-{ratio}")
                            tokenizer.save_pretrained(f"{stem}-{ratio}")
                        step = hc.steps_of(model)[-1]
                        return {
                            **scores(model), "params": hc.count_cost(model, 32).params / before,
                            "heads": step["heads_per_layer"], "neurons": step["neurons_per_layer"],
                            "prune_seconds": round(seconds, 2),
                        }  # fmt: skip

                    results.cell(f"seed{seed}/{ratio}/{label}", prune)

            def recover(ratio=ratio, stem=stem, dense=dense, seed=seed) -> dict:
                out = f"{stem}-{ratio}-recovered"
                distill(
                    ModelArguments(f"{stem}-{ratio}", freeze_embeddings=True), TeacherArguments(dense), data,
                    hc.DistillationArguments(
                        **training(out, args, seed, args.recovery_epochs, args.recovery_learning_rate),
                        alpha_task=1.0, alpha_output=1.0, alpha_layer=args.alpha_layer, temperature=2.0,
                        teacher_cache_dir=f"{stem}-teacher",
                    ),
                )  # fmt: skip
                return scores(open_classifier(out, task))

            if not args.no_recovery:
                results.cell(f"seed{seed}/{ratio}/recovered", recover)


if __name__ == "__main__":
    main()
