"""What eight bits move and cost: every product as it is, with scales, and with layers left in float.

    python benchmarks/eight_bits.py --models RUN/dense RUN/retaught --data_dir DATA/sst2_sentences --bounds 1 0.03 \
        --out x.json

A bound is what the outputs may move, in their spread: 1 leaves every product as it is. All forms of a model take turns
on the same length-sorted batches.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from header import arguments_of, commit, machine
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.machine import OtherWork
from hf_compress.report.quality import Measured, evaluated
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task


FLOAT = "single precision"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--bounds", type=float, nargs="+", default=[1.0, 0.03])
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def measured(place: str, args: argparse.Namespace) -> dict[str, dict]:
    """For each bound: what the guard did, quality, and the time over that of eight bits as they are."""
    task = load_task(DataArguments(data_dir=args.data_dir, max_length=args.max_length))
    model, tokenizer = open_model(place, task).eval(), open_tokenizer(place)
    task = task.matched(model.config)
    rows = {split: task.encode(split, tokenizer, args.max_length) for split in ("train", args.split)}
    batches = hc.calibration_batches(rows["train"], tokenizer, 64, seed=0)
    found: dict[str, dict] = {FLOAT: {}}
    with tempfile.TemporaryDirectory() as folder:
        forms = {}
        for bound in args.bounds:
            out = Path(folder, str(bound))
            found[str(bound)] = hc.export_onnx(model, out, batches, tokenizer, True, bound)["int8"]
            forms |= {
                FLOAT: hc.OnnxModel.from_pretrained(out),
                str(bound): hc.OnnxModel.from_pretrained(out, int8=True),
            }
        for name, form in forms.items():
            metrics = evaluated(Measured(form, rows[args.split], tokenizer, task, args.split)).metrics()
            found[name] |= {"metrics": metrics, "milliseconds": {}, "times_as_long": {}}
        for size in args.batch_sizes:
            others = OtherWork()
            timed = measure_latency(
                forms, unpadded_batches(rows[args.split], tokenizer, size, args.examples), args.repeats, warmup=2
            )
            ratios = speedups(timed, str(args.bounds[0]))
            for each in timed:
                found[each.name]["milliseconds"][size] = round(1000 * each.p50, 3)
                found[each.name]["times_as_long"][size] = round(1 / ratios[each.name].median, 3)
            found[FLOAT].setdefault("other_work", {})[size] = others.until_now()
    return found


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    header = {**arguments_of(args), "models": [Path(place).name for place in args.models]}
    content = {"arguments": header, "commit": commit(), "environment": machine(), "models": {}}
    for place in args.models:
        content["models"][Path(place).name] = found = measured(place, args)
        write_json(Path(args.out), content)
        for name, each in found.items():
            shown = [f"{key} {each.get(key)}" for key in ("moved", "num_scaled", "metrics", "times_as_long")]
            print(Path(place).name, name, *shown, sep="  ", flush=True)


if __name__ == "__main__":
    main()
