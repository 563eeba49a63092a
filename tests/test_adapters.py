"""Adapters on pruned models: trained, saved and opened again, or announced as impossible to open."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import Rows, pad


ROWS = [Rows()[index] for index in range(8)]


# peft asks transformers for an attribute that is about to be renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("base", ["in memory", "saved"])
def test_an_adapter_knows_its_base(tmp_path, model, batches, caplog, base):
    model("bert", "sequence_classification").save_pretrained(tmp_path / "dense")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    hc.compress(student, hc.StructuredPruningConfig(mac_ratio=0.5, seq_len=16), data=batches(student.config, count=2))
    if base == "saved":
        student.save_pretrained(tmp_path / "pruned")
        student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    adapted = get_peft_model(student, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    args = hc.DistillationArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True,
                                    max_steps=1, save_strategy="no", alpha_output=0.0)  # fmt: skip
    trainer = CompressionTrainer(adapted, args, train_dataset=ROWS, data_collator=pad)
    trainer.train()
    trainer.save_model()
    warned = "not the compressed model that it is trained on" in caplog.text
    assert warned == (base == "in memory")
    if base == "saved":
        opened = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run")
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, opened.state_dict()[name]), name
