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
from hf_compress.training.cache_shard import CacheShard
from hf_compress.training.fingerprints import example_keys, teacher_fingerprint
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teachers import FixedTeacher
from tests.cache_program import teacher, train_as
from tests.crash_program import Rows, pad
from tests.rounding import assert_equal_to_rounding
from tests.two_processes import fork_server, free_port


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


@pytest.mark.slow
def test_two_runs_share_one_cache(tmp_path):
    rounds = 20
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


def test_ranks_write_shards_of_their_own_and_read_all(tmp_path):
    """A second epoch, a stream, a run alone: what any rank has stored is not computed again."""
    cache, server = str(tmp_path / "cache"), fork_server()

    def begin(name, count, stream, folder):
        port = free_port()
        ranks = [
            server.Process(target=train_as, args=(str(tmp_path), name, rank, count, port, stream, folder))
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        return ranks

    def results(name, ranks):
        for process in ranks:
            process.join(300)
        assert [process.exitcode for process in ranks] == [0] * len(ranks)
        return [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(len(ranks))]

    live = begin("live", 2, False, None)
    cold = results("cold", begin("cold", 2, False, cache))
    for each in cold:
        # Eight batches of four in the first epoch, none in the second, where the ranks have other examples.
        assert each["teacher ran"] == [0] * 8
    shards = [CacheShard(tmp_path / "cache" / name, {}).keys() for name in ("outputs.sqlite", "outputs-1.sqlite")]
    assert [len(keys) for keys in shards] == [32, 32]
    assert not shards[0] & shards[1]
    assert_whole(tmp_path / "cache")
    later = {"stream": begin("stream", 2, True, cache), "alone": begin("alone", 1, False, cache)}
    for name, ranks in later.items():
        assert [each["teacher ran"] for each in results(name, ranks)] == [[]] * len(ranks)
    for key, value in results("live", live)[0]["weights"].items():
        assert_equal_to_rounding(cold[0]["weights"][key], value)
        assert torch.equal(cold[0]["weights"][key], cold[1]["weights"][key])


def test_an_example_that_another_rank_stored_keeps_its_outputs(tmp_path):
    """A batch with one new example is computed whole; what is known already is not written a second time."""

    def speaking(process):
        cache = TeacherCache(str(tmp_path), "f", LAYOUT, process)
        return FixedTeacher(teacher(), WantedSignals((2,)), cache=cache)

    first, second = speaking(0), speaking(1)
    rows = [Rows()[index] for index in range(3)]
    second.forward(pad(rows[:2]))
    first.forward(pad(rows[1:]))
    assert len(first.cache._own.keys()) == 1
    assert len(first.cache) == 3
    first.forward(pad(rows))
    second.forward(pad(rows))
    assert (first.cache.misses, second.cache.misses) == (2, 2)


def test_shards_of_other_teachers_are_refused(tmp_path):
    TeacherCache(str(tmp_path), "f", LAYOUT, process=1)
    with pytest.raises(ValueError, match="was made with another teacher"):
        TeacherCache(str(tmp_path), "g", LAYOUT)


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


@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_writer_leaves_no_lock_and_no_part(tmp_path, process):
    batch = pad([Rows()[index] for index in range(8)])
    cache = TeacherCache(str(tmp_path), teacher_fingerprint(teacher()), LAYOUT, process)
    FixedTeacher(teacher(), WantedSignals((2,)), cache=cache).forward(batch)
    cache._own.database.close()
    shard = tmp_path / ("outputs-1.sqlite" if process else "outputs.sqlite")
    writer = start("-c", _WRITER, shard)
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert shard.with_name(f"{shard.name}-journal").stat().st_size > 1000, "the writer shall die in the middle"
    again = TeacherCache.of(teacher(), str(tmp_path), LAYOUT)
    assert len(again) == 8
    assert again.read(example_keys({k: v for k, v in batch.items() if k != "labels"}), batch) is not None


def test_a_cache_that_another_process_holds_is_named(tmp_path, monkeypatch):
    TeacherCache(str(tmp_path), "f", {})
    monkeypatch.setattr("hf_compress.training.cache_shard._PATIENCE", 0.1)
    holder = sqlite3.connect(tmp_path / "outputs.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ValueError, match=f"teacher_cache_dir '{tmp_path}' cannot be used: database is locked"):
        TeacherCache(str(tmp_path), "f", {})
    holder.close()
