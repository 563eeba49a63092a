"""The parts of `device.py`: each fills a `Bench` with measurements."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from device_bench import Bench, collate
from torch import Tensor
from training_overhead import measure, now
from transformers import TrainerCallback

import hf_compress as hc
from hf_compress.methods.weight_pruning.kernels import PackedLinear
from hf_compress.report.latency import speedups


ROOT = Path(__file__).resolve().parents[1]


def run_tests(bench: Bench) -> None:
    """The tests marked `gpu`; on the CPU one of them."""
    on_gpu, folder = bench.device.type == "cuda", Path(tempfile.mkdtemp())
    texts = {str(file): file.read_text() for file in sorted((ROOT / "tests").rglob("test_*.py"))}
    files = [file for file, text in texts.items() if "pytest.mark.gpu" in text or "= places(" in text]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-m", "gpu"] if on_gpu else ["-m", "not gpu", "-k", "test_latency_and_memory"]
    # Their work is small: several at once keep the device busy.
    command += ["-n", "4"] if on_gpu and find_spec("xdist") else []
    command += ["--timeout=100"] if find_spec("pytest_timeout") else []
    # Warnings of other versions and of the device's libraries are listed; they do not fail a test here.
    command += ["-W", "default", f"--junitxml={folder / 'tests.xml'}"]

    def run() -> dict[str, Any]:
        log, ended = folder / "log", "was killed"
        with log.open("w") as written:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, timeout=bench.left()
                ).returncode
                ended = f"ended with {code}"
            except subprocess.TimeoutExpired:
                code = None
        output = {"output": log.read_text()[-8000:]}
        if not (folder / "tests.xml").is_file():
            return {**output, "error": f"pytest {ended} without a report"}
        cases = list(ElementTree.parse(folder / "tests.xml").iter("testcase"))
        bad = {f"{case.get('classname')}::{case.get('name')}": part.get("message", "")[:500]
               for case in cases for part in case if part.tag in ("failure", "error")}  # fmt: skip
        skipped = sum(part.tag == "skipped" for case in cases for part in case)
        line = f"{len(cases)} tests, {len(bad)} failed, {skipped} skipped"
        found = {"tests": len(cases), "failed": bad, "skipped": skipped, "line": line}
        return found if code == 0 and cases else {**found, **output, "error": f"pytest {ended}: {line}"}

    bench.entry("pytest", run)


class Clock(TrainerCallback):
    """The seconds of each update after the first ones, and the memory that they take."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self.device, self.warmup, self.seconds = device, warmup, list[float]()
        self.peak = 0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended = now()
        if state.global_step > self.warmup:
            self.seconds.append(ended - self._began)
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)


def train_once(bench: Bench, kind: str, precision: str, rows: Dataset, folder: str) -> dict[str, Any]:
    """Throughput and peak memory of one trainer."""
    size = 4 if bench.tiny else 32
    # One epoch to warm up: every batch has a shape of its own, and its first step loads kernels and reserves memory.
    warmup = len(rows) // size
    updates = 2 * warmup if bench.tiny else 3 * warmup
    guided = {"alpha_output": 1.0, "alpha_layer": 1.0}
    trainer_class, arguments_class, options = {
        "plain": (hc.CompressionTrainer, hc.DistillationArguments, {"alpha_output": 0.0}),
        "fixed": (hc.DistillationTrainer, hc.DistillationArguments, guided),
        "joint": (hc.JointTeacherTrainer, hc.JointTeacherArguments, {**guided, "save_teacher": False}),
        "snapshots": (hc.SnapshotTeacherTrainer, hc.SnapshotTeacherArguments,
                      {**guided, "teacher_snapshots": [f"{folder}/teacher-{n}" for n in (1, 2)]}),
        "proximal": (hc.ProximalTrainer, hc.ProximalArguments, {"save_teacher": False}),
    }[kind]  # fmt: skip
    args = arguments_class(
        f"{folder}/{kind}", **options, max_steps=updates, per_device_train_batch_size=size, save_strategy="no",
        train_sampling_strategy="sequential", logging_steps=updates,
        report_to="none", disable_tqdm=True, use_cpu=bench.device.type == "cpu",
        **({} if precision == "fp32" else {precision: True}),
    )  # fmt: skip
    clock = Clock(bench.device, warmup)
    given = {"teacher_model": bench.bert()} if kind in ("fixed", "joint", "proximal") else {}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = trainer_class(
        model=bench.bert(), args=args, train_dataset=rows, data_collator=collate, callbacks=[clock], **given
    )
    loss = trainer.train().training_loss
    step = statistics.median(clock.seconds)
    found = {"step_seconds": step, "examples_per_second": size / step, "peak_bytes": clock.peak, "loss": loss}
    if not math.isfinite(loss):
        raise ValueError(f"The loss must be finite, got {loss}.")
    return {
        **found,
        "line": f"{1e3 * step:.1f} ms a step of {size}, {size / step:.0f} examples/s, {clock.peak / 2**30:.2f} GiB",
    }


def train(bench: Bench) -> None:
    """Each trainer in half precision, then steps against loops by hand."""
    rows = bench.rows(16 if bench.tiny else 320)
    # accelerate leaves fp16 out on the CPU.
    precisions = ("bf16", "fp16") if bench.device.type == "cuda" else ("bf16",)
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2):
            bench.bert().save_pretrained(f"{folder}/teacher-{number}")
        for mode, precision in [(m, p) for p in precisions for m in ("proximal", "output", "joint", "layer")]:
            bench.entry(
                f"overhead/{mode}/{precision}", lambda m=mode, p=precision: overhead(bench, m, p, rows, folder)
            )
        for kind in ("plain", "fixed", "joint", "snapshots", "proximal"):
            for precision in precisions:
                bench.entry(f"{kind}/{precision}", lambda k=kind, p=precision: train_once(bench, k, p, rows, folder))


def overhead(bench: Bench, mode: str, precision: str, rows: Dataset, folder: str) -> dict[str, Any]:
    """A trainer's step over the same work by hand, as in `training_overhead.py`."""
    block, blocks, size = (1, 7, 4) if bench.tiny else (5, 8, 32)
    options = argparse.Namespace(batch_size=size, block=block, blocks=blocks, seed=0, precision=precision)
    found = measure(mode, options, bench.bert(), bench.bert(), rows, collate, folder)
    low, high = found["ratio_quartiles"]
    return {**found, "line": f"{found['ratio']:.3f} ({low:.3f} to {high:.3f}) x by hand"}


def timed(bench: Bench, models: dict[str, Any], batches: list[dict[str, Tensor]], baseline: str) -> dict[str, Any]:
    """Models in turns on the same batches."""
    found = hc.measure_latency(models, batches, repeats=2 if bench.tiny else 12, warmup=1 if bench.tiny else 3)
    ratios = speedups(found, baseline)
    line = ", ".join(
        f"{t.name} {1e3 * t.p50:.2f} ms {t.peak_memory / 2**20:.0f} MiB x{ratios[t.name].median:.2f}" for t in found
    )
    return {"line": line, "models": {t.name: {**t.to_dict(), "speedup": asdict(ratios[t.name])} for t in found}}


@torch.inference_mode()
def difference(model: Any, other: Any, batch: dict[str, Tensor]) -> float:
    """Of the logits, relative to those of the second."""
    found, expected = (
        m.eval()(**{k: v.to(m.device) for k, v in batch.items()}).logits.float() for m in (model, other)
    )
    return float((found - expected).norm() / expected.norm())


def two_of_four(bench: Bench) -> None:
    """2:4 weights on sparse tensor cores; on the CPU, blocks on its sparse kernel."""
    on_gpu = bench.device.type == "cuda"
    pattern = {"pattern": "2:4", "target_sparsity": 0.5} if on_gpu else {"pattern": "4x1", "target_sparsity": 0.9}
    config = hc.WeightPruningConfig(**pattern, criterion="magnitude", scope="local")
    models: dict[str, Any] = {}

    def prune(size: str) -> dict[str, Any]:
        models[size] = hc.compress(bench.bert(size), config).to(bench.half).eval()
        return {"line": f"zeros in {config.pattern}"}

    def compare(size: str, number: int) -> dict[str, Any]:
        dense, ids = models[size], torch.randint(5, 500, (number, 16 if bench.tiny else 128))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        sparse, exact = copy.deepcopy(dense), copy.deepcopy(dense).float()
        packed = hc.accelerate_for_inference(sparse)
        error, usual = (difference(model, exact, batch) for model in (sparse, dense))
        if not error < 3 * usual + 1e-3:
            raise ValueError(f"The logits must be as exact as dense ones ({usual:.3g}), got {error:.3g} off.")
        del exact
        kernel = next(type(m.pack.matrix).__name__ for m in sparse.modules() if type(m) is PackedLinear)
        found = timed(bench, {"dense": dense, packed.format: sparse}, [batch], "dense")
        measured = hc.accelerate_for_inference(copy.deepcopy(dense), batch, repeats=3 if bench.tiny else 10)
        off = f"off by {error:.1e}, dense {usual:.1e}"
        return {
            **found, "kernel": kernel, "relative_error": error, "dense_error": usual,
            "kept_sparse": len(measured.packed), "measured_speedup": measured.speedup,
            "line": f"{found['line']}; {off}; {kernel}; {len(measured.packed)} layers stay sparse where measured",
        }  # fmt: skip

    for size in ("base", "large"):
        bench.entry(f"{size}/prune", lambda s=size: prune(s))
        for number in (1, 8) if bench.tiny else (1, 8, 64):
            bench.entry(f"{size}/batch {number}", lambda s=size, n=number: compare(s, n))
        models.pop(size, None)


def pruned(bench: Bench) -> None:
    """Half the structure, and top-k tokens, against the dense model; texts sorted by length."""
    calibration = bench.batches(64 if bench.tiny else 256, 32)
    dense = bench.bert().eval()
    models = {"dense": dense}

    def compressed(name: str, start: str, config: Any) -> None:
        def run() -> dict[str, Any]:
            began = now()
            models[name] = hc.compress(copy.deepcopy(models[start]), config, data=calibration).eval()
            return {"line": f"compressed in {now() - began:.1f} s"}

        bench.entry(f"compress/{name}", run)

    tokens = hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=-0.5)
    compressed("tokens", "dense", tokens)
    compressed("structure", "dense", hc.StructuredPruningConfig(mac_ratio=0.5))
    compressed("both", "structure", tokens)
    for size in (8,) if bench.tiny else (64, 128):
        batches = bench.batches(2 * size if bench.tiny else 8 * size, size)

        def run(batches=batches) -> dict[str, Any]:
            macs = {name: hc.count_cost(model, data=batches).macs for name, model in models.items()}
            ready = {name: copy.deepcopy(model).to(bench.half) for name, model in models.items()}
            ratios = {name: count / macs["dense"] for name, count in macs.items()}
            found = timed(bench, ready, batches, "dense")
            listed = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            return {**found, "mac_ratio": ratios, "line": f"{found['line']}; multiply-accumulates {listed}"}

        bench.entry(f"batch {size}", run, needs=10)


PARTS: dict[str, Callable[[Bench], None]] = {
    "tests": run_tests, "training": train, "two_of_four": two_of_four, "pruned": pruned,
}  # fmt: skip
