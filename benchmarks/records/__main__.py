"""One row of the records: train and compress by a recipe, export, choose on validation, read the test split once.

    python -m benchmarks.records benchmarks/records/sst2.yaml --model MODEL --data_dir DATA/sst2_sentences \
        --work_dir runs/records/sst2 --seeds 0 1 2 --models dense taught-0.2 retaught-0.2 \
        --note "a tenth in two steps" --out benchmarks/results/records_sst2.json --test

For each seed the recipe runs from nothing (what is done is skipped), and every model named is exported as
`hf-compress export --int8` does it. Models of all forms take turns on the same length-sorted batches. Speed-ups are
medians of the ratios of rounds, over the dense model in PyTorch and over the fastest form of the dense model in ONNX
Runtime int8 (with our settings, and with one scale a matrix; of several threads, with one, too). In ONNX Runtime all
models, the dense one too, compute their last layer for the first token alone if the head reads no other.

Chosen is the fastest form that loses at most `--max_drop` points on validation in the mean over the seeds; of forms
within a tenth of its speed, the most accurate. It alone is then measured on the test split, beside the dense model.
One line about every run is added to the table of tries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers.utils import logging as transformers_logging

import hf_compress as hc
from benchmarks.header import arguments_of, commit, machine
from hf_compress.core.digests import weights_digest
from hf_compress.core.saving import write_json
from hf_compress.export.onnx_model import GRAPH
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.machine import OtherWork
from hf_compress.report.quality import Measured, evaluated
from hf_compress.stages.models import open_model
from hf_compress.stages.processors import open_tokenizer
from hf_compress.tasks.sources import DataArguments, load_task
from hf_compress.tasks.task import Processor, Task


TRIES = Path(__file__).with_name("tries.jsonl")
PYTORCH, FLOAT, INT8, PLAIN_INT8 = "PyTorch", "ONNX Runtime", "ONNX Runtime int8", "ONNX Runtime int8, per tensor"
# Waking threads takes small models longer than they save.
ALONE = "ONNX Runtime int8, one thread"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--work_dir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--note", required=True, help="What this try changes, for the table of tries.")
    parser.add_argument("--models", nargs="+", required=True, help="Stages, dense first; base is the one of --model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_drop", type=float, default=1.0, help="Points that may be lost on validation.")
    parser.add_argument("--int8_bound", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 8, 32], help="None: nothing is timed.")
    parser.add_argument("--examples", type=int, default=128, help="Timed examples, evenly spread over the lengths.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--test", action="store_true", help="Read the test split for what was chosen.")
    parser.add_argument(
        "--as_trained", action="store_true", help="Take the models there are, whatever code made them."
    )
    parser.add_argument("--tries", default=str(TRIES))
    return parser.parse_args()


class Row:
    """The task of a row, and the models of one seed.

    Args:
        args: Of the command.
        seed: Of the recipe.
    """

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.folder = args, Path(args.work_dir, f"seed{seed}")
        run = [sys.executable, "-m", "hf_compress", "run", args.recipe, "--model_name_or_path", args.model]
        places = ["--data_dir", args.data_dir, "--output_dir", str(self.folder), "--seed", str(seed)]
        if not args.as_trained:
            subprocess.run([*run, *places], check=True)
        given = yaml.safe_load(Path(args.recipe).read_text())
        self._length = length = given["max_length"]
        self._task = load_task(
            DataArguments(data_dir=args.data_dir, max_length=length, task_kind=given.get("task_kind"))
        )
        self.tokenizer: Processor = open_tokenizer(self._place(args.models[0]))

    def _place(self, name: str) -> str:
        return self.args.model if name == "base" else str(self.folder / name)

    def model(self, name: str) -> Any:
        return open_model(self._place(name), self._task).eval()

    def task(self, name: str) -> Task:
        return self._task.matched(self.model(name).config)

    def rows(self, name: str, split: str) -> Dataset:
        return self.task(name).encode(split, self.tokenizer, self._length)

    def made_of(self) -> dict[str, str]:
        """What measurements of this seed belong to: the files of each model, and the code."""
        notes = {}
        for name in self.args.models:
            record = Path(self._place(name), "stage.json")
            # A model that no recipe made is known by its weights.
            notes[name] = record.read_bytes() if record.exists() else weights_digest(self.model(name)).encode()
        return {"code": commit(), **{name: hashlib.sha256(note).hexdigest()[:16] for name, note in notes.items()}}

    def exported(self, name: str) -> Path:
        """The folder of an exported model, written if it is not there."""
        made = self.made_of()
        folder = self.folder / "exported" / f"{name}-{made['code']}-{made[name]}"
        if not (folder / GRAPH).exists():
            rows = self.rows(name, "train")
            batches = hc.calibration_batches(rows, self.tokenizer, min(64, len(rows)), seed=0)
            hc.export_onnx(self.model(name), folder, batches, self.tokenizer, True, self.args.int8_bound)
        return folder

    def forms(self, name: str) -> dict[str, nn.Module]:
        """A model in PyTorch and in ONNX Runtime; of the dense one also what a user's own quantization gives."""
        folder = self.exported(name)
        found: dict[str, nn.Module] = {
            PYTORCH: self.model(name),
            FLOAT: hc.OnnxModel.from_pretrained(folder),
            INT8: hc.OnnxModel.from_pretrained(folder, int8=True),
        }
        if self.args.threads > 1:
            found[ALONE] = hc.OnnxModel.from_pretrained(folder, int8=True, threads=1)
        if name == self.args.models[0]:
            found[PLAIN_INT8] = hc.OnnxModel(per_tensor(folder), found[PYTORCH].config)
        return found

    def quality(self, name: str, form: nn.Module, split: str) -> dict[str, float]:
        measured = Measured(form, self.rows(name, split), self.tokenizer, self.task(name), split)
        return evaluated(measured).metrics()

    def timed(self, size: int) -> dict[str, Any]:
        """Latencies and speed-ups of all models and forms in one interleaved run."""
        dense = self.args.models[0]
        forms = {f"{name}, {form}": each for name in self.args.models for form, each in self.forms(name).items()}
        batches = unpadded_batches(self.rows(dense, "validation"), self.tokenizer, size, self.args.examples)
        others = OtherWork()
        latencies = measure_latency(forms, batches, self.args.repeats, warmup=2)
        load = others.until_now()
        eights = [x for x in latencies if x.name.startswith(f"{dense}, {INT8}")]
        small = min(eights, key=lambda x: x.p50)
        over = {"PyTorch": speedups(latencies, f"{dense}, {PYTORCH}"), "int8": speedups(latencies, small.name)}
        return {
            "baseline": small.name, "other_work": load,
            "p50": {x.name: x.p50 for x in latencies},
            "speedups": {name: {base: asdict(found[name]) for base, found in over.items()} for name in forms},
        }  # fmt: skip


def per_tensor(folder: Path) -> Path:
    """A graph with one scale for each matrix, as ONNX Runtime's quantization makes it without settings."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "per_tensor.onnx"
    if not file.exists():
        quantize_dynamic(str(folder / GRAPH), str(file), weight_type=QuantType.QInt8)
    return file


def main_metric(metrics: Mapping[str, float]) -> float:
    return 100 * next(metrics[name] for name in ("accuracy", "recall_at_1", "spearman", "mrr") if name in metrics)


def chosen(content: dict[str, Any], args: argparse.Namespace) -> str:
    """The most accurate of the fastest forms that lose little enough on validation.

    Speeds are geometric means over batch sizes and seeds; those within a tenth of the highest count as equal.

    Notes the losses (in points) and the speed-ups of all forms in `content`.
    """
    seeds = [content["seeds"][str(seed)] for seed in args.seeds]
    dense = f"{args.models[0]}, {PYTORCH}"
    drops, speeds = {}, {}
    for name in seeds[0]["validation"]:
        lost = [main_metric(seed["validation"][dense]) - main_metric(seed["validation"][name]) for seed in seeds]
        drops[name] = round(statistics.mean(lost), 2)
        for base in ("PyTorch", "int8"):
            ratios = [run["speedups"][name][base]["median"] for seed in seeds for run in seed["timed"].values()]
            if ratios:
                speeds.setdefault(name, {})[base] = round(statistics.geometric_mean(ratios), 2)
    content |= {"drops": drops, "speeds": speeds}
    allowed = [name for name, drop in drops.items() if drop <= args.max_drop]
    if speeds:
        highest = max(speeds[name]["PyTorch"] for name in allowed)
        allowed = [name for name in allowed if speeds[name]["PyTorch"] >= highest / 1.1]
    return min(allowed, key=lambda name: drops[name])


def with_error(values: list[float]) -> str:
    """A mean and its standard error."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{statistics.mean(values):.2f}" + ("" if spread is None else f" +- {spread:.2f}")


def table(content: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown: quality on validation and test, speed-ups over both baselines at each batch size."""
    seeds = [content["seeds"][str(seed)] for seed in args.seeds]
    lines = [
        "| | " + " | ".join(["validation", "test", *(f"batch {size}" for size in args.batch_sizes)]) + " |",
        "|---" * (3 + len(args.batch_sizes)) + "|",
    ]
    for name in content["drops"]:
        qualities = [
            with_error([main_metric(seed[split][name]) for seed in seeds]) if name in seeds[0][split] else ""
            for split in ("validation", "test")
        ]
        speeds = []
        for size in map(str, args.batch_sizes):
            ratios = [
                statistics.median(seed["timed"][size]["speedups"][name][base]["median"] for seed in seeds)
                for base in ("PyTorch", "int8")
            ]
            speeds.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append("| " + " | ".join([name, *qualities, *speeds]) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    content = json.loads(out.read_text()) if out.exists() else {"seeds": {}}
    header = {**arguments_of(args), "recipe": Path(args.recipe).name}
    header.pop("tries")
    content |= {"arguments": header, "commit": commit(), "environment": machine()}
    rows = {seed: Row(args, seed) for seed in args.seeds}
    for seed, row in rows.items():
        made = row.made_of()
        if content["seeds"].get(str(seed), {}).get("made_of") != made:
            content["seeds"][str(seed)] = {"made_of": made, "validation": {}, "timed": {}, "test": {}}
        known = content["seeds"][str(seed)]
        for name in args.models:
            for form, each in row.forms(name).items():
                if f"{name}, {form}" not in known["validation"]:
                    known["validation"][f"{name}, {form}"] = row.quality(name, each, "validation")
                    write_json(out, content)
        for size in args.batch_sizes:
            if str(size) not in known["timed"]:
                known["timed"][str(size)] = row.timed(size)
                write_json(out, content)
                for name, found in known["timed"][str(size)]["speedups"].items():
                    both = "  ".join(f"{found[base]['median']:6.2f}x" for base in ("PyTorch", "int8"))
                    print(f"seed {seed}, batch {size:2d}  {name:40s} {both}", flush=True)
    content["chosen"] = chosen(content, args)
    if args.test:
        for seed, row in rows.items():
            wanted = [f"{args.models[0]}, {form}" for form in (PYTORCH, INT8, PLAIN_INT8)] + [content["chosen"]]
            for full in wanted:
                name, form = full.split(", ", 1)
                found = content["seeds"][str(seed)]["test"]
                if full not in found:
                    found[full] = row.quality(name, row.forms(name)[form], "test")
    write_json(out, content)
    print(table(content, args) + f"\n\nChosen: {content['chosen']}")
    line = {
        "recipe": Path(args.recipe).name, "note": args.note, "commit": content["commit"], "seeds": args.seeds,
        "drops": content["drops"], "speeds": content["speeds"], "chosen": content["chosen"],
    }  # fmt: skip
    with open(args.tries, "a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
