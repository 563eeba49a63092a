"""Small trainings that tests start, kill and resume; everything in them is seeded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

import hf_compress as hc
from hf_compress.core.saving import complete_or_absent
from hf_compress.training.trainer import CompressionTrainer
from tests.two_processes import become_rank


class Rows(Dataset):
    """64 sequences of 4 to 12 ids; the label says whether the first id is even."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = []
        for _ in range(64):
            length = int(torch.randint(4, 13, (1,), generator=generator))
            ids = torch.randint(5, 99, (length,), generator=generator)
            self.rows.append({"input_ids": ids, "labels": int(ids[0] % 2)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def pad(features: list[dict]) -> dict:
    width = max(len(f["input_ids"]) for f in features)
    ids = torch.zeros(len(features), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, feature in enumerate(features):
        ids[row, : len(feature["input_ids"])] = feature["input_ids"]
        mask[row, : len(feature["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([f["labels"] for f in features])}


def build(hidden: int, layers: int, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=32,
    ))  # fmt: skip


class Progress(TrainerCallback):
    """Tells the parent process how far training is."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.file.write_text(str(state.global_step))


def _pieces(kind: str, out: Path) -> tuple[type, type, dict, dict, list]:
    """Trainer, arguments, its further fields, its models and the callbacks of a kind of training."""
    distils = {"alpha_layer": 1.0}
    pruning = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, pruning_frequency=2, start_step=1, end_step=9)
    student, teacher = build(16, 2, 0), build(32, 4, 1).eval()
    if kind == "compression":
        return CompressionTrainer, TrainingArguments, {}, {"model": student}, [hc.WeightPruningCallback(pruning)]
    if kind == "distillation":
        # Projectors, warm and cold cache.
        fields = {**distils, "teacher_cache_dir": str(out / "cache")}
        models = {"model": student, "teacher_model": teacher}
        return hc.DistillationTrainer, hc.DistillationArguments, fields, models, [hc.WeightPruningCallback(pruning)]
    if kind == "tokens":
        hc.compress(student, hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02))
        annealing = hc.ThresholdAnnealingCallback(2e-3, 1e-4, lambda_threshold=0.1, learning_rate=1e-3)
        models = {"model": student, "teacher_model": teacher}
        return hc.DistillationTrainer, hc.DistillationArguments, {}, models, [annealing]
    if kind == "joint":
        models = {"model": student, "teacher_model": teacher}
        return hc.JointTeacherTrainer, hc.JointTeacherArguments, distils, models, []
    if kind.startswith("proximal"):
        if kind == "proximal-bilstm":
            torch.manual_seed(0)
            student, distils = hc.BiLSTMForSequenceClassification(hc.BiLSTMConfig(
                vocab_size=99, embedding_size=16, hidden_size=8, num_layers=2, pad_token_id=0,
            )), {}  # fmt: skip
        fields = {"teacher_learning_rate": 1e-3, "prox_mode": "dual", "dual_epsilon": 0.01, "dual_learning_rate": 0.5}
        models = {"model": student, "teacher_model": teacher}
        return hc.ProximalTrainer, hc.ProximalArguments, {**distils, **fields}, models, []
    saved_states = [str(out.parent / f"saved_states-{seed}") for seed in (1, 2, 3)]
    for seed, place in enumerate(saved_states):
        if not Path(place).exists():
            with complete_or_absent(place) as staged:
                build(32, 4, seed).save_pretrained(staged)
    return (
        hc.SnapshotTeacherTrainer, hc.SnapshotTeacherArguments, {**distils, "teacher_snapshots": saved_states},
        {"model": student}, [],
    )  # fmt: skip


KINDS = ("compression", "distillation", "tokens", "joint", "proximal", "proximal-bilstm", "snapshots")


def train(
    folder: str, kind: str = "distillation", rank: int = 0, port: int | None = None, endless: bool = False
) -> None:
    """Train (dropout on) to the end, from the last whole checkpoint; with a port, as one of two processes.

    An endless training waits after its last update until it is killed: a fast machine could not miss it.
    """
    torch.set_num_threads(1)
    out = Path(folder)
    if port is not None:
        become_rank(rank, port)
    trainer_class, arguments, fields, models, callbacks = _pieces(kind, out)
    args = arguments(
        str(out), num_train_epochs=3, per_device_train_batch_size=8 if port is None else 4,
        gradient_accumulation_steps=2, learning_rate=1e-3, save_strategy="steps", save_steps=2, save_total_limit=2,
        report_to="none", disable_tqdm=True, use_cpu=True, seed=3, dataloader_pin_memory=False, logging_steps=4,
        train_sampling_strategy="group_by_length", **fields,
    )  # fmt: skip
    trainer = trainer_class(
        **models, args=args, train_dataset=Rows(), data_collator=pad,
        callbacks=[*callbacks, *([Progress(out / "progress")] if rank == 0 else [])],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    while endless:
        time.sleep(1)
    trainer.save_model()
    if rank:
        return
    weights = dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
    if getattr(trainer, "projectors", None) is not None:
        projectors = trainer.accelerator.unwrap_model(trainer.projectors).state_dict()
        weights.update({f"map.{name}": value for name, value in projectors.items()})
    if kind == "joint" or kind.startswith("proximal"):
        weights.update({f"teacher.{name}": value for name, value in trainer.teacher_model.state_dict().items()})
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        weights.update({f"{name} {key}": state[key] for key in ("prune_score", "pruned") if key in state})
    torch.save(weights, out / "final.incomplete")
    os.replace(out / "final.incomplete", out / "final.pt")
