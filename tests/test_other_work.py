"""Measurements say what else the machine did meanwhile."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.report import machine


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """`clock(busy, own, wall)`: seconds that all cores and this process have worked, and the time of day."""
    monkeypatch.setattr(machine, "_CPU_TIMES", tmp_path / "stat")

    def at(busy, own, wall):
        ticks = os.sysconf("SC_CLK_TCK")
        # user nice system idle iowait irq softirq steal guest guest_nice: idle and waiting count for nobody.
        fields = [int(busy * ticks) - 6, 1, 1, 10**6 + int(wall), 10**5, 1, 1, 2, 7, 7]
        (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, fields))}\ncpu0 0 0 0 0\n")
        monkeypatch.setattr(machine, "_own_seconds", lambda: own)
        monkeypatch.setattr(machine.time, "perf_counter", lambda: wall)

    return at


@pytest.mark.parametrize(("busy", "own", "others", "idle"), [
    (1100.0, 100.0, 0.0, True), (1109.0, 100.0, 0.09, True), (1111.0, 100.0, 0.11, False), (1300.0, 150.0, 1.5, False),
    (1050.0, 60.0, 0.0, True),
])  # fmt: skip
def test_what_others_used_is_what_this_process_did_not(clock, busy, own, others, idle):
    clock(1000.0, 0.0, 50.0)
    measured = machine.OtherWork()
    clock(busy, own, 150.0)
    found = measured.until_now()
    assert found["cores_used_by_others"] == pytest.approx(others, abs=2e-3)
    assert found["idle"] is idle
    assert machine.idleness(found) == ("" if idle else f"not idle: others used {others:.2f} cores")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("text", [None, "", "cpu  0 0 0 0 0 0 0 0 0 0\n", "intr 1 2 3\n"])
def test_a_system_that_says_nothing_is_not_called_idle(monkeypatch, tmp_path, text):
    monkeypatch.setattr(machine, "_CPU_TIMES", tmp_path / "stat")
    if text is not None:
        (tmp_path / "stat").write_text(text)
    found = machine.OtherWork().until_now()
    assert found["idle"] is found["cores_used_by_others"] is None
    assert machine.idleness(found) == "idle or not: unknown"


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux only")
def test_a_busy_neighbour_is_seen():
    measured = machine.OtherWork()
    work = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    found = measured.until_now()
    if found["idle"] is None:
        pytest.skip("this system does not say how long its cores have worked")
    assert found["idle"] is False


def test_tables_mark_columns_that_were_not_idle(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    latency = importlib.import_module("latency")
    quiet, busy = ({"idle": not used, "cores_used_by_others": used} for used in (0.0, 0.5))
    models = {
        name: {"mac_ratio": ratio, "batch": {size: {"speedup": {"median": median}} for size in "18"}}
        for name, ratio, median in (("dense", 1.0, 1.0), ("small", 0.5, 1.6))
    }
    runs = [
        {"threads": threads, "other_work": {"1": quiet, "8": load}, "models": models}
        for threads, load in ((1, quiet), (2, busy))
    ]
    assert latency.table(runs).splitlines() == [
        "|  | 1 thread, batch 1 | 1 thread, batch 8 | 2 threads, batch 1 | "
        "2 threads, batch 8 (not idle: others used 0.50 cores) |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 1.00 / 1.00 | 1.00 / 1.00 | 1.00 / 1.00 | 1.00 / 1.00 |",
        "| small | 1.60 / 2.00 | 1.60 / 2.00 | 1.60 / 2.00 | 1.60 / 2.00 |",
    ]
