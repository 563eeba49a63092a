"""Perplexity of a causal language model: dense, pruned, with weights of few bits, both, and after a short training.

    python benchmarks/decoders.py --model MODEL --calibration DATA/c4_sample/train.parquet \
        --texts wikitext2=DATA/wikitext2/test_raw.parquet ptb=DATA/ptb/test.parquet --out x.json \
        --ratios 0.9 0.8 0.7 0.5 --prune '{}' '{"target": "dense"}' --quantize '{"bits": 4}' --both '[{}, {"bits": 4}]'

Texts are joined as published: the rows of ptb by a space, all others by a blank line. Calibration reads windows from
random places of its text. Budgets by divergence of several ratios share what they measure, which `compress_seconds` of
the first one holds. Every finished cell is written to the result file at once and skipped when the command is given
again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy import Results, label_of
from datasets import Dataset
from header import arguments_of, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.shared_passes import shared_passes
from hf_compress.tasks.perplexity import perplexity


# In its published form, the rows of this one are sentences of one running text.
SPACED = ("ptb",)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE", help="Parquet files of texts.")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--ratios", type=float, nargs="*", default=[])
    parser.add_argument("--prune", type=json.loads, nargs="*", default=[{}], metavar="JSON")
    parser.add_argument("--quantize", type=json.loads, nargs="*", default=[], metavar="JSON")
    parser.add_argument("--both", type=json.loads, nargs="*", default=[], metavar="[JSON, JSON]")
    parser.add_argument(
        "--recover", type=json.loads, nargs="*", default=[], metavar="[JSON, JSON]",
        help="Pruned, then trained towards the dense model for --updates batches of 16 windows, then rounded.",
    )  # fmt: skip
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max_windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16, help="Windows of calibration.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def tokens(file: str, name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text whose rows are in a Parquet file."""
    rows = Dataset.from_parquet(file)
    column = next(x for x in ("text", "sentence", "line") if x in rows.column_names)
    text = (" " if name in SPACED else "\n\n").join(row or "" for row in rows[column])
    return tokenizer(text, verbose=False)["input_ids"]


def windows(ids: list[int], args: argparse.Namespace, seed: int) -> list[dict[str, torch.Tensor]]:
    """Calibration batches of two windows each, from random places; the selection `fisher` reads their labels."""
    drawing = random.Random(seed)
    starts = [drawing.randint(0, len(ids) - args.context - 1) for _ in range(args.samples)]
    rows = torch.tensor([ids[start : start + args.context] for start in starts])
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in rows.split(2)]


def recover(
    model: PreTrainedModel, dense: PreTrainedModel, ids: list[int], args: argparse.Namespace, seed: int
) -> None:
    """Train a pruned model towards the dense one on further windows of the calibration text."""
    drawn = windows(ids, argparse.Namespace(context=args.context, samples=16 * args.updates), seed + 1000)
    rows = [{"input_ids": row, "labels": row} for batch in drawn for row in batch["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        training = hc.DistillationArguments(
            folder, max_steps=args.updates, learning_rate=args.learning_rate, warmup_steps=0.1, seed=seed,
            per_device_train_batch_size=16, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            alpha_task=1.0, alpha_output=1.0,
        )  # fmt: skip
        hc.DistillationTrainer(model, dense, training, train_dataset=rows).train()
    model.eval()


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {name: tokens(file, name, tokenizer) for name, file in (pair.split("=", 1) for pair in args.texts)}
    calibration = tokens(args.calibration, "calibration", tokenizer)
    header = {**arguments_of(args), "texts": sorted(texts), "calibration": Path(args.calibration).parent.name}
    for grows in ("ratios", "prune", "quantize", "both", "recover", "seeds"):
        header.pop(grows)
    results = Results(args.out, {"arguments": header, "environment": machine()})

    def measured(model: PreTrainedModel) -> dict:
        steps = hc.steps_of(model)
        if steps and steps[-1]["method"] == "weight_quantization":
            # Packed weights are unpacked again for every window, which takes three times as long.
            hc.dequantize(model)
        return {
            name: round(perplexity(model, ids, args.context, max_windows=args.max_windows)["perplexity"], 4)
            for name, ids in texts.items()
        }

    def opened() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def recovered(seed: int, pruning: hc.CompressionConfig, quantizing: hc.CompressionConfig) -> Callable[[], dict]:
        def compute() -> dict:
            model, data = opened(), windows(calibration, args, seed)
            hc.compress(model, pruning, data=data)
            found = {"pruned": measured(model)}
            recover(model, opened(), calibration, args, seed)
            found["recovered"] = measured(model)
            hc.compress(model, quantizing, data=data)
            size = hc.count_cost(model, args.context).bytes
            return {**found, "rounded": measured(model), "bytes": size}

        return compute

    def compressed(seed: int, *configs: hc.CompressionConfig) -> Callable[[], dict]:
        def compute() -> dict:
            model = opened()
            before = hc.count_cost(model, args.context)
            start = time.perf_counter()
            hc.compress(model, *configs, data=windows(calibration, args, seed))
            seconds, after = time.perf_counter() - start, hc.count_cost(model, args.context)
            sizes = {
                name: step[name] for step in hc.steps_of(model) for name in ("heads_per_layer", "neurons_per_layer")
                if name in step
            }  # fmt: skip
            return {
                **measured(model), "macs": round(after.macs / before.macs, 4), "bytes": after.bytes,
                "compress_seconds": round(seconds, 1), **sizes,
            }  # fmt: skip

        return compute

    results.cell("dense", lambda: measured(opened()))
    for seed in args.seeds:
        for fields in args.prune:
            # Budgets by divergence share what they measure.
            with shared_passes():
                for ratio in args.ratios:
                    config = hc.StructuredPruningConfig(mac_ratio=ratio, seed=seed, **fields)
                    results.cell(f"seed{seed}/prune {ratio}/{label_of(fields)}", compressed(seed, config))
        for fields in args.quantize:
            results.cell(
                f"seed{seed}/quantize/{label_of(fields)}", compressed(seed, hc.WeightQuantizationConfig(**fields))
            )
        for pruning, quantizing in args.both:
            configs = (hc.StructuredPruningConfig(seed=seed, **pruning), hc.WeightQuantizationConfig(**quantizing))
            results.cell(f"seed{seed}/both/{label_of(pruning)}/{label_of(quantizing)}", compressed(seed, *configs))
        for pruning, quantizing in args.recover:
            configs = (hc.StructuredPruningConfig(seed=seed, **pruning), hc.WeightQuantizationConfig(**quantizing))
            results.cell(f"seed{seed}/recover/{label_of(pruning)}/{label_of(quantizing)}", recovered(seed, *configs))


if __name__ == "__main__":
    main()
