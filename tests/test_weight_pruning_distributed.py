"""Two processes on the CPU: the same masks on both, and a resumed run that ends with the bits of the unbroken one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def launch(folder, resume=""):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed_program", str(folder), str(resume)],
        cwd=root, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same(first, second):
    first, second = torch.load(first), torch.load(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    return first


@pytest.mark.slow
def test_two_processes_agree_and_resume(tmp_path):
    launch(tmp_path)
    found = assert_same(tmp_path / "rank0.pt", tmp_path / "rank1.pt")
    masks = [value for name, value in found.items() if name.endswith(" pruned")]
    assert len(masks) == 12
    blocks = torch.cat([mask.view(len(mask) // 4, 4, -1).all(1).flatten() for mask in masks])
    assert int(blocks.sum()) == int(len(blocks) * 0.8)
    for name, value in found.items():
        if name.endswith(" pruned"):
            assert not found[name.removesuffix(" pruned")][value].any()
    launch(tmp_path, tmp_path / "checkpoints" / "checkpoint-4")
    assert_same(tmp_path / "rank0-resumed.pt", tmp_path / "rank1-resumed.pt")
    assert_same(tmp_path / "rank0.pt", tmp_path / "rank0-resumed.pt")
