"""The estimate of a recipe counts what a stage does beside its own arithmetic."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from hf_compress.recipes.estimates import multiply_accumulates_per_second, seconds_of
from hf_compress.recipes.examples import Examples
from hf_compress.recipes.origins import Origin
from hf_compress.stages.arguments import OutputArguments
from hf_compress.stages.export import Export, ExportArguments
from hf_compress.tasks.arguments import DataArguments


ORIGIN = Origin("dense", working=10_000_000)
EXAMPLES = Examples(SimpleNamespace(name="reviews"), train=500, measured=200, tokens=64.0)


def estimate(**wanted):
    arguments = Export(
        export=ExportArguments("dense", **wanted), data=DataArguments(data_dir="."), output=OutputArguments("out")
    )
    return seconds_of(arguments, ORIGIN, EXAMPLES, None, 0)


def test_an_export_records_measures_and_times():
    assert estimate() > 30
    assert estimate(int8=True) > estimate() + 10
    more = estimate(latency_repeats=17) - estimate(latency_repeats=7)
    # Ten more rounds of two models, two batch sizes and 64 examples.
    read = 10 * 2 * 2 * 64
    speed = 0.35 * multiply_accumulates_per_second("cpu", torch.float32)
    assert more == pytest.approx(2.0 * read * 10e6 * 64 / speed, rel=1e-6)


def test_a_busy_moment_does_not_count(monkeypatch):
    """Products take 10, 40 and 60 ms: the machine can do one in 10."""
    clock = iter([0.0, 0.01, 0.01, 0.05, 0.05, 0.11])
    monkeypatch.setattr("hf_compress.recipes.estimates.time.perf_counter", lambda: next(clock))
    found = multiply_accumulates_per_second.__wrapped__("cpu", torch.float32)
    assert found == pytest.approx(512**3 / 0.01)


def test_a_training_in_half_precision_takes_the_speed_of_its_products(monkeypatch, tmp_path):
    speeds = {torch.float32: 1e9, torch.bfloat16: 4e9}
    monkeypatch.setattr(
        "hf_compress.recipes.estimates.multiply_accumulates_per_second", lambda device, dtype: speeds[dtype]
    )

    def seconds(bf16):
        training = TrainingArguments(str(tmp_path), bf16=bf16, use_cpu=True)
        arguments = SimpleNamespace(training_arguments=training, option=lambda name: None)
        return seconds_of(arguments, ORIGIN, EXAMPLES, None, 0)

    # Five seconds of each are not arithmetic.
    assert seconds(False) - 5 == pytest.approx(4 * (seconds(True) - 5))
