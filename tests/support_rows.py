"""The trainings of the support matrix: one short training for each trainer and callback, on models without dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests import crash_program


UPDATES = 6


@dataclass
class Row:
    """One training: which trainer, its fields, its models and callbacks."""

    trainer: type[Trainer]
    arguments: type[TrainingArguments]
    student: nn.Module
    models: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    callbacks: list[TrainerCallback] = field(default_factory=list)


def build(hidden: int, layers: int, seed: int) -> nn.Module:
    model = crash_program.build(hidden, layers, seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def _fine_tuning(shared: Path) -> Row:
    # Its zeros are held.
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude")
    return Row(CompressionTrainer, TrainingArguments, hc.compress(build(16, 2, 0), config))


def _distillation(shared: Path) -> Row:
    # Models of unlike width: maps between their hidden states are trained, too.
    models, fields = {"teacher_model": build(32, 4, 1)}, {"alpha_layer": 1.0}
    return Row(hc.DistillationTrainer, hc.DistillationArguments, build(16, 2, 0), models, fields)


def _snapshots(shared: Path) -> Row:
    folders = [shared / f"saved-{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(folders):
        if not folder.exists():
            build(32, 4, seed).save_pretrained(folder)
    fields = {"teacher_snapshots": [str(folder) for folder in folders]}
    return Row(hc.SnapshotTeacherTrainer, hc.SnapshotTeacherArguments, build(16, 2, 0), {}, fields)


def _joint(shared: Path) -> Row:
    models = {"teacher_model": build(32, 4, 1)}
    return Row(hc.JointTeacherTrainer, hc.JointTeacherArguments, build(16, 2, 0), models)


def _proximal(shared: Path) -> Row:
    # Heads of zeros would have nothing to learn from each other at first.
    fields = {"teacher_learning_rate": 1e-3, "zero_init_heads": False}
    models = {"teacher_model": build(32, 4, 1)}
    return Row(hc.ProximalTrainer, hc.ProximalArguments, build(16, 2, 0), models, fields)


def _weights(shared: Path) -> Row:
    config = hc.WeightPruningConfig(target_sparsity=0.5, pruning_frequency=1, start_step=1, end_step=4)
    callbacks: list[TrainerCallback] = [hc.WeightPruningCallback(config)]
    return Row(Trainer, TrainingArguments, build(16, 2, 0), callbacks=callbacks)


def _tokens(shared: Path) -> Row:
    student = hc.compress(build(16, 2, 0), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02))
    annealing = hc.ThresholdAnnealingCallback(2e-3, 1e-4, lambda_threshold=0.1, learning_rate=1e-3)
    models = {"teacher_model": build(32, 4, 1)}
    callbacks: list[TrainerCallback] = [annealing, hc.StageSwitchCallback(0.5)]
    return Row(hc.DistillationTrainer, hc.DistillationArguments, student, models, callbacks=callbacks)


# As the README names them -> the training, given a folder that trainings share.
ROWS: dict[str, Callable[[Path], Row]] = {
    "`CompressionTrainer`": _fine_tuning,
    "`DistillationTrainer`": _distillation,
    "`SnapshotTeacherTrainer`": _snapshots,
    "`JointTeacherTrainer`": _joint,
    "`ProximalTrainer`": _proximal,
    "`WeightPruningCallback`, stock `Trainer`": _weights,
    "`ThresholdAnnealingCallback`, `StageSwitchCallback`": _tokens,
}


@dataclass
class Trained:
    """What a training has left."""

    trainer: Trainer
    weights: dict[str, torch.Tensor]
    losses: list[float]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that is trained: the student, the maps between hidden states, and a teacher."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    parts = {"": model, "map.": getattr(trainer, "projectors", None)}
    if getattr(trainer, "teacher_model", None) is not None:
        parts["teacher."] = trainer.teacher_model
    return {
        f"{prefix}{name}": whole(value).detach().clone()
        for prefix, part in parts.items()
        if part is not None
        for name, value in trainer.accelerator.unwrap_model(part, keep_torch_compile=False).state_dict().items()
    }


def train(
    row: str, folder: Path, resume: str | None = None, adapt: Callable[[nn.Module], nn.Module] | None = None,
    rows: Any = None, callback: TrainerCallback | None = None, **changes: Any,
) -> Trained:  # fmt: skip
    """Train on the CPU, 8 examples an update.

    Args:
        row: Of `ROWS`.
        folder: For its files.
        resume: A checkpoint.
        adapt: Changes the student first.
        rows: The data set.
        callback: One more.
        changes: Fields of the arguments.
    """
    made = ROWS[row](folder.parent)
    student = adapt(made.student) if adapt else made.student
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "no", **made.fields}
    args = made.arguments(
        str(folder), max_steps=UPDATES, learning_rate=3e-3, weight_decay=0.1, report_to="none", disable_tqdm=True,
        use_cpu=True, seed=3, logging_steps=1, dataloader_pin_memory=False, **{**fields, **changes},
    )  # fmt: skip
    trainer = made.trainer(
        model=student, args=args, train_dataset=rows or crash_program.Rows(), data_collator=crash_program.pad,
        callbacks=[*made.callbacks, *([callback] if callback else [])], **made.models,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(trainer, weights_of(trainer), losses)
