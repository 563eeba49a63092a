"""Accuracy of weight pruning: patterns, with and without a teacher, snip_momentum against magnitude.

    python benchmarks/weight_pruning.py --model MODEL --data_dir DATA/sst2_sentences --out x.json --seeds 0 1 2

A dense model is fine-tuned once a seed. Every variant starts from it and trains for the same number of epochs with the
same settings; `dense-more` is that training without pruning, so that a drop is not hidden by the extra epochs. Unless
its name says `alone`, a variant is taught by the dense model. Every finished cell is written to the result file at
once and skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

import torch
import transformers
from accuracy import argument_parser, open_results, open_task, scores, stem, training
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.stages.arguments import OptionalTeacherArguments
from hf_compress.stages.finetune import Finetune, finetune
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.stages.prune_weights import PruneWeights, PruningArguments, prune_weights
from hf_compress.tasks.sources import DataArguments


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
    parser = argument_parser(__doc__)
    parser.set_defaults(epochs=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:-2])
    parser.add_argument("--dense_epochs", type=float, default=2)
    parser.add_argument("--dense_learning_rate", type=float, default=2e-4)
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


def settings(args: argparse.Namespace, output_dir: str, seed: int, **changes: Any) -> dict[str, Any]:
    return training(
        args, output_dir, seed, warmup_steps=0.1, weight_decay=args.weight_decay,
        dataloader_pin_memory=torch.cuda.is_available(), **changes,
    )  # fmt: skip


def train_variant(name: str, dense: str, out: str, data: DataArguments, args: argparse.Namespace, seed: int) -> dict:
    """Train one variant from the dense model; its sparsity and the seconds of the training alone."""
    fields = VARIANTS[name]
    schedule = ("sparsity_decay_type", "pruning_frequency", "warmup_epochs", "cooldown_epochs")
    shared = {field: getattr(args, field) for field in schedule}
    taught = not name.endswith("alone")
    found = prune_weights(PruneWeights(
        model=ModelArguments(dense, freeze_embeddings=not args.train_embeddings),
        pruning=hc.WeightPruningConfig(**{**shared, **(fields or {})}),
        also=PruningArguments(do_prune=fields is not None),
        teacher=OptionalTeacherArguments(dense if taught else None),
        data=data,
        distillation=hc.DistillationArguments(
            **settings(args, out, seed), alpha_task=args.alpha_task,
            alpha_output=args.alpha_output, alpha_layer=args.alpha_layer,
            # The same teacher on the same rows for every variant of a seed.
            teacher_cache_dir=f"{dense}-teacher" if taught else None,
        ),
    ))  # fmt: skip
    layers = found["sparsity_by_layer"].values() if fields else [0.0]
    return {
        "element_sparsity": found["element_sparsity"], "lowest_layer": min(layers), "highest_layer": max(layers),
        "train_seconds": found["train_seconds"],
    }  # fmt: skip


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    data, task, tokenizer, rows = open_task(args)
    results = open_results(args, rows, transformers=transformers.__version__)

    def scored(folder: str) -> dict[str, Any]:
        return scores(open_model(folder, task), rows, tokenizer)

    for seed in args.seeds:
        place = stem(args, seed, "weights-")
        dense = f"{place}-dense"

        def train_dense(seed=seed, dense=dense) -> dict:
            options = settings(
                args, dense, seed, num_train_epochs=args.dense_epochs, learning_rate=args.dense_learning_rate
            )
            start = ModelArguments(args.model, freeze_embeddings=not args.train_embeddings)
            found = finetune(Finetune(model=start, data=data, training=TrainingArguments(**options)))
            return {**scored(dense), "train_seconds": found["train_seconds"]}

        results.cell(f"seed{seed}/dense", train_dense)
        for name in args.variants:
            out = f"{place}-{name.replace(':', 'of')}"

            def train(name=name, seed=seed, dense=dense, out=out) -> dict:
                found = train_variant(name, dense, out, data, args, seed)
                return {**scored(out), **found}

            results.cell(f"seed{seed}/{name}", train)
        # Hidden states of a few thousand sentences are about a gigabyte.
        shutil.rmtree(f"{dense}-teacher", ignore_errors=True)


if __name__ == "__main__":
    main()
