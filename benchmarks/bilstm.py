"""CPU latency of the BiLSTM student beside small transformers, all in ONNX Runtime with eight-bit weights, too.

    python benchmarks/bilstm.py --model MODEL --data_dir DATA/sst2_sentences \
        --out benchmarks/results/bilstm_latency.json

The transformers are the model and a copy of it with `--num_layers` layers. Heads and the BiLSTM are new: the time does
not depend on what a model has learned. All competitors take turns on every batch, in one run, at batch 1 (no padding)
and 32 (neighbours in length); speed-ups over the model are medians of the ratios of rounds. The result says how much
other processes ran meanwhile. Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from header import arguments_of, commit, machine
from onnx_baseline import in_onnx_runtime
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.machine import OtherWork, idleness
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="An encoder; the baseline.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=3, help="Layers of its shallower copy.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--examples", type=int, default=128, help="Timed examples, evenly spread over the lengths.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, help="Of torch and ONNX Runtime; default: as many as torch takes.")
    parser.add_argument("--out")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    set_seed(0)
    place, version = machine(), commit()
    task = load_task(DataArguments(data_dir=args.data_dir, max_length=args.max_length))
    tokenizer = open_tokenizer(args.model)
    rows = task.encode(args.split, tokenizer, args.max_length)
    teacher = open_model(args.model, task, fresh_head=True)
    dense: dict[str, PreTrainedModel] = {
        "model": teacher,
        f"{args.num_layers} layers": hc.students.from_teacher(teacher, args.num_layers),
        "BiLSTM": hc.BiLSTMForSequenceClassification(hc.BiLSTMConfig.for_tokenizer(tokenizer, **task.head_settings())),
    }
    # The token types of single texts are all the same: the BiLSTM has no use for them.
    [some] = [
        {name: value for name, value in batch.items() if name != "token_type_ids"}
        for batch in unpadded_batches(rows, tokenizer, 2, 2)
    ]
    models: dict[str, Any] = {}
    for name, model in dense.items():
        models[name] = model.eval()
        models[f"{name}, ONNX Runtime"] = in_onnx_runtime(model, some, int8=False)
        models[f"{name}, ONNX Runtime int8"] = in_onnx_runtime(model, some)
    costs = {
        name: hc.count_cost(model, data=unpadded_batches(rows, tokenizer, 32, 128)) for name, model in dense.items()
    }
    results: dict[str, Any] = {name: {"batch": {}} for name in models}
    for name, cost in costs.items():
        results[name]["cost"] = cost.to_dict()
        print(f"{name}: {cost.params / 1e6:.1f} M parameters, {cost.macs / 1e6:.1f} M MACs a sequence")
    load = {}
    for size in args.batch_sizes:
        batches = unpadded_batches(rows, tokenizer, size, args.examples)
        others = OtherWork()
        timed = measure_latency(models, batches, args.repeats, args.warmup)
        load[str(size)] = others.until_now()
        ratios = speedups(timed, "model")
        print(f"batch {size}: {idleness(load[str(size)]) or 'idle'}")
        for entry in timed:
            ratio = ratios[entry.name]
            results[entry.name]["batch"][str(size)] = {**entry.to_dict(), "speedup": asdict(ratio)}
            print(
                f"{entry.name}: p50 {1e3 * entry.p50:.2f} ms, p95 {1e3 * entry.p95:.2f} ms a batch, "
                f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
                flush=True,
            )
    if args.out:
        found = {"environment": place, "threads": torch.get_num_threads(), "other_work": load, "models": results}
        write_json(args.out, {"arguments": arguments_of(args), "commit": version, **found})


if __name__ == "__main__":
    main()
