"""Models and checkpoints of commit 4eb4f0e open with the same weights, compute the same and resume to the same end."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import hf_compress as hc


FOLDER = Path(__file__).parent / "data" / "4eb4f0e"
make = import_module("tests.data.4eb4f0e.make")


def assert_close(ours, theirs, name):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_every_method_has_a_file():
    steps = [
        step["method"]
        for name in make.MODELS
        for step in json.loads((FOLDER / "models" / name / "config.json").read_text())["quantization_config"]["steps"]
    ]
    assert {"structured_pruning", "linformer", "token_pruning", "weight_pruning"} == set(steps)


@pytest.mark.parametrize("name", list(make.MODELS))
def test_saved_model_opens(name):
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER / "models" / name)
    saved, loaded = load_file(FOLDER / "models" / name / "model.safetensors"), model.state_dict()
    assert saved.keys() <= loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert_close(make.logits(model), load_file(FOLDER / "logits.safetensors")[name], name)
    assert len(hc.steps_of(model)) == len(make.MODELS[name][2])


@pytest.mark.parametrize("name", list(make.RUNS))
def test_checkpoint_resumes_to_the_same_end(name, tmp_path):
    shutil.copytree(FOLDER / "checkpoints" / name, tmp_path / "run")
    trainer = make.RUNS[name](str(tmp_path / "run"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    ours, theirs = make.end_of(trainer), load_file(FOLDER / "ends" / f"{name}.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # Softmax ignores the bias of keys: its gradient is rounding noise, which Adam scales up to whole steps.
        if not key.endswith("key.bias"):
            assert_close(ours[key], value, key)
