"""The programs of docs/trainers.md run as they stand, with fewer steps and trials."""

import re
from pathlib import Path

import optuna
import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainingArguments

import hf_compress as hc
from tests.test_distilled_positions import batch_of, language_model


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "trainers.md").read_text()
ZEROS, JOINED, LORA, SEARCH = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HEAD = "sequence_classification"


def run(program, **names):
    exec(
        compile(program.replace("max_steps=500", "max_steps=2").replace("n_trials=10", "n_trials=2"), "page", "exec"),
        names,
    )
    return names


@pytest.fixture
def classifiers(model, batches, tokenizer, sentences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences[:16]]
    student, teacher = model("bert", HEAD), model("bert", HEAD)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(1.1)
    calibration = batches(student.config, count=2)
    return {"student": student, "teacher": teacher, "rows": rows, "calibration": calibration, "tokenizer": tokenizer}


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_zeros_by_a_callback(classifiers):
    args = TrainingArguments("out", max_steps=10, use_cpu=True, save_strategy="no", report_to="none")
    program = ZEROS.replace('"4x1"', '"4x1", pruning_frequency=1')
    run(program, **classifiers, model=classifiers["student"], args=args)
    pruned = AutoModelForSequenceClassification.from_pretrained("sparse")
    assert [step["method"] for step in hc.steps_of(pruned)] == ["weight_pruning"]
    # docs/saved_models.md says so.
    assert not Path("sparse", "README.md").exists()


def test_another_trainer(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    rows = [{name: value[i] for name, value in batch_of().items()} for i in range(3)]
    models = {"student": language_model("t5", 0), "teacher": language_model("t5", 1)}
    trainer = run(JOINED, **models, rows=rows, tokenizer=tokenizer)["trainer"]
    assert any("loss/output" in entry for entry in trainer.state.log_history)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_on_a_pruned_model(classifiers):
    pytest.importorskip("peft")
    found = run(LORA, **classifiers)
    assert hc.steps_of(found["model"]) == hc.steps_of(found["merged"])
    for name, value in found["merged"].state_dict().items():
        assert torch.equal(found["model"].state_dict()[name], value), name


@pytest.mark.filterwarnings("ignore:.*ExperimentalWarning")
def test_a_search(classifiers):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    best = run(SEARCH, **classifiers, held_out=classifiers["rows"][:8])["best"]
    assert best.objective > 0
    assert 0.5 <= best.hyperparameters["alpha_output"] <= 2.0
    assert 0.4 <= best.hyperparameters["mac_ratio"] <= 0.8
