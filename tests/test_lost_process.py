"""A training whose process dies ends soon and says so; half an environment of a launcher is refused at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_compress as hc
from hf_compress.core.launcher import LostProcess, check_launcher, lost_process_named
from hf_compress.stages.launched import join_processes
from tests import distributed_program as program
from tests.two_processes import fork_server, free_port


ROOT = Path(__file__).resolve().parents[1]


def last_line(file):
    return file.read_text().strip().splitlines()[-1]


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_training_ends_when_one_of_its_processes_dies(tmp_path, how):
    """Without a launcher that would end the others."""
    port, begun = free_port(), time.monotonic()
    started = [
        fork_server().Process(target=program.fail, args=("joint", str(tmp_path), rank, port, how)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [1, -9 if how == "killed" else 1], f"after {time.monotonic() - begun:.0f} s"
    assert "LostProcess: One of the 2 processes of this training has ended" in last_line(tmp_path / "rank0")
    if how == "raises":
        assert last_line(tmp_path / "rank1") == "OSError: The disk of this machine is gone."


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "raises"])
def test_torchrun_ends_a_training_when_one_of_its_processes_dies(tmp_path, how):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed_program", str(tmp_path), how],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    # In torchrun's list of failures, first or not.
    assert "(local_rank: 1)" in done.stderr, done.stderr


def test_errors_that_are_not_about_processes_stay_as_they_are():
    for number, error in (
        (2, RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        (1, RuntimeError("Broken pipe")),
    ):
        with pytest.raises(RuntimeError, match=str(error)) as found, lost_process_named(number):
            raise error
        assert not isinstance(found.value, LostProcess)


COMPLETE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(values):
        for name in COMPLETE:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "RANK=1, but not WORLD_SIZE"),
        ({**COMPLETE, "MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({**COMPLETE, "RANK": "2"}, "RANK must be below WORLD_SIZE"),
        ({**COMPLETE, "LOCAL_RANK": "2", "RANK": "0"}, "LOCAL_RANK not above RANK"),
        ({**COMPLETE, "WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is no number"),
    ],
)
def test_half_a_launcher_is_refused(environment, tmp_path, values, words):
    environment(values)
    with pytest.raises(ValueError, match=words):
        hc.DistillationArguments(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(
    "values", [{}, COMPLETE, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "-1"}, {"MASTER_ADDR": "127.0.0.1"}]
)
def test_a_launcher_and_none_are_fine(environment, values):
    environment(values)
    check_launcher()


def test_a_stage_without_a_training_refuses_half_a_launcher(environment):
    environment({"WORLD_SIZE": "two"})
    with pytest.raises(ValueError, match="which is no number"):
        join_processes("cpu")


def test_the_command_line_refuses_half_a_launcher(environment, tmp_path, capsys):
    from hf_compress.cli.main import main

    environment({"WORLD_SIZE": "2"})
    assert main(["finetune", "--model_name_or_path", "x", "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-compress: The environment has WORLD_SIZE=2, but not RANK")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("resume", [True, "named"])
def test_another_number_of_processes_is_refused(tmp_path, resume, pair):
    data, folder = program.rows(8), tmp_path / "out"
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    resume = str(folder / "checkpoint-1") if resume == "named" else resume
    program.train("states alone", str(folder), data, **options)
    with pytest.raises(
        AssertionError, match="was written by 1 process, and this training has 2: .* Start 1, or begin"
    ):
        pair.run(program.train, "states alone", str(folder), data, resume=resume, max_steps=2)
