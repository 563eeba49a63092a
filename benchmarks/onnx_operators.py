"""Where an exported graph spends its time in ONNX Runtime, by operator: a sum and its normalisation joined, and apart.

    python benchmarks/onnx_operators.py --graph small_onnx/model_int8.onnx --batch_size 32 --length 25 --out x.json

The runtime's own profiler times every node; a node's time is the lower quartile over the repeats. Tokens are random.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import quantiles

import numpy as np
import onnxruntime
from header import commit, machine

from hf_compress.core.saving import write_json


FUSION = "SkipLayerNormFusion"


def profiled(graph: str, feed: dict[str, np.ndarray], repeats: int, without: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds and nodes of each operator, those that take longest first."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=without
        )
        names = {entry.name for entry in session.get_inputs()}
        for _ in range(repeats):
            session.run(None, {name: values for name, values in feed.items() if name in names})
        events = json.loads(Path(session.end_profiling()).read_text())
    times, operators = defaultdict(list), {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            times[event["name"]].append(event["dur"] / 1000)
            operators[event["name"]] = event["args"]["op_name"]
    total, nodes = Counter(), Counter()
    for name, values in times.items():
        total[operators[name]] += quantiles(values, n=4)[0]
        nodes[operators[name]] += 1
    return {name: {"milliseconds": round(spent, 3), "nodes": nodes[name]} for name, spent in total.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    shape = (args.batch_size, args.length)
    ids = np.random.default_rng(0).integers(1000, 20000, shape)
    feed = {"input_ids": ids, "attention_mask": np.ones(shape, np.int64), "token_type_ids": np.zeros(shape, np.int64)}
    found = {
        name: profiled(args.graph, feed, args.repeats, without)
        for name, without in (("joined", []), ("apart", [FUSION]))
    }
    settings = {name: getattr(args, name) for name in ("batch_size", "length", "repeats")}
    content = {"arguments": settings, "commit": commit(), "environment": machine(), **found}
    write_json(Path(args.out), content)
    for name, operators in found.items():
        total = sum(each["milliseconds"] for each in operators.values())
        print(f"{name}: {total:.2f} ms in {sum(int(each['nodes']) for each in operators.values())} nodes")
        for operator, each in list(operators.items())[:8]:
            print(f"  {operator:28s} {each['milliseconds']:8.2f} ms  {each['nodes']:3.0f} nodes")


if __name__ == "__main__":
    main()
