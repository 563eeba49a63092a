"""Accuracy against real arithmetic of token pruning: learned thresholds, thresholds set by hand, top-k.

    python benchmarks/token_pruning.py --model MODEL --data_dir DATA/sst2_sentences --out x.json --seeds 0 1 2

Every variant starts from the same fine-tuned model and trains for the same number of epochs; `learned` spends half of
them on its soft stage. Latency of one model a variant is measured against the dense one, interleaved, on length-sorted
unpadded batches. Every finished cell is written to the result file at once and skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from structured_pruning import Results
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.quality import evaluate_model
from hf_compress.stages.finetune import finetune
from hf_compress.stages.models import ModelArguments, open_classifier, open_tokenizer
from hf_compress.stages.prune_tokens import TokenPruningArguments, prune_tokens
from hf_compress.tasks.inputs import length_sorted, tokenize
from hf_compress.tasks.sources import DataArguments, load_task


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--work_dir", default="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--targets", type=float, nargs="*", default=[0.6, 0.4], help="Relative MACs, for learned.")
    parser.add_argument("--keep_rates", type=float, nargs="*", default=[0.3, -0.2])
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.008, 0.012])
    parser.add_argument("--reference_length", type=int, default=128)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--threshold_learning_rate", type=float, default=2e-4)
    parser.add_argument("--no_teacher", action="store_true")
    parser.add_argument("--latency", action="store_true", help="Of the first seed's models.")
    return parser.parse_args()


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data = DataArguments(
        task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length,
        max_train_samples=args.max_train_samples,
    )  # fmt: skip
    task, tokenizer = load_task(data), open_tokenizer(args.model)
    rows = {name: tokenize(task.split(name), task, tokenizer, args.max_length) for name in task.splits}
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "work_dir", "model", "data_dir")}
    results = Results(args.out, {
        "arguments": kept, "model": Path(args.model).name, "data": Path(args.data_dir).name,
        "rows": {name: len(split) for name, split in rows.items()}, "torch": torch.__version__,
        "mean_tokens": sum(map(len, rows["validation"]["input_ids"])) / len(rows["validation"]),
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "machine": platform.machine(),
    })  # fmt: skip
    batches = list(length_sorted(rows["validation"], 64, tokenizer))

    def scores(folder: str, dense: str) -> dict:
        model = open_classifier(folder, task)
        before = hc.count_cost(open_classifier(dense, task), data=batches).macs
        found = {name: evaluate_model(model, rows[name], tokenizer, 64) for name in rows if name != "train"}
        return {**found, "relative_macs": hc.count_cost(model, data=batches).macs / before}

    def training(output_dir: str, seed: int) -> dict:
        return {
            "output_dir": output_dir, "num_train_epochs": args.epochs, "learning_rate": args.learning_rate,
            "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": 64, "warmup_steps": 0.06,
            "weight_decay": 0.01, "train_sampling_strategy": "group_by_length", "save_strategy": "no",
            "logging_steps": 50, "report_to": "none", "seed": seed, "disable_tqdm": True,
        }  # fmt: skip

    variants = {
        **{f"learned/{x}": {"target_relative_macs": x} for x in args.targets},
        **{f"topk/{x}": {"prune_mode": "topk", "token_keep_rate": x} for x in args.keep_rates},
        **{f"manual/{x}": {"final_token_threshold": x, "soft_fraction": 0.0} for x in args.thresholds},
    }
    folders = {}
    for seed in args.seeds:
        stem = f"{args.work_dir}/tokens-{Path(args.data_dir).name}-{Path(args.model).name}-{seed}"
        dense = f"{stem}-dense"

        def train_dense(seed=seed, dense=dense) -> dict:
            finetune(
                ModelArguments(args.model, freeze_embeddings=True), data, TrainingArguments(**training(dense, seed))
            )
            return scores(dense, dense)

        results.cell(f"seed{seed}/dense", train_dense)
        folders.setdefault("dense", dense)
        for name, options in variants.items():
            out = f"{stem}-{name.replace('/', '-')}"

            def train_pruned(seed=seed, dense=dense, out=out, options=options) -> dict:
                pruning = TokenPruningArguments(
                    **options, score_reference_length=args.reference_length,
                    threshold_learning_rate=args.threshold_learning_rate,
                    teacher_name_or_path=None if args.no_teacher else dense,
                )  # fmt: skip
                start = ModelArguments(dense, freeze_embeddings=True)
                prune_tokens(start, pruning, data, TrainingArguments(**training(out, seed)))
                return scores(out, dense)

            results.cell(f"seed{seed}/{name}", train_pruned)
            folders.setdefault(name, out)

    def time_models(size: int) -> dict:
        models = {name: open_classifier(folder, task) for name, folder in folders.items()}
        models["keep-all"] = hc.compress(
            open_classifier(folders["dense"], task), hc.TokenPruningConfig(final_token_threshold=0.0)
        )
        timed = measure_latency(models, unpadded_batches(rows["validation"], tokenizer, size, 256), 10, 1)
        ratios = speedups(timed, "dense")
        return {x.name: {"p50_ms": 1e3 * x.p50, "speedup": asdict(ratios[x.name])} for x in timed}

    if args.latency:
        for size in (1, 8, 32):
            results.cell(f"latency/batch{size}", lambda size=size: time_models(size))


if __name__ == "__main__":
    main()
