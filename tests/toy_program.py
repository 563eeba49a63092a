"""What a method outside of the package must do, run where such a method is installed: in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from output_gain import OutputGainConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments

import hf_compress as hc
from tests.crash_program import Rows, build, pad
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


def batch() -> dict[str, torch.Tensor]:
    rows = Rows()
    return {name: value for name, value in pad([rows[i] for i in range(8)]).items() if name != "labels"}


def compressed() -> transformers.PreTrainedModel:
    return hc.compress(build(16, 2, 0), OutputGainConfig(strength=0.2), data=[batch()])


def write(folder: Path) -> None:
    """Compress, rebuild, save, and note down what the model says."""
    model = compressed()
    assert [step["method"] for step in hc.steps_of(model)] == ["output_gain"]
    skeleton = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**model.config.to_dict()))
    hc.rebuild(skeleton).load_state_dict(model.state_dict(), strict=True)
    hc.compress(compressed(), hc.LinformerConfig(projected_length=4))
    with pytest.raises(ValueError, match="must not repeat output_gain"):
        hc.compress(compressed(), OutputGainConfig(), data=[batch()])
    with pytest.raises(ValueError, match="data must be given"):
        hc.compress(build(16, 2, 0), OutputGainConfig())
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        said = {"logits": model.eval()(**batch()).logits, **model.state_dict()}
    save_file({name: value.clone() for name, value in said.items()}, folder / "said.safetensors")


def read(folder: Path) -> None:
    """Open the model as anybody would, after one import."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    said = load_file(folder / "said.safetensors")
    with torch.no_grad():
        assert_equal_to_rounding(model.eval()(**batch()).logits, said.pop("logits"))
    assert all(torch.equal(value, said[name]) for name, value in model.state_dict().items())
    low = AutoModelForSequenceClassification.from_pretrained(folder / "model", gain_limit=0.1)
    assert low.config.gain_limit == hc.steps_of(low)[0]["gain_limit"] == 0.1
    with torch.no_grad():
        assert differ_beyond_rounding(low.eval()(**batch()).logits, model(**batch()).logits)
    # A file that lacks a gain is refused, although the class of the module is none of the package's.
    del said["bert.encoder.layer.1.output_gain.gain"]
    save_file(said, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output_gain\.gain"):
        AutoModelForSequenceClassification.from_pretrained(folder / "model")


def train(folder: Path) -> None:
    """Train with a term, a group and a callback of the method's own; resume bit-equal."""

    def trainer(model: transformers.PreTrainedModel, name: str) -> hc.CompressionTrainer:
        args = TrainingArguments(
            str(folder / name), max_steps=6, save_steps=2, logging_steps=1, per_device_train_batch_size=4,
            learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        return hc.CompressionTrainer(
            model=model, args=args, train_dataset=Rows(), eval_dataset=Rows(), data_collator=pad
        )

    whole = trainer(compressed(), "whole")
    whole.train()
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(logs) == 6
    assert all({"loss/task", "loss/gain", "prune/gain", "prune/mean_gain"} <= set(entry) for entry in logs)
    gains = [entry["prune/gain"] for entry in logs]
    assert gains[0] > gains[3] > 0
    assert gains[4] == gains[5]
    assert whole.optimizer.param_groups[-1]["initial_lr"] == 0.05
    assert len(whole.optimizer.param_groups[-1]["params"]) == 2
    assert "eval_mean_gain" in whole.evaluate()
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        saved = folder / "whole" / checkpoint
        again = trainer(AutoModelForSequenceClassification.from_pretrained(saved), f"resumed-{checkpoint}")
        again.train(resume_from_checkpoint=str(saved))
        expected = whole.model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    other = AutoModelForSequenceClassification.from_pretrained(saved, gain_limit=0.5)
    with pytest.raises(ValueError, match=r"trained with gain_limit=2\.0"):
        trainer(other, "other").train(resume_from_checkpoint=str(saved))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for part in sys.argv[2:]:
        {"write": write, "read": read, "train": train}[part](Path(sys.argv[1]))
    print(json.dumps(list(hc.METHODS)))
