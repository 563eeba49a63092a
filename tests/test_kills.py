"""Each trainer killed twice at random moments, alone and as two processes: nothing is torn, the end is the same."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_compress.training.checkpoints import checkpoints_of, defect
from tests import crash_program
from tests.two_processes import fork_server, free_port


# More rounds by hand: KILL_ROUNDS=8 KILL_SEED=1 pytest -m slow tests/test_kills.py
ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))
SEED = int(os.environ.get("KILL_SEED", "0"))


@pytest.fixture(scope="module")
def server():
    return fork_server()


def _start(server, folder: Path, kind: str, processes: int, endless: bool = False) -> list:
    folder.mkdir(parents=True, exist_ok=True)
    port = None
    if processes > 1:
        port = free_port()
    started = [
        server.Process(target=crash_program.train, args=(str(folder), kind, rank, port, endless))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def _finish(started: list) -> None:
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0] * len(started)


def _progress(folder: Path) -> int:
    try:
        return int((folder / "progress").read_text() or 0)
    except FileNotFoundError:
        return 0


def _last(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints_of(folder)), default=0)


def _kill(started: list, folder: Path, update: int, rng: random.Random) -> None:
    """Kill all processes of an endless training at a random moment after an update."""
    deadline = time.time() + 120
    while _progress(folder) < update and all(process.is_alive() for process in started) and time.time() < deadline:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.06)
    # One first: the others may be in the middle of a save, or waiting for it.
    rng.shuffle(started)
    for process in started:
        process.kill()
    for process in started:
        process.join(60)
    (folder / "progress").unlink(missing_ok=True)
    assert [process.exitcode for process in started] == [-9] * len(started)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", crash_program.KINDS)
def test_two_kills_leave_no_trace(tmp_path, server, kind, processes):
    begun = time.time()
    _finish(_start(server, tmp_path / "whole", kind, processes))
    expected = torch.load(tmp_path / "whole" / "final.pt")
    resumed_from = []
    for number in range(ROUNDS):
        folder, rng = tmp_path / f"round{number}", random.Random(f"{SEED} {kind} {processes} {number}")
        # The first round surely resumes; in others the kill may come before the first checkpoint.
        update = rng.randint(1 if number else 3, 8)
        for _ in range(2):
            _kill(_start(server, folder, kind, processes, endless=True), folder, update, rng)
            for checkpoint in checkpoints_of(folder):
                assert defect(checkpoint, processes) is None, checkpoint
                AutoModelForSequenceClassification.from_pretrained(checkpoint)
            resumed_from.append(_last(folder))
            update = min(_last(folder) + rng.randint(1, 3), 11)
        _finish(_start(server, folder, kind, processes))
        found = torch.load(folder / "final.pt")
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == [], folder
        assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-10", "checkpoint-12"]
        left = {path.name for path in folder.iterdir() if path.name[0] in "._"}
        assert not left, left
    print(f"{kind}, {processes}: {ROUNDS} rounds, resumed from {resumed_from}, {time.time() - begun:.0f} s")
