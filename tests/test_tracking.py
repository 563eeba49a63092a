"""Losses reach the trackers that `report_to` names: wandb offline, TensorBoard's neighbours through the same log."""

import json

import pytest

import hf_compress as hc


ROWS = [{"input_ids": [5 + i % 7, 6, 7], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(16)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb's own imports
def test_wandb_offline(model, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    original = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda run, data, *a, **k: (seen.append(dict(data)), original(run, data, *a, **k)),
    )
    student, teacher = model("bert", "sequence_classification"), model("bert", "sequence_classification")
    hc.compress(student, hc.LinformerConfig(projected_length=4))
    args = hc.JointTeacherArguments(
        str(tmp_path / "out"), max_steps=3, logging_steps=1, report_to="wandb", alpha_layer=1.0, use_cpu=True,
        save_strategy="no", save_teacher=False, disable_tqdm=True,
    )  # fmt: skip
    hc.JointTeacherTrainer(model=student, teacher_model=teacher, args=args, train_dataset=ROWS).train()
    wandb.finish()
    logged = [entry for entry in seen if "train/loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert {"train/loss/task", "train/loss/output", "train/loss/layer", "train/loss/teacher"} <= set(entry)
        assert "train/teacher_learning_rate" in entry
        parts = sum(entry[f"train/loss/{name}"] for name in ("task", "output", "layer"))
        assert entry["train/loss"] == pytest.approx(parts, rel=1e-3)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")), "nothing was written"
    assert json.dumps(logged[0])
