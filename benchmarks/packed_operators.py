"""Packed weights in ONNX Runtime: in single precision, rounded anew to eight bits, or unpacked by an operator.

    python benchmarks/packed_operators.py --graph dense_onnx --out x.json

The folder is one that `hf-compress export --int8` wrote. The integers are ONNX Runtime's own (`MatMulNBits`, products
in eight bits), in groups of 64 weights: the speed is that of any packed weights of this layout. All forms take turns
on one batch of random tokens; milliseconds of a batch, medians over the rounds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime
from header import arguments_of, commit, machine
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from hf_compress.core.saving import write_json
from hf_compress.report.machine import OtherWork


# Products in eight bits: the fastest that the operator has.
LEVEL = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", required=True, help="Folder with model.onnx and model_int8.onnx.")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def integers(graph: Path, target: Path, bits: int, group_size: int) -> Path:
    settings = {"block_size": group_size, "is_symmetric": True, "accuracy_level": LEVEL, "bits": bits}
    made = MatMulNBitsQuantizer(onnx.load(graph), **settings, algo_config=DefaultWeightOnlyQuantConfig(**settings))
    made.process()
    made.model.save_model_to_file(str(target))
    return target


def main() -> None:
    args = parse()
    logging.disable(logging.INFO)
    folder = Path(args.graph)
    with tempfile.TemporaryDirectory() as place:
        files = {"single precision": folder / "model.onnx", "eight bits": folder / "model_int8.onnx"}
        for bits in args.bits:
            target = Path(place, f"{bits}.onnx")
            files[f"integers of {bits} bits"] = integers(files["single precision"], target, bits, args.group_size)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = args.threads, 3
        sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
    drawn, found = np.random.default_rng(0), {}
    for size in args.batch_sizes:
        ids = drawn.integers(1000, 20000, (size, args.length))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        took: dict[str, list[float]] = {name: [] for name in sessions}
        calls, other = max(1, 32 // size), OtherWork()
        for repeat in range(args.repeats + 1):
            for name, session in sessions.items():
                feed = {each.name: inputs[each.name] for each in session.get_inputs()}
                start = time.perf_counter()
                for _ in range(calls):
                    session.run(None, feed)
                if repeat:
                    took[name].append(1000 * (time.perf_counter() - start) / calls)
        times = {name: round(median(each), 3) for name, each in took.items()}
        found[size] = {"milliseconds": times, "other_work": other.until_now()}
        print(size, times, flush=True)
    header = {**arguments_of(args), "graph": folder.name.partition("-")[0]}
    result = {"arguments": header, "commit": commit(), "environment": machine(), "bytes": sizes, "batch_sizes": found}
    write_json(Path(args.out), result)


if __name__ == "__main__":
    main()
