"""Accuracy of linear attention under every kind of guidance: unguided, target, hybrid, trajectory, waypoint.

    python benchmarks/guidance.py --model MODEL --data_dir DATA/sst2_sentences --out x.json --seeds 0 1 2

The dense teacher is fine-tuned first and keeps its epochs. Students of `target` and `hybrid` start from it; those of
`unguided`, `trajectory` and `waypoint` from the pretrained model, as published. Every finished cell is written to the
result file at once and skipped when the command is given again.
"""

from __future__ import annotations

import argparse
import math
import shutil

from accuracy import argument_parser, mean_tokens, open_results, open_task, scores, stem, training
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.stages.arguments import OutputArguments, TeacherArguments
from hf_compress.stages.distill import (
    Distill,
    JointDistill,
    SnapshotDistill,
    distill,
    joint_distill,
    snapshot_distill,
)
from hf_compress.stages.finetune import Finetune, finetune
from hf_compress.stages.linearize import Linearize, linearize
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.tasks.arguments import DataArguments


MODES = ("unguided", "target", "hybrid", "trajectory", "waypoint")


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--starts", nargs="+", default=["normal"], choices=("normal", "pooling"))
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--share", default="none")
    parser.add_argument("--teacher_learning_rate", type=float, default=2e-4, help="learning_rate is the students'.")
    parser.add_argument("--alpha_layer", type=float, default=1.0)
    parser.add_argument("--alpha_output", type=float, default=0.0)
    parser.add_argument("--hybrid_share", type=float, default=0.35, help="Part of the updates that is guided.")
    return parser.parse_args()


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data, task, tokenizer, rows = open_task(args)
    # The conversion asks for the labels alone.
    labels = DataArguments(task_name=args.task_name, data_dir=args.data_dir)
    updates = math.ceil(math.ceil(len(rows["train"]) / args.batch_size) * args.epochs)
    results = open_results(args, rows, updates=updates, mean_tokens=mean_tokens(rows["train"]))

    for seed in args.seeds:
        place = stem(args, seed)
        dense = f"{place}-teacher"

        def train_dense(seed=seed, dense=dense) -> dict:
            steps = training(args, dense, seed, learning_rate=args.teacher_learning_rate, save_strategy="epoch")
            start = ModelArguments(args.model, freeze_embeddings=True)
            finetune(Finetune(model=start, data=data, training=TrainingArguments(**steps)))
            return scores(open_model(dense, task), rows, tokenizer)

        results.cell(f"seed{seed}/dense", train_dense)
        for start in args.starts:
            config = {"projected_length": args.slots, "share": args.share, "seed": seed, "initialization": start}
            if start == "pooling":
                config.update(length_scaling=False, slot_mask=True, max_tokens=args.max_length)
            for mode in args.modes:

                def train_student(seed=seed, place=place, dense=dense, mode=mode, config=config) -> dict:
                    folder, out = f"{place}-start", f"{place}-{mode}"
                    origin = dense if mode in ("target", "hybrid") else args.model
                    linearize(Linearize(
                        model=ModelArguments(origin), linear_attention=hc.LinformerConfig(**config), data=labels,
                        output=OutputArguments(folder),
                    ))  # fmt: skip
                    student = ModelArguments(folder, freeze_embeddings=True)
                    common = training(args, out, seed, alpha_layer=args.alpha_layer, alpha_output=args.alpha_output)
                    if mode == "trajectory":
                        rates = {"teacher_learning_rate": args.teacher_learning_rate, "save_teacher": False}
                        joint = hc.JointTeacherArguments(**common, **rates)
                        teacher = TeacherArguments(args.model)
                        joint_distill(JointDistill(model=student, teacher=teacher, data=data, distillation=joint))
                    elif mode == "waypoint":
                        snapshots = hc.SnapshotTeacherArguments(**common, teacher_snapshots=[f"{dense}/checkpoint-*"])
                        snapshot_distill(SnapshotDistill(model=student, data=data, distillation=snapshots))
                    else:
                        if mode == "unguided":
                            common.update(alpha_layer=0.0, alpha_output=0.0)
                        if mode == "hybrid":
                            common["max_distill_steps"] = round(args.hybrid_share * updates)
                        fixed = hc.DistillationArguments(**common)
                        teacher = TeacherArguments(dense)
                        distill(Distill(model=student, teacher=teacher, data=data, distillation=fixed))
                    found = scores(open_model(out, task), rows, tokenizer)
                    shutil.rmtree(out)
                    return found

                results.cell(f"seed{seed}/{start}/{mode}", train_student)


if __name__ == "__main__":
    main()
