"""Accuracy of pruning weights at once, without training: magnitude, wanda, sparsegpt.

    python benchmarks/weight_pruning_one_shot.py --models DENSE0 DENSE1 --data_dir DATA/sst2_sentences --out x.json

Every model is a fine-tuned classifier; its place in the list is its seed, which also draws its calibration sequences.
All variants prune the same layers to the same number of zeros. Every finished cell is written to the result file at
once and skipped when the command is given again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from accuracy import Results, scores
from header import arguments_of, machine
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.inputs import calibration_batches
from hf_compress.tasks.sources import DataArguments, load_task


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="Fine-tuned classifiers, one a seed.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--targets", nargs="+", default=["1x1@0.5", "1x1@0.7", "2:4@0.5", "4x1@0.5"])
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument(
        "--row_group", type=int, default=384, help="Also wanda within so many neighbours of a row, for 1x1; 0: not."
    )
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--max_length", type=int, default=64)
    return parser.parse_args()


def variants_of(args: argparse.Namespace) -> dict[str, dict]:
    """Name of a cell -> what `WeightPruningConfig` gets."""
    variants = {}
    for target in args.targets:
        pattern, sparsity = target.split("@")
        for criterion in args.criteria:
            values = {"pattern": pattern, "target_sparsity": float(sparsity), "criterion": criterion, "scope": "local"}
            variants[f"{target}/{criterion}"] = values
            if criterion == "wanda" and pattern == "1x1" and args.row_group:
                zeros = round(args.row_group * float(sparsity))
                rows = {"pattern": f"{zeros}:{args.row_group}", "target_sparsity": zeros / args.row_group}
                variants[f"{target}/wanda_in_rows"] = {**values, **rows}
    return variants


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    task = load_task(DataArguments(task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length))
    tokenizer = open_tokenizer(args.models[0])
    rows = {name: task.encode(name, tokenizer, args.max_length) for name in task.splits}
    results = Results(args.out, {
        "arguments": arguments_of(args), "data": Path(args.data_dir).name,
        "rows": {name: len(split) for name, split in rows.items()}, "environment": machine(),
    })  # fmt: skip

    for seed, folder in enumerate(args.models):
        results.cell(f"seed{seed}/dense", lambda folder=folder: scores(open_model(folder, task), rows, tokenizer))
        batches = calibration_batches(rows["train"], tokenizer, args.samples, seed)
        for name, values in variants_of(args).items():

            def prune(folder=folder, batches=batches, values=values) -> dict:
                model = open_model(folder, task)
                start = time.perf_counter()
                hc.compress(model, hc.WeightPruningConfig(**values), data=batches)
                seconds = round(time.perf_counter() - start, 2)
                sparsity = hc.steps_of(model)[-1]["achieved_sparsity"]
                return {**scores(model, rows, tokenizer), "achieved_sparsity": sparsity, "prune_seconds": seconds}

            results.cell(f"seed{seed}/{name}", prune)


if __name__ == "__main__":
    main()
