"""Saved models with a damaged config or other weights are refused in one line, and no pattern in one hangs."""

import json
import shutil
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.core.expressions import check_expressions
from hf_compress.stages.models import has_head, open_model


HEAD = "sequence_classification"
STEPS = {
    "structured": lambda: hc.StructuredPruningConfig(mac_ratio=0.6),
    "weights": lambda: hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude"),
    "linear": lambda: hc.LinformerConfig(projected_length=8),
}


@pytest.fixture
def folder(model, batches, tmp_path):
    """`folder(name, edit=..., weights=...)`: a saved model whose config.json and weights were changed."""

    def make(name, edit=None, weights=None):
        small = model("bert", HEAD)
        hc.compress(small, STEPS[name](), data=batches(small.config)).save_pretrained(tmp_path)
        if edit is not None:
            config = json.loads((tmp_path / "config.json").read_text())
            edit(config)
            (tmp_path / "config.json").write_text(json.dumps(config))
        if weights is not None:
            saved = {key: weights(key, value) for key, value in load_file(tmp_path / "model.safetensors").items()}
            save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def record(**fields):
    return lambda config: config["quantization_config"].update(fields)


def step(**fields):
    return lambda config: config["quantization_config"]["steps"][0].update(fields)


# What was done to config.json -> method, change, message.
CONFIGS = {
    "method is a list": ("structured", step(method=["a"]), r"Step 0: method must be one of .*got \['a'\]"),
    "method is a dict": ("structured", step(method={"a": 1}), "Step 0: method must be one of"),
    "extra field": ("structured", record(rank=1), "must hold quant_method, version and steps, got 'rank' in it"),
    "version is a bool": ("structured", record(version=True), "The record has version True"),
    "version zero": ("structured", record(version=0), "The record has version 0"),
    "wider": ("structured", lambda c: c.update(hidden_size=64), "do not fit config.json and its record"),
    "more heads": ("structured", lambda c: c.update(num_attention_heads=8), "do not fit config.json and its record"),
    "other slots": ("linear", step(projected_length=16), "do not fit config.json .*projection.keys has shape"),
    "slots beyond memory": ("linear", step(projected_length=10**12), "projected_length must be at most 1048576"),
    "tokens beyond memory": ("linear", step(max_tokens=10**12), "max_tokens must be at most 1048576"),
    "another pattern": ("weights", step(pattern="foo"), "is broken: pattern must be 'N:M'"),
    "pattern is a list": ("weights", step(pattern=["2:4"]), "is broken: pattern must be str"),
    "slow expression": ("weights", step(op_names=["(.|.)+[!?]"]), r"takes more than 0.2 s on the name 'bert"),
    "slow exclusion": ("weights", step(excluded_op_names=["((.|.)+)+[!?]"]), "takes more than 0.2 s"),
    "slow local expression": (
        "weights", step(local_configs=[{"op_names": ["(.|.)+[!?]"]}]), "takes more than 0.2 s",
    ),
    "huge expression": ("weights", step(op_names=["(?:a|b|ab){500000}"]), "repeat nothing more than 1000 times"),
    "nested counts": ("weights", step(op_names=["(((a?){50}){50}){50}"]), "repeat nothing more than 1000 times"),
    "no expression": ("weights", step(op_names=["("]), "must be regular expressions"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CONFIGS))
def test_damaged_config(folder, case):
    name, edit, message = CONFIGS[case]
    place = folder(name, edit)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForSequenceClassification.from_pretrained(place)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        open_model(str(place))
    assert time.process_time() - start < 10


@pytest.mark.parametrize("value", ["hf_compress", ["hf_compress"]])
def test_a_record_that_is_no_dict(folder, value):
    """transformers fails on it before this package is asked; the commands say so in one line."""
    place = str(folder("weights", lambda config: config.update(quantization_config=value)))
    for opening in (open_model, has_head):
        with pytest.raises(ValueError, match="config.json at .* is broken") as caught:
            opening(place)
        assert "\n" not in str(caught.value)
    config = AutoConfig.from_pretrained(folder("weights"))
    config.quantization_config = value
    with pytest.raises(ValueError, match="quantization_config must be a dict"):
        hc.steps_of(config)


def test_integers_for_weights(folder):
    place = folder("structured", weights=lambda key, value: (value * 9).to(torch.int8))
    with pytest.raises(ValueError, match="must be floating-point numbers, got I8 in bert.encoder.layer"):
        AutoModelForSequenceClassification.from_pretrained(place)


def test_weights_of_a_wider_model(folder):
    place = folder("structured", weights=lambda key, value: value.repeat_interleave(2, -1))
    with pytest.raises(ValueError, match=r"do not fit config.json and its record: .*\(and \d+ others\)"):
        AutoModelForSequenceClassification.from_pretrained(place)


def test_heads_may_still_be_replaced_on_purpose(folder):
    place = folder("structured")
    changed = AutoModelForSequenceClassification.from_pretrained(place, num_labels=5, ignore_mismatched_sizes=True)
    assert changed.classifier.out_features == 5
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert AutoModelForSequenceClassification.from_pretrained(place, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("expression", [
    "query", r"layer\.\d{1,2}\.attention", r"^(?!.*pooler)", r"encoder\.layer\.([0-9]|1[01])\.", "(?:key|value)$",
])  # fmt: skip
def test_ordinary_expressions_pass(expression):
    check_expressions("op_names", [expression])


@pytest.mark.parametrize("size", [10**12, 2**20 + 1])
@pytest.mark.parametrize("field", ["projected_length", "max_tokens"])
def test_sizes_beyond_memory(field, size):
    with pytest.raises(ValueError, match=f"{field} must be at most 1048576, got {size}"):
        hc.LinformerConfig(**{field: size})


# Checkpoints in the middle of a training, and the program that resumes them.
CHECKPOINTS = Path(__file__).parent / "data" / "4eb4f0e" / "checkpoints"
make = import_module("tests.data.4eb4f0e.make")


def _integers(checkpoint):
    saved = {name: (value * 9).to(torch.int8) for name, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(saved, checkpoint / "model.safetensors", metadata={"format": "pt"})


def _record_is_a_string(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": "hf_compress"}))


def _resumed_with(pattern, sparsity, **sizes):
    config = hc.WeightPruningConfig(
        pattern=pattern, target_sparsity=sparsity, pruning_frequency=2, start_step=1, end_step=7
    )

    def run(folder):
        trainer = make.RUNS["weights"](folder)
        return hc.CompressionTrainer(
            model=make.build(layers=1, **sizes), args=trainer.args, train_dataset=make.rows(),
            data_collator=make.pad, callbacks=[hc.WeightPruningCallback(config)],
        )  # fmt: skip

    return run


# What differs -> run, change of the checkpoint, the trainer that resumes, message.
RESUMED = {
    "fewer of four": ("weights", None, _resumed_with("1:4", 0.25), "written with another pattern than '1:4'"),
    "blocks": ("weights", None, _resumed_with("4x1", 0.5), "written with another pattern than '4x1'"),
    "wider model": (
        "weights",
        None,
        _resumed_with("2:4", 0.5, hidden_size=16),
        "its weights cannot be read: ",
    ),
    "integers": ("weights", _integers, make.RUNS["weights"], "must be floating-point numbers, got I8"),
    "integers of tokens": ("tokens", _integers, make.RUNS["tokens"], "must be floating-point numbers, got I8"),
    "record is a string": ("tokens", _record_is_a_string, make.RUNS["tokens"], "its config.json cannot be read"),
}


@pytest.mark.parametrize("case", list(RESUMED))
def test_checkpoints_that_do_not_fit(case, tmp_path):
    name, change, run, message = RESUMED[case]
    shutil.copytree(CHECKPOINTS / name, tmp_path / "run")
    if change is not None:
        change(tmp_path / "run" / "checkpoint-6")
    trainer = run(str(tmp_path / "run"))
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)


def test_the_same_pattern_resumes(tmp_path):
    shutil.copytree(CHECKPOINTS / "weights", tmp_path / "run")
    trainer = _resumed_with("2:4", 0.5)(str(tmp_path / "run"))
    trainer.train(resume_from_checkpoint=True)
    assert hc.steps_of(trainer.model)[0]["achieved_sparsity"] == 0.5
