"""A compression method outside of the package: one folder, found through its entry point, and nothing to edit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

import hf_compress as hc
from hf_compress.methods import GROUP, all_methods
from tests.labelled_models import TEXTS, write_perfect_model, write_rows


TESTS = Path(__file__).resolve().parent
TOY = TESTS / "toy_method"


def run(*command):
    """The output of a command in a process where the method is installed."""
    path = os.pathsep.join([str(TOY), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def program(*arguments):
    return json.loads(run("-m", "tests.toy_program", *arguments).splitlines()[-1])


def test_it_compresses_and_opens_in_a_fresh_process(tmp_path):
    assert set(program(tmp_path, "write")) == {*hc.METHODS, "output_gain"}
    # Where it is not installed, the model says so.
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'output_gain'"):
        AutoModel.from_pretrained(tmp_path / "model")
    program(tmp_path, "read")


@pytest.mark.slow
def test_it_trains_and_resumes(tmp_path):
    program(tmp_path, "train")


@pytest.mark.slow
def test_command_line_and_report_know_it(tmp_path):
    answers = write_perfect_model(tmp_path / "dense", ["up", "down"])
    rows = [{"text": text, "label": ("up", "down")[answer]} for text, answer in zip(TEXTS, answers, strict=True)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.csv", rows)
    assert "output-gain" in run("-m", "hf_compress", "--help")
    explained = run("-m", "hf_compress", "output-gain", "--help")
    assert "--strength" in explained
    assert "How far the first factors are from 1." in explained
    assert "--largest_inputs" not in explained
    data, gained = ("--data_dir", tmp_path / "data", "--max_length", 16), tmp_path / "gained"
    model = ("--model_name_or_path", tmp_path / "dense", "--output_dir", gained)
    run("-m", "hf_compress", "output-gain", *model, "--strength", 0.3, "--calibration_samples", 16, *data)
    models = ("--models", tmp_path / "dense", gained, "--output_dir", tmp_path / "out")
    timing = ("--latency_batch_sizes", 4, "--latency_repeats", 1, "--latency_examples", 8)
    run("-m", "hf_compress", "report", *models, *timing, *data)
    assert "output_gain" in (tmp_path / "out" / "report.md").read_text()
    assert "Output gains" in (gained / "README.md").read_text()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("output_gain = nowhere:METHOD", "entry point output_gain = nowhere:METHOD of output-gain fails with Module"),
        ("output_gain = output_gain:Method", "gives .*Method.*, which is no Method named 'output_gain'"),
        ("gain = output_gain:METHOD", "gives 'output_gain', which is no Method named 'gain'"),
        ("linformer = output_gain.twin:METHOD", "Two compression methods are named linformer: hf_compress.methods"),
    ],
)  # fmt: skip
def test_broken_announcements_fail_loudly(tmp_path, monkeypatch, entry, message):
    shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "toy" / "output_gain-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")
    twin = (
        "import dataclasses\nfrom output_gain import METHOD\nMETHOD = dataclasses.replace(METHOD, name='linformer')\n"
    )
    (tmp_path / "toy" / "output_gain" / "twin.py").write_text(twin)
    monkeypatch.syspath_prepend(tmp_path / "toy")
    with pytest.raises(ValueError, match=message):
        all_methods()
    for module in [name for name in sys.modules if name.partition(".")[0] == "output_gain"]:
        del sys.modules[module]
