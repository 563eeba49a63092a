"""A model goes to the Hub and comes back: the real client against an endpoint on this machine."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import hf_compress as hc
from hf_compress.card_sections import citation_section, entry_of, measured_section, read_report
from hf_compress.cli.main import main
from hf_compress.core.cost import Cost
from hf_compress.core.pickles import is_pickle
from hf_compress.folder_card import card_text
from hf_compress.methods import METHODS
from hf_compress.report.table import Entry, build_report
from hf_compress.stages.saved import save_stage
from tests.fake_hub import TOKEN, FakeHub
from tests.rounding import assert_equal_to_rounding
from tests.test_report import timing


HEAD = "sequence_classification"
# The Hub's client on the newest release of the library beneath it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(small, monkeypatch, tmp_path):
    """The endpoint that the client of this process talks to, once there is a model to upload."""
    found = FakeHub()
    for name, value in {
        "ENDPOINT": found.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    # That of older transformers is made when they are imported.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", found.url)
    # The newest transformers keep a client for as long as a process lives.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    found.close()


@pytest.fixture
def small(model, batches, tokenizer, tmp_path, tmp_path_factory):
    """The folder of a saved model with fewer heads and neurons, made from a model of the Hub."""
    first = tmp_path_factory.getbasetemp() / "model-of-hub-tests"
    if not first.is_dir():
        made = model("bert", HEAD)
        hc.compress(made, hc.StructuredPruningConfig(mac_ratio=0.6), data=batches(made.config))
        made.config._name_or_path = "google-bert/bert-base-uncased"
        save_stage(first, made, tokenizer, {"eval_accuracy": 0.9})
    shutil.copytree(first, tmp_path / "small")
    return tmp_path / "small"


def reported(folder, name="small", **changes):
    """A report that measured a folder beside a dense model."""
    classes = [{"name": name, "examples": 9, "precision": 0.5, "recall": 0.9, "f1": 0.6} for name in ("bad", "good")]
    worse = [classes[0], {**classes[1], "recall": 0.8123}]
    cost = Cost(params=1000, nonzero_params=1000, macs=2000.0, bytes=4000)
    entries = [
        Entry("dense", {"accuracy": 0.92}, cost, [timing("dense", 1, [1.0, 1.0])], classes=classes, folder="dense"),
        Entry(name, {"accuracy": 0.9}, Cost(600, 600, 1000.0, 2400), [timing(name, 1, [0.5, 0.5])], classes=worse,
              folder=str(folder), standard_error=0.005, disk_bytes=2_500_000),
    ]  # fmt: skip
    return {**build_report(entries, "sst2", "accuracy", 872, 25.0, split="validation"), **changes}


def pushed(*arguments):
    return main(["push", *map(str, arguments)])


def test_a_model_goes_up_and_comes_back_by_its_name(hub, small, capsys):
    (small / "report.json").write_text(json.dumps(reported(small)))
    (small / "training.pt").write_bytes(pickle.dumps({"a": 1}))
    (small / "optimizer.bin").write_bytes(pickle.dumps([1, 2]))
    (small / "stage.json").write_text("{}")
    (small / "checkpoint-3").mkdir()
    (small / "checkpoint-3" / "model.safetensors").write_bytes(b"old")
    (small / "teacher").mkdir()
    (small / "teacher" / "model.safetensors").write_bytes(b"secret")
    assert pushed("--model_name_or_path", small, "--repo_id", "me/tiny", "--private") == 0
    files = hub.files["me/tiny"]
    assert sorted(files) == [
        "README.md", "config.json", "model.safetensors", "report.json", "results.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert files["model.safetensors"] == (small / "model.safetensors").read_bytes()
    assert hub.private == {"me/tiny": True}
    assert len(hub.commits["me/tiny"]) == 1
    said = capsys.readouterr().out
    for line in ("not uploaded: optimizer.bin: a pickle", "not uploaded: training.pt: a pickle", "teacher/model.safe",
                 f"{hub.url}/me/tiny"):  # fmt: skip
        assert line in said
    # Three lines, as the card says, with the client's own download.
    (code,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    names = {}
    exec(code, names)
    here = AutoModelForSequenceClassification.from_pretrained(small)
    assert hc.steps_of(names["model"]) == hc.steps_of(here)
    for name, value in here.state_dict().items():
        assert torch.equal(names["model"].state_dict()[name], value), name
    batch = names["tokenizer"]("a good film", return_tensors="pt")
    with torch.no_grad():
        assert_equal_to_rounding(names["model"](**batch).logits, here(**batch).logits)
    assert [path for method, path in hub.requests if method == "GET" and path.endswith("/model.safetensors")]
    # Once more: the same repository, one commit further; a name alone is one of one's own.
    assert pushed("--model_name_or_path", small, "--repo_id", "tiny", "--include_teacher") == 0
    assert len(hub.commits["me/tiny"]) == 2
    assert hub.files["me/tiny"]["teacher/model.safetensors"] == b"secret"


def test_the_card_of_an_upload_says_what_the_report_measured(small):
    report = reported(small)
    model = AutoModelForSequenceClassification.from_pretrained(small)
    card = ModelCard(card_text(model, small, "me/tiny", report))
    # The model was opened from a folder whose own card names the base.
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.base_model_relation == "finetune"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["hf_compress", "structured_pruning"]
    for text in (
        "# tiny\n", '.from_pretrained("me/tiny")',
        "| accuracy of sst2 (validation split, 872 examples) | 0.9200 | 0.9000 |",
        "| multiply-accumulates of a sequence | 2e+03 | 1e+03 |", "| MB on disk | - | 2.5 |",
        "| speed-up at batch 1 | 1.00x | 2.00x |", f"Hardware: {report['hardware']}; 2 threads, float32, on cpu.",
        METHODS["structured_pruning"].paper.bibtex, "Recall fell most for the class 'good': 0.9000 -> 0.8123",
        "LOST 0.0200 accuracy",
    ):  # fmt: skip
        assert text in card.text, text
    assert "holds no measurements" not in card.text
    assert "holds no measurements" in card_text(model, small)


def test_relations_are_those_of_the_methods(small, monkeypatch):
    model = AutoModelForSequenceClassification.from_pretrained(small)
    quantized = dataclasses.replace(METHODS["structured_pruning"], relation="quantized")
    monkeypatch.setitem(METHODS, "structured_pruning", quantized)
    assert ModelCard(card_text(model, small)).data.base_model_relation == "quantized"


def test_a_model_of_no_method_has_no_relation_and_no_papers(model, tokenizer, tmp_path):
    dense = model("bert", HEAD)
    dense.config._name_or_path = "google-bert/bert-base-uncased"
    save_stage(tmp_path / "dense", dense, tokenizer, {})
    card = ModelCard.load(tmp_path / "dense" / "README.md")
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.get("base_model_relation") is None
    assert "bibtex" not in card.text
    assert "## Limits" not in card.text
    assert citation_section([]) == ""


def test_a_dry_run_writes_what_would_be_uploaded(small, tmp_path, capsys):
    report = tmp_path / "measured"
    report.mkdir()
    (report / "report.json").write_text(json.dumps(reported(small)))
    (report / "report.html").write_text("page")
    card = small / "README.md"
    card.write_text(card.read_text() + "\n## How it was made\n\n1. `teacher`\n")
    before = {file: file.read_bytes() for file in small.iterdir()}
    line = ["--model_name_or_path", small, "--repo_id", "me/tiny", "--dry_run", "--report", report]
    # No endpoint, no token.
    assert pushed(*line, "--eval_dataset", "nyu-mll/glue", "--eval_task", "sst2") == 0
    out = tmp_path / "small-hub"
    assert f"written to {out}" in capsys.readouterr().out
    found = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert found == [
        ".eval_results/glue-sst2.yaml", "README.md", "config.json", "model.safetensors", "report/report.html",
        "report/report.json", "results.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    [result] = yaml.safe_load((out / ".eval_results" / "glue-sst2.yaml").read_text())
    assert result["dataset"] == {"id": "nyu-mll/glue", "task_id": "sst2"}
    assert result["value"] == 0.9
    assert result["notes"] == "accuracy on 872 examples of the validation split, by hf-compress report"
    text = (out / "README.md").read_text()
    assert "## What was measured" in text
    assert text.endswith("## How it was made\n\n1. `teacher`\n")
    assert {file: file.read_bytes() for file in small.iterdir()} == before
    AutoModelForSequenceClassification.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)


def test_the_card_of_a_person_is_uploaded_as_it_is(small, tmp_path):
    (small / "README.md").write_text("---\ntags: [mine]\n---\nMy own words.\n")
    out = tmp_path / "out"
    assert pushed("--model_name_or_path", small, "--repo_id", "me/a", "--dry_run", "--output_dir", out) == 0
    assert (out / "README.md").read_text() == "---\ntags: [mine]\n---\nMy own words.\n"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("token", [], "push needs a token with write permission: hf auth login, or set HF_TOKEN"),
        ("wrong token", [], "Logging in at http://127.0.0.1"),
        ("down", [], "Logging in at http://127.0.0.1"),
        ("offline", [], "Logging in at http://127.0.0.1"),
        ("", ["--repo_id", "other/tiny"], "Making other/tiny at http://127.0.0.1"),
        ("", ["--repo_id", "me/ti--ny"], "repo_id must be a name or owner/name as the Hub allows: Cannot have --"),
        ("weights", [], "must hold weights in safetensors files, got none"),
        ("config", [], "must hold a saved model, got no config.json there"),
        ("broken", [], "No model can be opened at"),
        ("", ["--model_name_or_path", "nowhere"], "must be a folder with a saved model, got 'nowhere'"),
        ("other report", [], "report must hold the model of"),
        ("no report", [], "must be a report.json of hf-compress report, got other content"),
        ("", ["--eval_dataset", "a/b"], "eval_dataset must come with a report"),
    ],
)
def test_what_cannot_be_uploaded_is_one_line_before_any_work(
    hub, small, tmp_path, monkeypatch, capsys, change, arguments, message
):
    if change == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif change == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif change == "down":
        hub.close()
    elif change == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif change == "weights":
        torch.save({"a": torch.ones(1)}, small / "pytorch_model.bin")
        (small / "model.safetensors").unlink()
    elif change == "config":
        (small / "config.json").unlink()
    elif change == "broken":
        (small / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes()[:1000])
    elif change == "other report":
        (small / "report.json").write_text(json.dumps(reported("elsewhere", name="another")))
    elif change == "no report":
        (small / "report.json").write_text("{}")
    line = {"--model_name_or_path": str(small), "--repo_id": "me/tiny"}
    line |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert pushed(*[word for pair in line.items() for word in pair]) == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    assert message in said
    assert not hub.files
    assert not hub.objects


@pytest.mark.parametrize(("code", "why"), [
    (403, "Private repository storage limit reached"), (400, "The card is no YAML"),
    (None, "gone"),
])  # fmt: skip
def test_an_upload_that_the_hub_refuses_is_one_line_and_leaves_nothing(hub, small, capsys, code, why):
    hub.refuses = code, why
    assert pushed("--model_name_or_path", small, "--repo_id", "me/tiny") == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"hf-compress: Uploading to me/tiny at {hub.url} failed: ")
    assert not hub.files["me/tiny"]
    hub.refuses = None
    assert pushed("--model_name_or_path", small, "--repo_id", "me/tiny") == 0


def test_pickles_are_known_by_what_is_in_them(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    for protocol in (2, 3, 4, 5):
        assert is_pickle(written("weights.bin", pickle.dumps([1], protocol)))
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert is_pickle(tmp_path / "pytorch_model.bin")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    assert is_pickle(tmp_path / "objects.npy")
    assert is_pickle(written("old.pkl", pickle.dumps([1], 0)))
    np.save(tmp_path / "numbers.npy", np.ones(3))
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    for file in (tmp_path / "numbers.npy", tmp_path / "texts.zip", written("openvino_model.bin", b"\x00" * 99),
                 written("config.json", b"{}"), written("empty", b"")):  # fmt: skip
        assert not is_pickle(file)


def test_the_entry_of_a_folder_is_found_by_place_and_by_name(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(reported(tmp_path / "a")))
    report = read_report(tmp_path)
    assert entry_of(report, tmp_path / "a")["name"] == "small"
    assert entry_of(report, "somewhere/small")["name"] == "small"
    with pytest.raises(ValueError, match="report must hold the model of 'other', got those named 'dense', 'small'"):
        entry_of(report, "other")
    # The dense model's own card has no column for another one.
    assert "| | this model |" in measured_section(report, report["models"][0])


def test_a_trainer_uploads_the_same_card_and_no_pickle(hub, small, tokenizer, sentences, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(small)
    out = tmp_path / "out"
    args = TrainingArguments(
        str(out), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        hub_model_id="me/trained",
    )  # fmt: skip
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences[:8]]
    trainer = hc.CompressionTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files["me/trained"]
    assert {"README.md", "config.json", "model.safetensors", "training_args.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model_relation == "finetune"
    for text in ("**structured_pruning**", '.from_pretrained("me/trained")', "```bibtex", "## Limits",
                 "### Training hyperparameters"):  # fmt: skip
        assert text in card.text, text
    assert "model-index" not in card.data.to_dict()
    assert not [name for name in files if name.startswith(".eval_results")]
    (out / "left.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="must hold no pickles, which can run code when they are read, got left.pkl"):
        trainer.push_to_hub()


def measuring_trainer(small, tokenizer, sentences, out, metrics=None, **options):
    args = TrainingArguments(
        str(out), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        eval_strategy="steps", eval_steps=1, hub_model_id="me/measured", **options,
    )  # fmt: skip
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences[:8]]
    return hc.CompressionTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(small), args=args, train_dataset=rows,
        eval_dataset=rows[:6], processing_class=tokenizer, compute_metrics=metrics,
    )  # fmt: skip


def accuracy_and_another(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean()), "another": 0.25}


def test_a_trainer_uploads_results_in_the_present_form(hub, small, tokenizer, sentences, tmp_path):
    out = tmp_path / "out"
    trainer = measuring_trainer(
        small, tokenizer, sentences, out, accuracy_and_another, metric_for_best_model="accuracy"
    )
    trainer.train()
    page = (Path(__file__).resolve().parents[1] / "docs" / "hub.md").read_text()
    exec(re.search(r"```python\n(trainer.push_to_hub.*?)```", page, re.DOTALL)[1], {"trainer": trainer})
    files = hub.files["me/measured"]
    [result] = yaml.safe_load(files[".eval_results/glue-sst2.yaml"])
    measured = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert result["dataset"] == {"id": "nyu-mll/glue", "task_id": "sst2"}
    assert (len(measured), result["value"]) == (2, measured[-1])
    assert result["notes"] == "accuracy on 6 examples, after 2 updates, by Trainer"
    card = ModelCard(files["README.md"].decode())
    assert "model-index" not in card.data.to_dict()
    assert card.data.datasets == ["nyu-mll/glue"]
    assert "### Training results" in card.text


@pytest.mark.parametrize(
    ("metrics", "said"), [(None, "got none: evaluate"), (accuracy_and_another, "got accuracy, another")]
)
def test_a_result_that_is_not_known_is_refused_before_the_upload(
    hub, small, tokenizer, sentences, tmp_path, metrics, said
):
    trainer = measuring_trainer(small, tokenizer, sentences, tmp_path / "out", metrics)
    trainer.evaluate()
    with pytest.raises(ValueError, match=f"dataset_tags names a benchmark, .* must have one metric, {said}"):
        trainer.push_to_hub(dataset_tags=["nyu-mll/glue"])
    assert not hub.files["me/measured"]
    # A name that is no repository's is for the card alone.
    trainer.create_model_card(dataset_tags=["glue"])
    assert not (tmp_path / "out" / ".eval_results").exists()


LOAD = """
import hf_compress
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("me/tiny")
print(sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
def test_another_process_pushes_and_a_third_one_loads(small, tmp_path):
    hub = FakeHub()
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {
        **os.environ,
        **settings,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "hf_compress", "push", "--model_name_or_path", str(small), "--repo_id", "me/tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True)
    here = AutoModelForSequenceClassification.from_pretrained(small)
    assert int(found.stdout) == sum(parameter.numel() for parameter in here.parameters())
    hub.close()
