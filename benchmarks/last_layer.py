"""What it saves that the exported last layer of a classifier computes the first token alone.

    python benchmarks/last_layer.py --model runs/dense --data_dir DATA/sst2_sentences --out x.json

The model is exported twice, as it is always exported and with a whole last layer. Both graphs, in single precision and
in int8, take turns on the same length-sorted batches. Speed-ups are medians of the ratios of rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from header import arguments_of, commit, machine
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from hf_compress.core.saving import write_json
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.machine import OtherWork
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="A fine-tuned classifier.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out")
    return parser.parse_args()


def main() -> None:
    args = parse()
    load_before = os.getloadavg()[0]
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    task = load_task(DataArguments(data_dir=args.data_dir, max_length=args.max_length))
    tokenizer, model = open_tokenizer(args.model), open_model(args.model, task).eval()
    rows = task.matched(model.config).encode(args.split, tokenizer, args.max_length)
    data, runs = unpadded_batches(rows, tokenizer, 32, 64), []
    with tempfile.TemporaryDirectory() as place:
        narrow, whole = f"{place}/narrow", f"{place}/whole"
        hc.export_onnx(model, narrow, data, tokenizer, int8=True)
        with mock.patch("hf_compress.export.folder.first_token_suffices", return_value=False):
            hc.export_onnx(model, whole, data, tokenizer, int8=True)
        for int8 in (False, True):
            forms = {Path(folder).name: hc.OnnxModel.from_pretrained(folder, int8) for folder in (whole, narrow)}
            for size in args.batch_sizes:
                others = OtherWork()
                found = measure_latency(
                    forms, unpadded_batches(rows, tokenizer, size, args.examples), args.repeats, warmup=2
                )
                ratio = speedups(found, "whole")["narrow"]
                runs.append(
                    {"int8": int8, "batch_size": size, "speedup": asdict(ratio), "other_work": others.until_now()}
                )
                print(f"int8 {int8!s:5s}  batch {size:2d}  {ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})")
    if args.out:
        header = {"arguments": arguments_of(args), "commit": commit(), "environment": machine(load_before)}
        write_json(args.out, {**header, "runs": runs})


if __name__ == "__main__":
    main()
