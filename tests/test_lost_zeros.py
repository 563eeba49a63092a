"""A pruned model that was trained without its zeros says so when it is opened."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import Rows, pad


ROWS = [Rows()[index] for index in range(16)]
CONFIGS = {
    "2:4": [hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude")],
    "blocks": [hc.WeightPruningConfig(pattern="4x1", target_sparsity=0.75, criterion="magnitude")],
    # Layers have unequal widths then, so that a share of their channels is another share of their weights.
    "channels of pruned layers": [
        hc.StructuredPruningConfig(mac_ratio=0.3, ridge=0.01),
        hc.WeightPruningConfig(pattern="channelx1", target_sparsity=0.5, criterion="magnitude")],
    "then tokens": [
        hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude"), hc.TokenPruningConfig()],
    "then heads": [
        hc.WeightPruningConfig(pattern="4x1", target_sparsity=0.25, criterion="magnitude"),
        hc.StructuredPruningConfig(mac_ratio=0.5, selection="magnitude", seq_len=16)],
}  # fmt: skip


def trained(folder, trainer_class, model, callbacks=()):
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=2,
                             save_strategy="no", learning_rate=1e-2)  # fmt: skip
    trainer = trainer_class(model, args, train_dataset=ROWS, data_collator=pad, callbacks=list(callbacks))
    trainer.train()
    trainer.save_model()
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("configs", CONFIGS)
def test_only_a_training_without_zeros_is_reported(tmp_path, model, batches, caplog, configs):
    start = model("bert", "sequence_classification")
    pruned = hc.compress(start, *CONFIGS[configs], data=batches(start.config, count=2))
    pruned.save_pretrained(tmp_path / "pruned")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned", dtype=torch.bfloat16)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    trained(tmp_path / "ours", CompressionTrainer, again)
    if configs != "then tokens":
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
        trained(tmp_path / "held", Trainer, again, [hc.HeldZerosCallback()])
    assert "without holding" not in caplog.text
    if configs != "then heads":
        trained(tmp_path / "stock", Trainer, pruned)
        assert "trained without holding its zeros" in caplog.text
        assert "HeldZerosCallback" in caplog.text
