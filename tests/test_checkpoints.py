"""Checkpoints: of one run, whole, in a folder of their own, on a disk that can hold them, without pickled code."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import pickletools
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import hf_compress as hc
from hf_compress.training import checkpoint_writer
from hf_compress.training.checkpoints import checkpoints_of, defect, last_whole_checkpoint
from hf_compress.training.trainer import CompressionTrainer
from tests import crash_program


class Interruption(BaseException):
    """What nothing in a training catches; pytest itself would end at a `KeyboardInterrupt`."""


class Stop(TrainerCallback):
    """A training that is interrupted after some updates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise Interruption


def trainer(folder, seed=0, steps=8, stop=None, model=None, rows=None, **options) -> CompressionTrainer:
    options = {"save_steps": 2, "save_total_limit": 2, "learning_rate": 1e-3} | options
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, use_cpu=True, report_to="none", seed=seed,
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no", save_strategy="steps",
        **options,
    )  # fmt: skip
    return CompressionTrainer(
        model=model or crash_program.build(16, 1, seed), args=args, train_dataset=crash_program.Rows(),
        data_collator=crash_program.pad, eval_dataset=rows, callbacks=[] if stop is None else [Stop(stop)],
    )  # fmt: skip


def train(*args, resume=None, **options) -> dict[str, torch.Tensor]:
    trained = trainer(*args, **options)
    trained.train(resume_from_checkpoint=resume)
    return trained.model.state_dict()


def interrupt(*args, resume=None, **options) -> None:
    with pytest.raises(Interruption):
        train(*args, resume=resume, **options)


def names(folder) -> list[str]:
    return [path.name for path in checkpoints_of(folder)]


def equal(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_earlier_run_neither_removes_nor_replaces_the_checkpoints_of_a_later_one(tmp_path, caplog):
    train(tmp_path / "both", seed=1, steps=32, save_steps=32)
    whole = train(tmp_path / "alone", seed=0)
    with caplog.at_level(logging.WARNING):
        interrupt(tmp_path / "both", seed=0, stop=5)
    assert "checkpoints of an earlier training (checkpoint-32)" in caplog.text
    assert names(tmp_path / "both") == ["checkpoint-2", "checkpoint-4"]
    resumed = trainer(tmp_path / "both", seed=0)
    resumed.train(resume_from_checkpoint=True)
    assert equal(whole, resumed.model.state_dict())
    assert names(tmp_path / "both") == ["checkpoint-6", "checkpoint-8"]


def test_a_run_without_a_checkpoint_does_not_take_those_of_an_earlier_one(tmp_path, caplog):
    earlier = train(tmp_path / "both", seed=1, steps=4)
    interrupt(tmp_path / "both", seed=0, stop=1)
    with caplog.at_level(logging.WARNING):
        later = train(tmp_path / "both", seed=0, resume=True)
    assert "['checkpoint-2', 'checkpoint-4'] in" in caplog.text
    assert equal(train(tmp_path / "alone", seed=0), later)
    assert not equal(earlier, later)


def test_a_refused_run_does_not_take_the_folder_from_the_earlier_one(tmp_path):
    whole = train(tmp_path / "alone")
    interrupt(tmp_path / "run", stop=5)
    with pytest.raises(ValueError, match="must be true or a checkpoint folder"):
        train(tmp_path / "run", seed=1, resume=str(tmp_path))
    assert equal(whole, train(tmp_path / "run", resume=True))


def test_going_back_to_an_earlier_checkpoint_begins_a_run_of_its_own(tmp_path):
    train(tmp_path / "run", save_total_limit=None)
    early = str(tmp_path / "run" / "checkpoint-2")
    expected = train(tmp_path / "other", resume=early, learning_rate=1e-2)
    interrupt(tmp_path / "run", resume=early, learning_rate=1e-2, stop=3, save_total_limit=None)
    # Nothing was saved since: it goes on from where it went back to, not from the end of the first.
    assert last_whole_checkpoint(tmp_path / "run") == Path(early)
    assert equal(expected, train(tmp_path / "run", resume=True, learning_rate=1e-2, save_total_limit=None))
    # From another folder, and interrupted before its first checkpoint.
    interrupt(tmp_path / "third", resume=early, learning_rate=1e-2, stop=3)
    assert equal(expected, train(tmp_path / "third", resume=True, learning_rate=1e-2))


def _damage(folder: Path, how: str) -> None:
    if how == "state":
        (folder / "trainer_state.json").unlink()
    elif how == "half a state":
        (folder / "trainer_state.json").write_text('{"epoch":')
    elif how == "no optimizer":
        (folder / "optimizer.pt").unlink()
    else:
        file = folder / how
        file.write_bytes(file.read_bytes()[:-9])


DAMAGES = ["state", "half a state", "no optimizer", "model.safetensors", "optimizer.pt", "scheduler.pt",
           "rng_state.pth"]  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A training that stopped after its third checkpoint, and what it would have come to."""
    folder = tmp_path_factory.mktemp("broken")
    interrupt(folder / "run", stop=7, save_total_limit=3)
    (folder / "run" / "checkpoint-best").mkdir()
    (folder / "run" / "checkpoint-8").write_text("a file")
    return folder / "run", train(folder / "whole")


@pytest.mark.parametrize("how", DAMAGES)
def test_the_last_whole_checkpoint_is_resumed_from(tmp_path, broken, how, caplog):
    run, whole = tmp_path / "run", broken[1]
    shutil.copytree(broken[0], run)
    _damage(run / "checkpoint-6", how)
    (run / "checkpoint-8").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint .*(cannot be read|must be true or a checkpoint)"):
        train(run, resume=str(run / "checkpoint-6"))
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(run) == run / "checkpoint-4"
    assert "checkpoint-6 is not resumed from" in caplog.text
    assert equal(whole, train(run, resume=True, save_total_limit=3))
    # Neither rotated nor taken for a checkpoint.
    assert (run / "checkpoint-best").is_dir()


def test_the_optimizer_of_other_parameters_is_refused(tmp_path, broken):
    shutil.copytree(broken[0], tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["param_groups"].append({**state["param_groups"][0], "params": [99]})
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"its optimizer and schedule cannot be read: it trains groups of \[.*, 1\]"):
        train(tmp_path / "run", resume=str(file.parent))


def test_a_random_state_for_every_process(broken):
    folder = broken[0] / "checkpoint-6"
    (folder / "rng_state_0.pth").write_bytes((folder / "rng_state.pth").read_bytes())
    # As earlier versions wrote it.
    note = json.loads((folder / "training_run.json").read_text())
    (folder / "training_run.json").write_text(json.dumps({name: note[name] for name in ("run", "files")}))
    assert defect(folder, 2) == "rng_state_1.pth is missing"
    assert defect(folder, 1) is None
    (folder / "rng_state_0.pth").unlink()
    (folder / "training_run.json").write_text(json.dumps(note))


def test_a_checkpoint_that_is_written_again_is_never_half_there(tmp_path, monkeypatch):
    train(tmp_path, steps=2)
    moves = []

    def watched(source, target, real=os.replace):
        moves.append((Path(source).name, Path(target).name))
        real(source, target)

    monkeypatch.setattr(checkpoint_writer.os, "replace", watched)
    train(tmp_path, steps=2)
    assert ("checkpoint-2", "removed-checkpoint-2") in moves
    assert moves.index(("checkpoint-2", "removed-checkpoint-2")) < moves.index(("checkpoint-2", "checkpoint-2"))
    assert not (tmp_path / ".incomplete").exists()


def test_the_best_checkpoint_is_spared_and_loaded(tmp_path):
    trained = trainer(
        tmp_path, rows=crash_program.Rows(), eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    evaluate = trained.evaluate
    scores = {2: 3.0, 4: 1.0}
    trained.evaluate = lambda *a, **k: evaluate(*a, **k) | {"eval_loss": scores.get(trained.state.global_step, 2.0)}
    trained.train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    assert trained.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
        tmp_path / "checkpoint-4"
    )
    assert equal(trained.model.state_dict(), load_file(tmp_path / "checkpoint-4" / "model.safetensors"))


def _code(file: Path) -> set[str]:
    """Names of classes and functions that a pickle would call."""
    content = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    found = [arg for op, arg, _ in pickletools.genops(content) if op.name == "GLOBAL"]
    return {name for name in found if not name.startswith(("torch", "numpy", "collections", "_codecs"))}


def test_nothing_written_is_pickled_code(tmp_path):
    trained = trainer(tmp_path, hub_token="secret")
    trained.train()
    trained.save_model(tmp_path / "model")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if path.name == "training_args.bin"]
    for folder in (tmp_path / "model", tmp_path / "checkpoint-8"):
        assert json.loads((folder / "training_args.json").read_text())["learning_rate"] == 1e-3
        assert "secret" not in (folder / "training_args.json").read_text()
    pickles = [path for path in written if path.suffix in (".pt", ".pth", ".bin")]
    assert len(pickles) >= 6
    assert {path.name: code for path in pickles if (code := _code(path))} == {}


def _train_in(folder: str, seed: int, barrier, outcomes) -> None:
    torch.set_num_threads(1)
    started = trainer(folder, seed=seed, save_total_limit=None)
    barrier.wait(60)
    try:
        started.train()
        outcomes.put((seed, "done"))
    except ValueError as error:
        outcomes.put((seed, str(error)))


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_trainings_at_once_in_one_folder(tmp_path, rounds):
    """The first one works as alone, the second is refused; where they did not meet, both work one after the other."""
    context = multiprocessing.get_context("fork")
    alone = {seed: train(tmp_path / f"alone{seed}", seed=seed) for seed in (0, 1)}
    for number in range(rounds):
        folder, barrier, outcomes = tmp_path / f"round{number}", context.Barrier(2), context.Queue()
        both = [context.Process(target=_train_in, args=(str(folder), seed, barrier, outcomes)) for seed in (0, 1)]
        for process in both:
            process.start()
        said = dict(outcomes.get(timeout=60) for _ in both)
        for process in both:
            process.join(60)
        worked = [seed for seed, outcome in said.items() if outcome == "done"]
        assert worked
        assert all("still running" in outcome for outcome in said.values() if outcome != "done")
        assert names(folder) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
        final = BertForSequenceClassification.from_pretrained(folder / "checkpoint-8").state_dict()
        assert any(equal(alone[seed], final) for seed in worked)
        assert not [path for path in folder.iterdir() if path.name[0] in "._"]


@pytest.mark.parametrize("place", ["out", "out/checkpoint-2"])
def test_the_folder_of_the_teacher_is_refused(tmp_path, place):
    crash_program.build(16, 1, 3).save_pretrained(tmp_path / place)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    distilling = hc.DistillationTrainer(
        model=crash_program.build(16, 1, 0),
        teacher_model=BertForSequenceClassification.from_pretrained(tmp_path / place),
        args=hc.DistillationArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none"),
        train_dataset=crash_program.Rows(), data_collator=crash_program.pad,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^output_dir .* teacher"):
        distilling.train()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_folder_of_the_model_is_refused_unless_training_goes_on(tmp_path):
    crash_program.build(16, 1, 0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^output_dir .* is the folder of the model"):
        train(tmp_path, model=BertForSequenceClassification.from_pretrained(tmp_path))
    train(tmp_path, model=BertForSequenceClassification.from_pretrained(tmp_path), resume=True)


def test_a_joint_teacher_is_not_overwritten_by_itself(tmp_path):
    crash_program.build(16, 1, 3).save_pretrained(tmp_path / "teacher")
    joint = hc.JointTeacherTrainer(
        model=crash_program.build(16, 1, 0),
        teacher_model=BertForSequenceClassification.from_pretrained(tmp_path / "teacher"),
        args=hc.JointTeacherArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none"),
        train_dataset=crash_program.Rows(), data_collator=crash_program.pad,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^output_dir .*teacher' is the folder of the teacher"):
        joint.train()


def test_the_series_of_teachers_is_not_rotated_away(tmp_path):
    saved_states = [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    for seed, place in enumerate(saved_states):
        crash_program.build(16, 1, seed).save_pretrained(place)
    climbing = hc.SnapshotTeacherTrainer(
        model=crash_program.build(16, 1, 0),
        args=hc.SnapshotTeacherArguments(
            str(tmp_path), max_steps=2, use_cpu=True, report_to="none", teacher_snapshots=saved_states
        ),
        train_dataset=crash_program.Rows(), data_collator=crash_program.pad,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^output_dir .* holds the teacher's state 0 \(.*checkpoint-1\)"):
        climbing.train()


@pytest.mark.parametrize("fits", ["student", "nothing"])
def test_a_joint_training_saves_the_student_first(tmp_path, monkeypatch, fits):
    student, teacher = crash_program.build(16, 1, 0), crash_program.build(16, 1, 3)
    joint = hc.JointTeacherTrainer(
        model=student, teacher_model=teacher,
        args=hc.JointTeacherArguments(
            str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no"
        ),
        train_dataset=crash_program.Rows(), data_collator=crash_program.pad,
    )  # fmt: skip

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, None)

    monkeypatch.setattr(teacher, "save_pretrained", full)
    if fits == "nothing":
        monkeypatch.setattr(student, "save_pretrained", full)
    message = "^The student is saved, the teacher is not: output_dir" if fits == "student" else "^output_dir"
    with pytest.raises(ValueError, match=message + r" '.*' cannot be written: No space left on device\.$"):
        joint.train()
    if fits == "student":
        assert equal(student.state_dict(), BertForSequenceClassification.from_pretrained(tmp_path).state_dict())
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name or "lock" in path.name]


class Disk(tuple):
    """What `shutil.disk_usage` gives for a disk with some bytes free."""

    free = property(lambda self: self[2])


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"save_total_limit": None}, 4),
        ({"save_total_limit": None, "save_steps": 3}, 3),
        ({"save_total_limit": 2}, 3),
        ({"save_total_limit": 7}, 4),
        ({"save_total_limit": 2, "save_only_model": True}, 3),
        ({"save_total_limit": 2, "optim": "sgd"}, 3),
    ],
)
def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_first_step(tmp_path, monkeypatch, options, number):
    model = crash_program.build(16, 1, 0)
    weights = sum(p.numel() * 4 for p in model.parameters())
    moments = 0 if "save_only_model" in options or "optim" in options else 2
    needed = number * weights * (1 + moments)
    for free in (needed - 1, needed):
        monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda folder, free=free: Disk((free, 0, free)))
        if free < needed:
            with pytest.raises(ValueError, match=f"the {number} checkpoints of this training need at least"):
                train(tmp_path, model=model, stop=0, **options)
        else:
            interrupt(tmp_path, model=model, stop=0, **options)


class Fill(TrainerCallback):
    """Something else takes the last of the disk before the second checkpoint."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 4:
            filler = Path(args.output_dir).parent / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))


def test_a_disk_that_is_really_full_costs_one_checkpoint(tmp_path, small_disk):
    disk = small_disk(1000)
    started = trainer(disk / "run")
    started.add_callback(Fill())
    with pytest.raises(ValueError, match=r"^output_dir '.*' cannot be written: No space left on device\.$"):
        started.train()
    # The folder of the run that had begun is free and clean.
    assert [path.name for path in (disk / "run").iterdir()] == ["checkpoint-2"]
    with pytest.raises(ValueError, match=r"^output_dir '.*' cannot be written: No space left on device\.$"):
        started.save_model(disk / "model")
    (disk / "filler").unlink()
    assert equal(train(disk / "run", resume=True), train(tmp_path / "whole"))


def test_a_checkpoint_is_pushed_when_it_is_whole(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, defect(Path(folder))))
    )
    started = trainer(tmp_path, steps=2)

    class Push(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            args.push_to_hub = True

    started.add_callback(Push())
    started.train()
    assert pushed == [(str(tmp_path / "checkpoint-2"), None)]


def test_a_disk_that_fills_up_costs_one_checkpoint(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, None)

    interrupt(tmp_path, stop=5)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"^output_dir '.*' cannot be written: No space left on device\.$"):
        train(tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.undo()
    assert equal(train(tmp_path, resume=True), train(tmp_path / "whole"))
