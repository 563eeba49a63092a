"""Killing processes: resumed training equals unbroken training to the bit, and no half-written model opens."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from hf_compress.core.saving import complete_or_absent
from tests import crash_program


@pytest.fixture(scope="module")
def processes():
    """A clean server process that has imported everything; each training forks from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.crash_program", "transformers.trainer", "hf_compress.training.distillation"]
    )
    return context


def _start(processes, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    process = processes.Process(target=crash_program.train, args=(str(folder),))
    process.start()
    return process


def _steps(folder: Path) -> int:
    try:
        return int((folder / "progress").read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def test_killed_five_times_equals_unbroken(tmp_path, processes):
    whole = tmp_path / "whole"
    process = _start(processes, whole)
    process.join(120)
    assert process.exitcode == 0
    expected = torch.load(whole / "final.pt")

    broken, rng = tmp_path / "broken", random.Random(0)
    for kill in range(5):
        before = max((int(c.name.rpartition("-")[2]) for c in broken.glob("checkpoint-*")), default=0)
        process = _start(processes, broken)
        target = min(before + rng.randint(1, 3), 11)
        deadline = time.time() + 60
        while _steps(broken) in range(target) and process.is_alive() and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join(30)
        assert process.exitcode == -9, f"kill {kill} came too late"
        (broken / "progress").unlink(missing_ok=True)
        for checkpoint in broken.glob("checkpoint-*"):
            # Every checkpoint that stands under its name is whole.
            BertForSequenceClassification.from_pretrained(checkpoint)
            assert {
                "optimizer.pt",
                "scheduler.pt",
                "rng_state.pth",
                "trainer_state.json",
                "projectors.safetensors",
            } <= {file.name for file in checkpoint.iterdir()}
    assert list(broken.glob("checkpoint-*")), "no kill came after a checkpoint"
    process = _start(processes, broken)
    process.join(120)
    assert process.exitcode == 0
    resumed = torch.load(broken / "final.pt")
    assert resumed.keys() == expected.keys()
    assert any(name.endswith("prune_score") for name in expected)
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_projectors_are_trained_but_not_saved_with_the_student(tmp_path, processes):
    process = _start(processes, tmp_path / "run")
    process.join(120)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    final = torch.load(tmp_path / "run" / "final.pt")
    assert not any("map" in name or "prune" in name for name in saved)
    assert (saved["bert.encoder.layer.0.output.dense.weight"].view(16, -1, 4) == 0).sum(2).eq(2).all()
    first = load_file(sorted((tmp_path / "run").glob("checkpoint-*"))[0] / "projectors.safetensors")
    assert any(not torch.equal(first[k], final[f"map.{k}"]) for k in first)


@pytest.mark.parametrize("moment", range(4))
def test_crash_while_saving_leaves_nothing_that_opens(tmp_path, monkeypatch, moment):
    """The process dies after `moment` files were moved into place over an older, complete model."""
    model = crash_program.build(16, 1, 0)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("old")
    moved = []

    def dying(source, target, real=shutil.move):
        if len(moved) == moment:
            raise KeyboardInterrupt
        moved.append(target)
        real(source, target)

    monkeypatch.setattr("hf_compress.core.saving.os.replace", dying)

    def save():
        with complete_or_absent(tmp_path) as staged:
            crash_program.build(16, 1, 1).save_pretrained(staged)
            (staged / "tokenizer.json").write_text("new")
            (staged / "results.json").write_text("{}")

    with pytest.raises(KeyboardInterrupt):
        save()
    with pytest.raises(OSError, match="no file named"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_failed_writing_keeps_the_old_model(tmp_path):
    model = crash_program.build(16, 1, 0)
    model.save_pretrained(tmp_path)

    def save():
        with complete_or_absent(tmp_path) as staged:
            crash_program.build(16, 1, 1).save_pretrained(staged)
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        save()
    reopened = BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(reopened.classifier.weight, model.classifier.weight)
    assert not (tmp_path / ".incomplete").exists()
