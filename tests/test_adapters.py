"""Adapters on pruned models: trained, saved and opened again, or announced as impossible to open."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import Rows, pad
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


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


CONFIGS = {
    "structured_pruning": hc.StructuredPruningConfig(mac_ratio=0.5, seq_len=16),
    "linformer": hc.LinformerConfig(projected_length=4),
    "token_pruning": hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.5),
    "layer_selection": hc.LayerSelectionConfig(layers=[1]),
}


def merged_by_hand(adapted):
    """Name -> the base's weight and the scaled product of an adapter's matrices."""
    found, base = {}, adapted.base_model.model.state_dict()
    for name, value in base.items():
        plain = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        if "original_module" in name or "lora_" in name:
            continue
        if f"{plain.removesuffix('.weight')}.lora_A.default.weight" in base:
            one, other = (base[f"{plain.removesuffix('.weight')}.lora_{part}.default.weight"] for part in "AB")
            value = value + adapted.peft_config["default"].lora_alpha / adapted.peft_config["default"].r * other @ one
        found[plain] = value.clone()
    return found


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("method", CONFIGS)
def test_recovered_by_adapters_and_merged(tmp_path, model, batches, method):
    """The teacher's terms reach the adapters; merged, the model is an ordinary compressed one."""
    student, teacher = model("bert", "sequence_classification"), model("bert", "sequence_classification")
    hc.compress(student, CONFIGS[method], data=batches(student.config, count=2))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    adapted = get_peft_model(student, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    args = hc.DistillationArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True,
                                    max_steps=2, save_strategy="no", alpha_task=0.0, learning_rate=1e-2)  # fmt: skip
    trainer = hc.DistillationTrainer(adapted, teacher, args, train_dataset=ROWS, data_collator=pad)
    trainer.train()
    batch = {name: value for name, value in pad(ROWS).items() if name != "labels"}
    with torch.no_grad():
        expected, weights = adapted.eval()(**batch).logits, merged_by_hand(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert [step["method"] for step in hc.steps_of(opened)] == [method]
    for name, value in opened.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name
    found = {name: value for name, value in opened.state_dict().items() if value.is_floating_point()}
    for name, value in found.items():
        assert_equal_to_rounding(value, weights[name])
    changed = {name for name, value in found.items() if differ_beyond_rounding(value, before[name])}
    # A head is trained whole with this task of PEFT.
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} >= {"query", "value"}
    assert all({"query", "value", "classifier"} & set(name.split(".")) for name in changed)
    with torch.no_grad():
        assert_equal_to_rounding(opened(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merging_fills_zeros_and_the_model_says_so(tmp_path, model, batches, caplog):
    student = model("bert", "sequence_classification")
    hc.compress(student, hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude"))
    adapted = get_peft_model(student, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    args = hc.DistillationArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True,
                                    max_steps=2, save_strategy="no", alpha_output=0.0, learning_rate=1e-2)  # fmt: skip
    CompressionTrainer(adapted, args, train_dataset=ROWS, data_collator=pad).train()
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert "trained without holding its zeros" in caplog.text
