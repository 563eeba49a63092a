"""One cache, several processes: runs, ranks of one job, and a process that was killed while it wrote."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hf_compress.training.cache import TeacherCache
from hf_compress.training.fingerprints import example_keys
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teachers import FixedTeacher
from tests.cache_program import teacher
from tests.crash_program import Rows, pad


ROOT = Path(__file__).resolve().parents[1]
LAYOUT = {"states": [2], "logits": True}


def start(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def finish(*processes):
    told = [process.communicate(timeout=500)[0] for process in processes]
    for process, text in zip(processes, told, strict=True):
        assert process.returncode == 0, text[-3000:]


def assert_whole(folder):
    """Every example is stored, with what the teacher says."""
    cache = TeacherCache.of(teacher(), str(folder), LAYOUT)
    rows = [Rows()[index] for index in range(64)]
    cached, live = (
        FixedTeacher(teacher(), WantedSignals((2,)), cache=cache),
        FixedTeacher(teacher(), WantedSignals((2,))),
    )
    for place in range(0, 64, 8):
        batch = pad(rows[place : place + 8])
        seen, expected = cached.forward(batch), live.forward(batch)
        torch.testing.assert_close(seen.logits[0], expected.logits[0], rtol=0, atol=1e-5)
        where = batch["attention_mask"].bool()
        torch.testing.assert_close(seen.hidden[0][where], expected.hidden[0][where], rtol=0, atol=1e-5)
    assert cache.misses == 0


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_runs_share_one_cache(tmp_path, rounds):
    finish(*[start("-m", "tests.cache_program", tmp_path, name, rounds) for name in (1, 2)])
    for number in range(rounds):
        assert_whole(tmp_path / f"cache{number}")


@pytest.mark.slow
def test_the_ranks_of_one_job_share_a_cold_cache(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    finish(start(*launcher, "-m", "tests.cache_program", tmp_path, "job", 6))
    for number in range(6):
        assert_whole(tmp_path / f"cache{number}")


def test_many_open_and_extend_a_cold_cache_at_once(tmp_path):
    """Threads with connections of their own: the file's locks are the same as between processes."""
    rows, errors = [Rows()[index] for index in range(64)], []
    speakers = [teacher() for _ in range(4)]

    def work(turn):
        try:
            cache = TeacherCache.of(speakers[turn], str(tmp_path / "cache"), LAYOUT)
            speaker = FixedTeacher(speakers[turn], WantedSignals((2,)), cache=cache)
            for place in range(0, 64, 8):
                speaker.forward(pad((rows * 2)[(place + 8 * turn) % 64 :][:8]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_whole(tmp_path / "cache")


_WRITER = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size=1")
database.execute("BEGIN IMMEDIATE")
for number in range(40):
    database.execute("INSERT INTO outputs VALUES (?, 1, 1, ?)", (bytes([number]), bytes(70000)))
database.execute("UPDATE identity SET value = 'torn'")
print("written", flush=True)
time.sleep(600)
"""


def test_a_killed_writer_leaves_no_lock_and_no_part(tmp_path):
    batch = pad([Rows()[index] for index in range(8)])
    cache = TeacherCache.of(teacher(), str(tmp_path), LAYOUT)
    FixedTeacher(teacher(), WantedSignals((2,)), cache=cache).forward(batch)
    cache._database.close()
    writer = start("-c", _WRITER, tmp_path / "outputs.sqlite")
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert (tmp_path / "outputs.sqlite-journal").stat().st_size > 1000, "the writer shall die in the middle"
    again = TeacherCache.of(teacher(), str(tmp_path), LAYOUT)
    assert len(again) == 8
    assert again.read(example_keys({k: v for k, v in batch.items() if k != "labels"}), batch) is not None


def test_a_cache_that_another_process_holds_is_named(tmp_path, monkeypatch):
    TeacherCache(str(tmp_path), "f", {})
    monkeypatch.setattr("hf_compress.training.cache._PATIENCE", 0.1)
    holder = sqlite3.connect(tmp_path / "outputs.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ValueError, match=f"teacher_cache_dir '{tmp_path}' cannot be used: database is locked"):
        TeacherCache(str(tmp_path), "f", {})
    holder.close()
