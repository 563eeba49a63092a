"""Speed and accuracy of dense and pruned models in PyTorch and in ONNX Runtime, in single precision and in int8.

    python benchmarks/export.py --model runs/dense --data_dir DATA/sst2_sentences \
        --out benchmarks/results/export_sst2.json

The model is a fine-tuned classifier. Copies of it are pruned to fractions of their arithmetic (`--mac_ratios`) without
recovery, and all are exported as `hf-compress export --int8` does it, with its comparison and its guard. Accuracy is
that of all rows of the split. Then all forms of all models take turns on every batch, in one run for each number of
threads and each batch size; neighbours in length are batched together. Speed-ups are medians of the ratios of rounds,
over the dense model in PyTorch and over the dense model in ONNX Runtime int8. Every run says how much other processes
did meanwhile. Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from header import arguments_of, commit, machine
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.machine import OtherWork, idleness
from hf_compress.report.quality import Measured, evaluated
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task


DENSE = "dense"
FORMS = ("PyTorch", "ONNX Runtime", "ONNX Runtime int8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="A fine-tuned classifier; the baseline.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--mac_ratios", type=float, nargs="*", default=[0.5, 0.3], help="Of the pruned copies.")
    parser.add_argument(
        "--token_thresholds", type=float, nargs="*", default=[],
        help="Also copies of the dense model and of its smallest copy that drop tokens below these scores; the "
        "thresholds are not learned, so their accuracy says nothing. Near 0 none is dropped: what is left is the last "
        "layer for the first token alone.",
    )  # fmt: skip
    parser.add_argument("--calibration_samples", type=int, default=512)
    parser.add_argument("--int8_bound", type=float, default=0.1)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--examples", type=int, default=128, help="Timed examples, evenly spread over the lengths.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out")
    return parser.parse_args()


def forms_of(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """A model in PyTorch, and its exported forms with as many threads as torch has now."""
    exported = [hc.OnnxModel.from_pretrained(folder, int8) for int8 in (False, True)]
    return dict(zip(FORMS, (model, *exported), strict=True))


def timed(models: Mapping[str, nn.Module], batches: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """The latencies of one interleaved run, with two baselines, and what others did meanwhile."""
    others = OtherWork()
    latencies = measure_latency(models, batches, args.repeats, args.warmup)
    load = others.until_now()
    over = {name: speedups(latencies, f"{DENSE}, {name}") for name in (FORMS[0], FORMS[2])}
    print(f"{torch.get_num_threads()} threads, batch {latencies[0].batch_size}: {idleness(load) or 'idle'}")
    for entry in latencies:
        eager, small = (ratios[entry.name].median for ratios in over.values())
        print(f"  {entry.name:28s} {1e3 * entry.p50:8.2f} ms  {eager:5.2f}x  {small:5.2f}x", flush=True)
    found = [
        {**entry.to_dict(), "speedups": {name: asdict(ratios[entry.name]) for name, ratios in over.items()}}
        for entry in latencies
    ]
    return {"other_work": load, "latencies": found}


def main() -> None:
    args = parse()
    load_before = os.getloadavg()[0]
    transformers_logging.set_verbosity_error()
    data = DataArguments(
        data_dir=args.data_dir, max_length=args.max_length, max_eval_samples=args.max_eval_samples
    )  # fmt: skip
    task, tokenizer, dense = load_task(data), open_tokenizer(args.model), open_model(args.model)
    task = task.matched(dense.config)
    train, rows = (task.encode(split, tokenizer, args.max_length) for split in ("train", args.split))
    calibration = hc.calibration_batches(train, tokenizer, min(args.calibration_samples, len(train)), seed=0)
    models = {DENSE: dense.eval()}
    for ratio in args.mac_ratios:
        pruning = hc.StructuredPruningConfig(mac_ratio=ratio)
        models[f"pruned to {ratio:g}"] = hc.compress(copy.deepcopy(dense), pruning, data=calibration).eval()
    for threshold in args.token_thresholds:
        dropping = hc.TokenPruningConfig(final_token_threshold=threshold)
        for name in dict.fromkeys((DENSE, list(models)[len(args.mac_ratios)])):
            models[f"{name}, tokens at {threshold:g}"] = hc.compress(copy.deepcopy(models[name]), dropping).eval()
    results: dict[str, Any] = {"export": {}, "metrics": {}, "runs": []}
    with tempfile.TemporaryDirectory() as place:
        for name, model in models.items():
            report = hc.export_onnx(
                model, f"{place}/{name}", calibration, tokenizer, int8=True, int8_bound=args.int8_bound
            )
            results["export"][name] = report
            for form, each in forms_of(model, Path(place, name)).items():
                metrics = evaluated(Measured(each, rows, tokenizer, task, args.split)).metrics()
                results["metrics"][f"{name}, {form}"] = metrics
                print(f"{name}, {form}: {metrics}", flush=True)
        for threads in args.threads:
            torch.set_num_threads(threads)
            forms = {
                f"{name}, {form}": each
                for name, model in models.items()
                for form, each in forms_of(model, Path(place, name)).items()
            }
            for size in args.batch_sizes:
                run = timed(forms, unpadded_batches(rows, tokenizer, size, args.examples), args)
                results["runs"].append({"threads": threads, "batch_size": size, **run})
    if args.out:
        header = {"arguments": arguments_of(args), "commit": commit(), "environment": machine(load_before)}
        write_json(args.out, {**header, **results})


if __name__ == "__main__":
    main()
