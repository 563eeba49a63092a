"""Accuracy of weight pruning: patterns, with and without a teacher, snip_momentum against magnitude.

    python benchmarks/weight_pruning.py --model MODEL --data_dir DATA/sst2_sentences --out x.json --seeds 0 1 2

A dense model is fine-tuned once a seed. Every variant starts from it and trains for the same number of epochs with the
same settings; `dense-more` is that training without pruning, so that a drop is not hidden by the extra epochs. Unless
its name says `alone`, a variant is taught by the dense model. Every finished cell is written to the result file at
once and skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from header import arguments_of
from structured_pruning import Results
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.report.quality import evaluate_model
from hf_compress.stages.finetune import finetune
from hf_compress.stages.models import ModelArguments, open_classifier, open_tokenizer
from hf_compress.stages.prune_weights import PruningArguments, prune_weights
from hf_compress.tasks.inputs import tokenize
from hf_compress.tasks.sources import DataArguments, load_task


# The published mixed recipe: attention in blocks, the rest unstructured.
MIXED = (
    {"op_names": [".*output", ".*intermediate"], "pattern": "1x1", "scope": "local"},
    {"op_names": [".*query", ".*key", ".*value"], "pattern": "4x1", "min_sparsity_ratio_per_op": 0.5},
)
TWO_OF_FOUR = {"pattern": "2:4", "target_sparsity": 0.5}
BLOCKS = {"pattern": "4x1", "target_sparsity": 0.9}
CHANNELS = {"pattern": "1xchannel", "target_sparsity": 0.5, "op_names": ("intermediate",)}
# Name -> fields of the config; None: nothing is pruned. Names that end in `alone` have no teacher.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense-more": None,
    "2:4": TWO_OF_FOUR,
    "4x1": BLOCKS,
    "1xchannel": CHANNELS,
    "mixed": {"target_sparsity": 0.9, "local_configs": MIXED},
    "2:4-magnitude": {**TWO_OF_FOUR, "criterion": "magnitude"},
    "4x1-magnitude": {**BLOCKS, "criterion": "magnitude"},
    "2:4-alone": TWO_OF_FOUR,
    "4x1-alone": BLOCKS,
    "dense-more-alone": None,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--work_dir", default="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:-2])
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--dense_epochs", type=float, default=2)
    parser.add_argument("--dense_learning_rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=3, help="Of every variant.")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--warmup_epochs", type=float, default=0.5, help="Before pruning begins.")
    parser.add_argument("--cooldown_epochs", type=float, default=1, help="With fixed masks at the end.")
    parser.add_argument("--pruning_frequency", type=int, default=10)
    parser.add_argument("--sparsity_decay_type", default="exp")
    parser.add_argument("--alpha_task", type=float, default=1.0)
    parser.add_argument("--alpha_output", type=float, default=1.0)
    parser.add_argument("--alpha_layer", type=float, default=1.0)
    parser.add_argument("--train_embeddings", action="store_true", help="Otherwise the tables stay as they are.")
    return parser.parse_args()


def training(output_dir: str, args: argparse.Namespace, seed: int, epochs: float, rate: float) -> dict[str, Any]:
    return {
        "output_dir": output_dir, "num_train_epochs": epochs, "learning_rate": rate,
        "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": 64, "warmup_steps": 0.1,
        "weight_decay": args.weight_decay, "train_sampling_strategy": "group_by_length", "save_strategy": "no",
        "logging_steps": 100, "report_to": "none", "seed": seed, "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip


def train_variant(name: str, dense: str, out: str, data: DataArguments, args: argparse.Namespace, seed: int) -> dict:
    """Train one variant from the dense model; its sparsity and the seconds of the training alone."""
    fields = VARIANTS[name]
    schedule = ("sparsity_decay_type", "pruning_frequency", "warmup_epochs", "cooldown_epochs")
    shared = {field: getattr(args, field) for field in schedule}
    taught = not name.endswith("alone")
    found = prune_weights(
        ModelArguments(dense, freeze_embeddings=not args.train_embeddings),
        PruningArguments(dense if taught else "", do_prune=fields is not None),
        data,
        hc.DistillationArguments(
            **training(out, args, seed, args.epochs, args.learning_rate), alpha_task=args.alpha_task,
            alpha_output=args.alpha_output, alpha_layer=args.alpha_layer,
            # The same teacher on the same rows for every variant of a seed.
            teacher_cache_dir=f"{dense}-teacher" if taught else None,
        ),
        hc.WeightPruningConfig(**{**shared, **(fields or {})}),
    )  # fmt: skip
    layers = found["sparsity_by_layer"].values() if fields else [0.0]
    return {
        "element_sparsity": found["element_sparsity"], "lowest_layer": min(layers), "highest_layer": max(layers),
        "train_seconds": found["train_seconds"],
    }  # fmt: skip


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data = DataArguments(
        task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length,
        max_train_samples=args.max_train_samples,
    )  # fmt: skip
    task, tokenizer = load_task(data), open_tokenizer(args.model)
    rows = {name: tokenize(task.split(name), task, tokenizer, args.max_length) for name in task.splits}
    results = Results(args.out, {
        "arguments": arguments_of(args), "model": Path(args.model).name, "data": Path(args.data_dir).name,
        "rows": {name: len(split) for name, split in rows.items()}, "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
        "machine": platform.machine(),
    })  # fmt: skip

    def scores(folder: str) -> dict:
        model = open_classifier(folder, task)
        return {name: evaluate_model(model, rows[name], tokenizer, 64) for name in rows if name != "train"}

    for seed in args.seeds:
        stem = f"{args.work_dir}/weights-{Path(args.data_dir).name}-{Path(args.model).name}-{seed}"
        dense = f"{stem}-dense"

        def train_dense(seed=seed, dense=dense) -> dict:
            options = training(dense, args, seed, args.dense_epochs, args.dense_learning_rate)
            start = ModelArguments(args.model, freeze_embeddings=not args.train_embeddings)
            found = finetune(start, data, TrainingArguments(**options))
            return {**scores(dense), "train_seconds": found["train_seconds"]}

        results.cell(f"seed{seed}/dense", train_dense)
        for name in args.variants:
            out = f"{stem}-{name.replace(':', 'of')}"

            def train(name=name, seed=seed, dense=dense, out=out) -> dict:
                found = train_variant(name, dense, out, data, args, seed)
                return {**scores(out), **found}

            results.cell(f"seed{seed}/{name}", train)
        # Hidden states of a few thousand sentences are about a gigabyte.
        shutil.rmtree(f"{dense}-teacher", ignore_errors=True)


if __name__ == "__main__":
    main()
