"""Measured speed of dense and pruned model directories beside their arithmetic, on a validation split.

    python benchmarks/latency.py --models runs/dense runs/pruned --data_dir DATA/sst2_sentences \
        --out benchmarks/results/latency.json

Batch 1 and 32, neighbours in length together, so that batch 1 has no padding and batch 32 next to none. The models
take turns on every batch; speed-ups are medians of the ratios of rounds. The first model is the baseline. With
`--token_thresholds`, every model is also measured with tokens dropped by hand-set thresholds; 0 keeps them all, which
shows what the shorter last layer of such a model gives alone, unless `--first_token` gives the same to the dense
baseline: its last layer then computes the one row that a classifier's head reads, and only that row is counted in the
last layer of every model that computes no other. `--threads 1 2` measures with one and with two, each in a process of
its own. With `--onnx_int8`, the first model also runs in ONNX Runtime with weights of eight bits, which is what a user
has in five minutes. Every result says how much other processes ran meanwhile, and is marked where the machine was not
idle. With `--profile`, where the time of a batch goes is recorded afterwards, by kinds of operations.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from header import arguments_of, commit, machine
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.batches import base_inputs, live_tokens
from hf_compress.core.cost import count_cost
from hf_compress.core.forward_state import carries_state, forward_state, state_in
from hf_compress.core.projections import Role
from hf_compress.core.saving import write_json
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.machine import OtherWork, idleness
from hf_compress.report.table import verdict
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import check_vocabulary, open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task
from hf_compress.tasks.task import Task


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="Directories; the first is the dense baseline.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--examples", type=int, default=256, help="Timed examples, evenly spread over the lengths.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--token_thresholds", type=float, nargs="*", default=[], help="Tops of the ramp.")
    parser.add_argument("--first_token", action="store_true", help="Of the dense baseline's last layer (BERT).")
    parser.add_argument("--onnx_int8", action="store_true", help="Also the first model in ONNX Runtime, int8.")
    parser.add_argument("--profile", action="store_true", help="Also split the time by kinds of operations.")
    parser.add_argument("--threads", type=int, nargs="+", help="Of torch; default: as many as torch takes.")
    parser.add_argument("--out")
    return parser.parse_args()


def first_token_last_(model: PreTrainedModel) -> None:
    """Let the last layer of a BERT compute the first token only; the head reads no other."""
    last = layers_of(model)[-1]
    layer, attention, head_size = last.module, last.attention, last.head_size

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, head_size)).transpose(1, 2)

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: object, **more: object):
        first = hidden_states[:, :1]
        query, key, value = attention.query(first), attention.key(hidden_states), attention.value(hidden_states)
        mask = None if attention_mask is None else attention_mask[..., :1, :]
        context = F.scaled_dot_product_attention(split(query), split(key), split(value), mask, scale=head_size**-0.5)
        return layer.feed_forward_chunk(layer.attention.output(context.transpose(1, 2).flatten(2), first))

    layer.forward = forward


@torch.inference_mode()
def first_token_macs(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean multiply-accumulates a sequence where the last layer computes the row of the first token only."""
    layer = layers_of(model)[-1]
    sizes = {role: found.in_features * found.out_features for role, found in layer.projections.items()}
    each = sizes.pop(Role.KEY) + sizes.pop(Role.VALUE) + 2 * layer.attention_out.in_features
    last, sequences = 0.0, 0
    for batch in batches:
        inputs, arguments = base_inputs(model, batch), forward_state(model, whole=False)
        lengths = live_tokens(inputs).sum(1)
        if (state := state_in(arguments)) is not None:
            model.base_model(**inputs, **arguments)
            lengths = state.attended[layer.index]
        last += float((each * lengths + sum(sizes.values())).sum())
        sequences += len(lengths)
    return sum(count_cost(model, data=batches).macs_by_layer[:-1]) + last / sequences


def milliseconds_by_kind(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean milliseconds a batch inside operations, without what they call; the rest of the wall clock is Python."""
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name != "labels"})
        wall = time.perf_counter() - start
    kinds = {"matrix products of linear layers": 0.0, "attention": 0.0, "other operations": 0.0}
    for event in profile.key_averages():
        linear = event.key in ("aten::addmm", "aten::mm")
        kind = "matrix products of linear layers" if linear else "other operations"
        kinds["attention" if "attention" in event.key else kind] += event.self_cpu_time_total / 1e3 / len(batches)
    return {**kinds, "wall clock under the profiler": 1e3 * wall / len(batches)}


def open_models(args: argparse.Namespace, task: Task, tokenizer: Any, rows: Dataset) -> tuple[dict[str, Any], str]:
    """The models to time by name, and which of them is the baseline."""
    models: dict[str, Any] = {}
    for folder in args.models:
        name = Path(folder).name if Path(folder).name not in models else folder
        models[name] = open_model(folder, task)
        check_vocabulary(models[name].config, tokenizer)
    dropping_from = list(models.items())
    baseline = next(iter(models))
    if args.first_token:
        shorter = copy.deepcopy(models[baseline]).eval()
        first_token_last_(shorter)
        [some] = unpadded_batches(rows, tokenizer, 4, 4)
        inputs = {name: value for name, value in some.items() if name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            torch.testing.assert_close(shorter(**inputs).logits, models[baseline].eval()(**inputs).logits)
        baseline = f"{baseline}, last layer of the first token"
        models = {baseline: shorter, **models}
    if args.onnx_int8:
        # An extra that only this measurement needs.
        from onnx_baseline import in_onnx_runtime

        dense = next(iter(models))
        models[f"{dense}, ONNX Runtime int8"] = in_onnx_runtime(
            models[dense], unpadded_batches(rows, tokenizer, 2, 2)[0]
        )
    for name, model in dropping_from:
        for top in args.token_thresholds:
            dropping = hc.TokenPruningConfig(final_token_threshold=top)
            models[f"{name}, tokens {top:g}"] = hc.compress(copy.deepcopy(model), dropping).eval()
    return models, baseline


def threads_of(number: int) -> str:
    return f"{number} thread" + "s" * (number > 1)


def measure(args: argparse.Namespace, threads: int | None) -> dict[str, Any]:
    """Everything with one number of threads."""
    transformers_logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    place = machine()
    task = load_task(DataArguments(
        task_name=args.task_name, data_dir=args.data_dir, max_length=args.max_length,
        max_eval_samples=args.max_eval_samples,
    ))  # fmt: skip
    tokenizer = open_tokenizer(args.models[0])
    rows = task.encode(args.split, tokenizer, args.max_length)
    models, baseline = open_models(args, task, tokenizer, rows)
    timed_examples = unpadded_batches(rows, tokenizer, max(args.batch_sizes), args.examples)
    counted = {name: model for name, model in models.items() if isinstance(model, PreTrainedModel)}
    macs = {name: count_cost(model, data=timed_examples).macs for name, model in counted.items()}
    # The same arithmetic, in other numbers.
    macs = {name: macs.get(name, macs[baseline]) for name in models}
    if args.first_token:
        short = [name for name, model in models.items() if name == baseline or carries_state(model)]
        macs.update({name: first_token_macs(models[name], timed_examples) for name in short})
    results = {name: {"macs": macs[name], "mac_ratio": macs[name] / macs[baseline], "batch": {}} for name in models}
    load = {}
    for size in args.batch_sizes:
        batches = unpadded_batches(rows, tokenizer, size, args.examples)
        others = OtherWork()
        latencies = measure_latency(models, batches, args.repeats, args.warmup)
        load[str(size)] = others.until_now()
        ratios = speedups(latencies, baseline)
        print(f"{threads_of(torch.get_num_threads())}, batch {size}: {idleness(load[str(size)]) or 'idle'}")
        for timed in latencies:
            found = results[timed.name]
            found["batch"][str(size)] = {**timed.to_dict(), "speedup": asdict(ratios[timed.name])}
            sentence = verdict(size, ratios[timed.name].median, found["mac_ratio"], ratios[timed.name].low)
            note = "the baseline" if timed.name == baseline else sentence
            print(
                f"{timed.name}: p50 {1e3 * timed.p50:.2f} ms, p95 {1e3 * timed.p95:.2f} ms a batch; {note}", flush=True
            )
        if args.profile:
            for name, model in models.items():
                found = results[name]["batch"][str(size)]["milliseconds"] = milliseconds_by_kind(model, batches)
                print(f"{name}, batch {size}: " + ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in found.items()))
    return {
        "threads": torch.get_num_threads(),
        "seq_len": sum(len(ids) for ids in rows["input_ids"]) / len(rows),
        "baseline": baseline,
        "environment": place,
        "other_work": load,
        "models": results,
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Speed-ups over those of the arithmetic, as Markdown; where the machine was not idle, the column says so."""
    columns = [(run, size) for run in runs for size in run["other_work"]]
    heads = []
    for run, size in columns:
        note = idleness(run["other_work"][size])
        heads.append(f"{threads_of(run['threads'])}, batch {size}" + (f" ({note})" if note else ""))
    lines = [["", *heads], ["---"] * (1 + len(heads))]
    for name in runs[0]["models"]:
        found = [(run["models"][name], size) for run, size in columns]
        ratios = [(model["batch"][size]["speedup"]["median"], 1 / model["mac_ratio"]) for model, size in found]
        lines.append([name, *(f"{time:.2f} / {macs:.2f}" for time, macs in ratios)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_own_process(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Threads that another number of them has left behind would wait for work on the same cores."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, args, threads).result()


def main() -> None:
    args = parse()
    several = args.threads or [None]
    runs = [measure(args, *several)] if len(several) == 1 else [in_own_process(args, number) for number in several]
    print(table(runs))
    if args.out:
        write_json(args.out, {"arguments": arguments_of(args), "commit": commit(), "runs": runs})


if __name__ == "__main__":
    main()
