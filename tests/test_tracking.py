"""Losses reach the trackers that `report_to` names: each is read back from what it wrote on this machine."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.tracking_program import trained


ROOT = Path(__file__).resolve().parents[1]
TERMS = {"loss/task", "loss/output", "loss/layer", "loss/teacher", "teacher_learning_rate"}
# Name -> values, of a file of events.
SCALARS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""
pytestmark = pytest.mark.slow


def require(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def assert_whole(logged):
    """Three updates, whose terms add up to the loss."""
    assert len(logged) == 3
    for entry in logged:
        assert {f"train/{name}" for name in TERMS} <= set(entry)
        parts = sum(entry[f"train/loss/{name}"] for name in ("task", "output", "layer"))
        assert entry["train/loss"] == pytest.approx(parts, rel=1e-3)


def run(tracker, folder, **environment):
    """The log of a training in a process of its own, which starts with the tracker's settings."""
    path = os.pathsep.join(map(str, [ROOT, *sys.path]))
    command = [sys.executable, "-m", "tests.tracking_program", tracker, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])[:3]


@pytest.mark.filterwarnings("ignore")  # of wandb's own imports
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    original = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda run, data, *a, **k: (seen.append(dict(data)), original(run, data, *a, **k)),
    )
    trained("wandb", str(tmp_path))
    wandb.finish()
    logged = [entry for entry in seen if "train/loss" in entry]
    assert_whole(logged)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")), "nothing was written"
    assert json.dumps(logged[0])


def test_tensorboard(tmp_path):
    require("tensorboard")
    log = run("tensorboard", tmp_path, TENSORBOARD_LOGGING_DIR=str(tmp_path / "events"))
    [file] = (tmp_path / "events").iterdir()
    done = subprocess.run([sys.executable, "-c", SCALARS, str(file)], capture_output=True, text=True, check=True)
    series = json.loads(done.stdout)
    assert_whole([{name: values[i] for name, values in series.items() if len(values) == 3} for i in range(3)])
    for name in TERMS | {"loss"}:
        assert series[f"train/{name}"] == pytest.approx([entry[name] for entry in log], rel=1e-5), name


def test_trackio(tmp_path):
    require("trackio")
    log = run("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    [file] = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(file)) as found:
        rows = [json.loads(text) for (text,) in found.execute("SELECT metrics FROM metrics ORDER BY id")]
    logged = [entry for entry in rows if "train/loss" in entry]
    assert_whole(logged)
    for entry, expected in zip(logged, log, strict=True):
        for name in TERMS | {"loss"}:
            assert entry[f"train/{name}"] == pytest.approx(expected[name], rel=1e-5), name
