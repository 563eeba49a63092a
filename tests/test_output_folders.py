"""No command writes over a model that it reads, and one that cannot write says so before any work."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from hf_compress.cli.main import main
from tests.test_bad_input import write_model


DATA = "--data_dir data --max_length 16"
TRAINED = f"{DATA} --use_cpu --max_steps 1"
COMMANDS = {
    "finetune": ("--model_name_or_path", TRAINED),
    "distill": ("--model_name_or_path", f"{TRAINED} --teacher_name_or_path other"),
    "distill from": ("--teacher_name_or_path", f"{TRAINED} --model_name_or_path other"),
    "joint-distill": ("--model_name_or_path", f"{TRAINED} --teacher_name_or_path other"),
    "joint-distill from": ("--teacher_name_or_path", f"{TRAINED} --model_name_or_path other"),
    "snapshot-distill": ("--model_name_or_path", f"{TRAINED} --teacher_snapshots other"),
    "snapshot-distill from": ("--teacher_snapshots", f"{TRAINED} --model_name_or_path other"),
    "prune-tokens": ("--model_name_or_path", TRAINED),
    "prune-weights": ("--model_name_or_path", TRAINED),
    "prune-weights from": ("--teacher_name_or_path", f"{TRAINED} --model_name_or_path other"),
    "prune-weights at once": ("--model_name_or_path", f"{DATA} --use_cpu --num_train_epochs 0 --criterion magnitude"),
    "prune-structure": ("--model_name_or_path", f"{DATA} --calibration_samples 64"),
    "linearize": ("--model_name_or_path", "--projected_length 4"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    write_model(root / "model")
    shutil.copytree(root / "model", root / "other")
    (root / "data").mkdir()
    rows = [f"{'good' if i % 2 else 'bad'} w{i % 90}\t{i % 2}" for i in range(64)]
    for split in ("train", "validation"):
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (root / "file").write_text("a file, not a folder")
    return root


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("output", ["model", "./model/", "other/../model"])
@pytest.mark.parametrize("name", COMMANDS)
def test_inputs_are_not_overwritten(place, monkeypatch, capsys, name, output):
    monkeypatch.chdir(place)
    flag, rest = COMMANDS[name]
    before = contents(place)
    assert main([name.split()[0], flag, "model", "--output_dir", output, *rest.split()]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "would overwrite it" in last
    assert flag[2:] in last
    assert contents(place) == before


def test_a_joint_teacher_does_not_lie_where_the_trained_one_goes(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "run").mkdir()
    shutil.copytree(place / "model", place / "run" / "teacher")
    before = contents(place)
    line = f"joint-distill --model_name_or_path model --teacher_name_or_path run/teacher --output_dir run {TRAINED}"
    assert main(line.split()) == 2
    assert "would overwrite it" in capsys.readouterr().err
    assert contents(place) == before


def test_a_report_that_cannot_be_written_is_refused_before_any_model_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("hf_compress.stages.report.opened_task", None)
    assert main(f"report --models model other --output_dir file/deeper {DATA}".split()) == 2
    assert "is a file" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_unusable_outputs_are_found_before_any_work(place, monkeypatch, capsys, name):
    monkeypatch.chdir(place)
    monkeypatch.setattr("hf_compress.stages.training.load_task", None)
    monkeypatch.setattr("hf_compress.stages.models.load_task", None)
    monkeypatch.setattr("hf_compress.stages.linearize.open_pair", None)
    flag, rest = COMMANDS[name]
    assert main([name.split()[0], flag, "model", "--output_dir", "file/deeper", *rest.split()]) == 2
    assert "is a file" in capsys.readouterr().err.strip().splitlines()[-1]
