"""Snapshots of a teacher guide one after the other; runs with changing teachers resume as if never broken."""

import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.training import snapshots
from hf_compress.training.arguments import sort_snapshots
from hf_compress.training.snapshots import SnapshotTeacher
from tests.guided_setup import Watch, dense, linear, same, trained, trainer_of, weights


class Rung(nn.Module):
    device = torch.device("cpu")

    def __init__(self, folder):
        super().__init__()
        self.folder = folder


@pytest.mark.parametrize(("updates", "count", "table"), [
    (32740, 10, {0: 0, 3273: 0, 3274: 1, 6547: 1, 6548: 2, 29465: 8, 29466: 9, 32739: 9}),
    (100, 3, {0: 0, 32: 0, 33: 1, 65: 1, 66: 2, 98: 2, 99: 2}),
    (7, 7, {s: s for s in range(7)}),
])  # fmt: skip
def test_which_snapshot_guides_which_update(monkeypatch, updates, count, table):
    monkeypatch.setattr(snapshots, "open_snapshot", Rung)
    folders = [f"run/{i}" for i in range(count)]
    for order in (sorted(table), sorted(table, reverse=True)):
        saved_states = SnapshotTeacher(folders, Rung("run/0"))
        saved_states.set_length(updates)
        for step in order:
            saved_states.before_update(step)
            assert saved_states.model.folder == f"run/{table[step]}"
    with pytest.raises(ValueError, match=f"at most the {count - 1} updates of the training, got {count}"):
        SnapshotTeacher(folders, Rung("run/0")).set_length(count - 1)


def test_the_series_is_climbed_one_at_a_time(tmp_path, saved_states, monkeypatch):
    alive, opened, real = [], [], snapshots.open_snapshot

    def watched(folder):
        assert all(reference() is None for reference in alive), f"{folder} came while {opened} were there"
        model = real(folder)
        alive.append(weakref.ref(model))
        opened.append(folder.rpartition("-")[2])
        return model

    monkeypatch.setattr(snapshots, "open_snapshot", watched)
    trainer = trainer_of("snapshots", tmp_path, linear(0).double(), teacher_snapshots=[saved_states], ordered=True)
    guides = []
    trainer.add_callback(Watch(lambda _: guides.append(weights(trainer.teacher_model))))
    trainer.train()
    assert opened == ["2", "9", "10"]
    for step, guide in enumerate(guides):
        assert same(guide, weights(dense(11 + step // 2)))
    assert not trainer.teacher_model.training


def test_a_series_of_one_is_a_fixed_teacher(tmp_path):
    dense(1, 0.1).save_pretrained(tmp_path / "best")
    seen = trained("snapshots", tmp_path, linear(0, 0.1), teacher_snapshots=[str(tmp_path / "best")])
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best")
    assert same(seen, trained("fixed", tmp_path, linear(0, 0.1), teacher))


def test_order_and_errors_of_snapshots(tmp_path, saved_states):
    names = [f"run/epoch_{i}" for i in (0, 1, 10, 11, 2, 9)]
    assert sort_snapshots(names) == [f"run/epoch_{i}" for i in (0, 1, 2, 9, 10, 11)]
    assert sort_snapshots(["b", "a"]) == ["b", "a"]
    with pytest.raises(ValueError, match="all end in a number or none"):
        sort_snapshots(["epoch_1", "best"])

    def make(*names, **options):
        return hc.SnapshotTeacherArguments(str(tmp_path), use_cpu=True, teacher_snapshots=list(names), **options)

    assert [folder.rpartition("-")[2] for folder in make(saved_states).teacher_snapshots] == ["2", "9", "10"]
    for names in ((), (str(tmp_path / "nothing-*"),)):
        with pytest.raises(ValueError, match="at least one saved model"):
            make(*names)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(ValueError, match=f"{name}' without a config.json"):
            make(str(tmp_path / name))
    with pytest.raises(ValueError, match="teacher_model must not be given"):
        trainer_of("snapshots", tmp_path, linear(0), dense(1), teacher_snapshots=[saved_states])
    with pytest.raises(ValueError, match="at most the 2 updates of the training, got 3"):
        trainer_of("snapshots", tmp_path, linear(0), teacher_snapshots=[saved_states], max_steps=2).train()


@pytest.mark.parametrize("loss", ["model.safetensors", "labels"])
def test_a_later_snapshot_that_cannot_guide_is_refused_at_once(tmp_path, saved_states, loss):
    folder = tmp_path / "saved_states" / "checkpoint-10"
    if loss == "labels":
        dense(3, num_labels=3).save_pretrained(folder)
    else:
        (folder / loss).unlink()
    with pytest.raises(ValueError, match="checkpoint-10|labels"):
        trainer_of("snapshots", tmp_path, linear(0), teacher_snapshots=[saved_states], alpha_output=1.0)


MODES = {
    "unguided": ("fixed", {"alpha_layer": 0.0}),
    "target": ("fixed", {"teacher_dropout": True, "alpha_output": 1.0}),
    "hybrid": ("fixed", {"teacher_dropout": True, "max_distill_steps": 5}),
    "published": ("joint", {"compat": "cald", "teacher_update_cycle": 2}),
    "joint": ("joint", {"warmup_steps": 3}),
    "joint, cycle 2": ("joint", {"teacher_update_cycle": 2, "alpha_output": 1.0}),
    "snapshots": ("snapshots", {"teacher_dropout": True}),
}


# Update 4 ends an epoch.
@pytest.mark.parametrize(("mode", "every"), [*((mode, 3) for mode in MODES), ("joint", 4), ("joint, cycle 2", 5)])
def test_a_killed_run_ends_the_same(tmp_path, saved_states, mode, every):
    """Eight micro-batches and four updates an epoch, in random order, with dropout in both models."""
    kind, options = MODES[mode]
    options = {**options, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    options |= {"save_strategy": "steps", "save_steps": every, "weight_decay": 0.1}
    options |= {"teacher_snapshots": [saved_states]} if kind == "snapshots" else {}

    def build(folder, seed, look=None):
        given = None if kind == "snapshots" or mode == "unguided" else dense(1, 0.1)
        if kind == "joint" and seed:
            given = dense(5, 0.1)  # A resumed run takes the weights of both from the checkpoint.
        return trainer_of(kind, tmp_path / folder, linear(seed, 0.1), given, look, **options)

    def kill(step):
        if step == every + 1:
            raise InterruptedError

    whole = build("whole", 0)
    whole.train()
    assert whole.state.global_step == 8
    with pytest.raises(InterruptedError):
        build("killed", 0, kill).train()
    resumed = build("killed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / f"checkpoint-{every}"))
    assert same(weights(resumed.model), weights(whole.model))
    if mode != "unguided":
        assert same(weights(resumed.teacher_model), weights(whole.teacher_model))
    # The student's files hold the student alone.
    folder = tmp_path / "killed" / f"checkpoint-{every}"
    assert load_file(folder / "model.safetensors").keys() == whole.model.state_dict().keys()
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert len(moments) == len(list(whole.model.parameters()))
    assert (folder / "teacher").is_dir() == (kind == "joint")


def test_resuming_without_the_teacher_is_refused(tmp_path):
    trained("joint", tmp_path, linear(0), dense(1), save_strategy="steps", save_steps=3)
    (tmp_path / "checkpoint-3" / "teacher" / "training_state.pt").unlink()
    with pytest.raises(ValueError, match="must hold the teacher's state"):
        trainer_of("joint", tmp_path, linear(0), dense(1)).train(str(tmp_path / "checkpoint-3"))
