"""Accuracy of linear attention under every kind of guidance: unguided, target, hybrid, trajectory, waypoint.

    python benchmarks/guidance.py --model MODEL --data_dir DATA/sst2_sentences --out x.json --seeds 0 1 2

The dense teacher is fine-tuned first and keeps its epochs. Students of `target` and `hybrid` start from it; those of
`unguided`, `trajectory` and `waypoint` from the pretrained model, as published. Every finished cell is written to the
result file at once and skipped when the command is given again.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from pathlib import Path

import torch
from structured_pruning import Results
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.report.quality import evaluate_model
from hf_compress.stages.finetune import TeacherArguments, distill, finetune
from hf_compress.stages.linearize import OutputArguments, joint_distill, linearize, snapshot_distill
from hf_compress.stages.models import ModelArguments, open_classifier, open_tokenizer
from hf_compress.tasks.inputs import tokenize
from hf_compress.tasks.sources import DataArguments, load_task


MODES = ("unguided", "target", "hybrid", "trajectory", "waypoint")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--work_dir", default="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--starts", nargs="+", default=["normal"], choices=("normal", "pooling"))
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--share", default="none")
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="Of students.")
    parser.add_argument("--teacher_learning_rate", type=float, default=2e-4)
    parser.add_argument("--alpha_layer", type=float, default=1.0)
    parser.add_argument("--alpha_output", type=float, default=0.0)
    parser.add_argument("--hybrid_share", type=float, default=0.35, help="Part of the updates that is guided.")
    return parser.parse_args()


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data = DataArguments(
        task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length,
        max_train_samples=args.max_train_samples,
    )  # fmt: skip
    task = load_task(data)
    tokenizer = open_tokenizer(args.model)
    rows = {name: tokenize(task.split(name), task, tokenizer, args.max_length) for name in task.splits}
    updates = -(-len(rows["train"]) // args.batch_size) * args.epochs
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "work_dir", "model", "data_dir")}
    results = Results(args.out, {
        "arguments": kept, "model": Path(args.model).name, "data": Path(args.data_dir).name, "updates": updates,
        "rows": {name: len(split) for name, split in rows.items()}, "torch": torch.__version__,
        "mean_tokens": sum(map(len, rows["train"]["input_ids"])) / len(rows["train"]),
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "machine": platform.machine(),
    })  # fmt: skip

    def scores(folder: str) -> dict:
        model = open_classifier(folder, task)
        return {
            name: evaluate_model(model, rows[name], tokenizer, 64) for name in ("validation", "test") if name in rows
        }

    def training(output_dir: str, seed: int, rate: float) -> dict:
        return {
            "output_dir": output_dir, "num_train_epochs": args.epochs, "learning_rate": rate,
            "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": 64, "warmup_steps": 0.06,
            "weight_decay": 0.01, "train_sampling_strategy": "group_by_length", "save_strategy": "no",
            "logging_steps": 50, "report_to": "none", "seed": seed, "disable_tqdm": True,
        }  # fmt: skip

    for seed in args.seeds:
        stem = f"{args.work_dir}/{Path(args.data_dir).name}-{Path(args.model).name}-{seed}"
        dense = f"{stem}-teacher"

        def train_dense(seed=seed, dense=dense) -> dict:
            steps = {**training(dense, seed, args.teacher_learning_rate), "save_strategy": "epoch"}
            finetune(ModelArguments(args.model, freeze_embeddings=True), data, TrainingArguments(**steps))
            return scores(dense)

        results.cell(f"seed{seed}/dense", train_dense)
        for start in args.starts:
            config = {"projected_length": args.slots, "share": args.share, "seed": seed, "initialization": start}
            if start == "pooling":
                config.update(length_scaling=False, slot_mask=True, max_tokens=args.max_length)
            for mode in args.modes:

                def train_student(seed=seed, stem=stem, dense=dense, mode=mode, config=config) -> dict:
                    folder, out = f"{stem}-start", f"{stem}-{mode}"
                    origin = dense if mode in ("target", "hybrid") else args.model
                    linearize(ModelArguments(origin), data, OutputArguments(folder), hc.LinformerConfig(**config))
                    student = ModelArguments(folder, freeze_embeddings=True)
                    common = training(out, seed, args.learning_rate)
                    common.update(alpha_layer=args.alpha_layer, alpha_output=args.alpha_output)
                    if mode == "trajectory":
                        rates = {"teacher_learning_rate": args.teacher_learning_rate, "save_teacher": False}
                        joint = hc.JointTeacherArguments(**common, **rates)
                        joint_distill(student, TeacherArguments(args.model), data, joint)
                    elif mode == "waypoint":
                        ladder = hc.SnapshotTeacherArguments(**common, teacher_snapshots=[f"{dense}/checkpoint-*"])
                        snapshot_distill(student, data, ladder)
                    else:
                        if mode == "unguided":
                            common.update(alpha_layer=0.0, alpha_output=0.0)
                        if mode == "hybrid":
                            common["max_distill_steps"] = round(args.hybrid_share * updates)
                        distill(student, TeacherArguments(dense), data, hc.DistillationArguments(**common))
                    found = scores(out)
                    shutil.rmtree(out)
                    return found

                results.cell(f"seed{seed}/{start}/{mode}", train_student)


if __name__ == "__main__":
    main()
