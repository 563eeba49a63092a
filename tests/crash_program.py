"""A small distillation with weight pruning that tests start, kill and resume; everything in it is seeded."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

import hf_compress as hc


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


def train(folder: str) -> None:
    """Distil and prune (dropout on, projectors, warm and cold cache) to the end, from the last complete checkpoint."""
    out = Path(folder)
    args = hc.DistillationArguments(
        str(out), num_train_epochs=3, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-3,
        alpha_layer=1.0, save_steps=2, save_total_limit=2, report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
        teacher_cache_dir=str(out / "cache"), dataloader_pin_memory=False, logging_steps=4,
    )  # fmt: skip
    pruning = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, pruning_frequency=2, start_step=1, end_step=9)
    trainer = hc.DistillationTrainer(
        model=build(16, 2, 0), teacher_model=build(32, 4, 1).eval(), args=args, train_dataset=Rows(),
        data_collator=pad, callbacks=[hc.WeightPruningCallback(pruning), Progress(out / "progress")],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    weights = {**trainer.model.state_dict(), **{f"map.{k}": v for k, v in trainer.projectors.state_dict().items()}}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        weights.update({f"{name} {key}": state[key] for key in ("prune_score", "pruned") if key in state})
    torch.save(weights, out / "final.incomplete")
    os.replace(out / "final.incomplete", out / "final.pt")
