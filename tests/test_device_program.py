"""`benchmarks/device.py`, which is for machines with a GPU, runs on the CPU with tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "device.py"
PARTS = {
    "tests": {"pytest"},
    "training": {"overhead/proximal/bf16", "proximal/bf16", "joint/bf16", "fixed/bf16", "snapshots/bf16"},
    "two_of_four": {"base/batch 1", "base/batch 8", "large/batch 8"},
    "pruned": {"compress/structure", "compress/both", "batch 8"},
}


def run(file, *options):
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--tiny", "--output", str(file), *options]
    outcome = subprocess.run(command, capture_output=True, text=True)
    return outcome, json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", list(PARTS))
def test_a_part(part, tmp_path):
    outcome, report = run(tmp_path / "device.json", "--parts", part, "--minutes", "40")
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    assert outcome.stdout.rstrip().endswith("all well")
    found = report["parts"][part]
    assert found["ended"] == "done"
    assert PARTS[part] <= found["results"].keys()
    assert all("error" not in entry and entry["line"] for entry in found["results"].values())
    assert {"card", "commit", "command", "environment", "seconds"} <= report.keys()


@pytest.mark.slow
def test_what_fails_is_noted_and_the_rest_goes_on(tmp_path):
    """There is no GPU here: every part ends badly, each by itself."""
    command = [sys.executable, str(PROGRAM), "--tiny", "--output", str(tmp_path / "device.json")]
    outcome = subprocess.run([*command, "--parts", "two_of_four", "pruned"], capture_output=True, text=True)
    report = json.loads((tmp_path / "device.json").read_text())
    assert outcome.returncode == 1
    assert [part["ended"] for part in report["parts"].values()] != ["done", "done"]
    assert outcome.stdout.count("NOT WELL") >= 2


@pytest.mark.slow
def test_without_time_a_part_is_left_out(tmp_path):
    outcome, report = run(tmp_path / "device.json", "--minutes", "0.1")
    assert outcome.returncode == 1
    assert {part["ended"] for part in report["parts"].values()} == {"no time left"}
