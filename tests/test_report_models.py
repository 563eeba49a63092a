"""A report of several models: each reads the texts in its own way, and none takes the others' numbers with it."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BloomConfig, BloomForSequenceClassification, PreTrainedModel

from hf_compress.cli.main import main
from hf_compress.core.devices import chosen_device
from hf_compress.report import comparison
from hf_compress.report.quality import standard_error
from hf_compress.stages.arguments import DeviceArguments, OutputArguments
from hf_compress.stages.evaluate import Evaluate, EvaluateArguments, evaluate
from hf_compress.stages.report import Report, ReportArguments, report
from hf_compress.tasks.class_answers import ClassAnswers
from hf_compress.tasks.sources import DataArguments
from tests.labelled_models import TEXTS, write_perfect_model, write_rows
from tests.test_bad_input import WORDS, write_tokenizer


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def data():
    return DataArguments(data_dir="data", max_length=16)


def compare(*models, **changes):
    settings = {"latency_batch_sizes": [4], "latency_repeats": 1, "latency_examples": 8, **changes}
    comparison, device = ReportArguments(list(models), **settings), DeviceArguments("cpu")
    return report(Report(comparison=comparison, data=data(), output=OutputArguments("out"), device=device))


def measured(*models):
    arguments = EvaluateArguments(list(models))
    return evaluate(Evaluate(evaluation=arguments, data=data(), device=DeviceArguments("cpu")))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model that answers everything rightly, and its twin, which has another vocabulary and order of labels."""
    monkeypatch.chdir(tmp_path)
    answers = write_perfect_model(tmp_path / "model", ["up", "down"])
    rows = [{"text": text, "label": ("up", "down")[answer]} for text, answer in zip(TEXTS, answers, strict=True)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.csv", rows)
    write_perfect_model(tmp_path / "twin", ["down", "up"])
    weights = load_file(tmp_path / "twin" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    # The same words under other ids.
    order = [0, 1, 2, 3, *range(len(WORDS) - 1, 3, -1)]
    words = "bert.embeddings.word_embeddings.weight"
    weights[words] = weights[words][order].contiguous()
    save_file(weights, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(tmp_path / "twin", [WORDS[i] for i in order])
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_each_model_reads_by_its_own_tokenizer(place, monkeypatch):
    seen = {}

    def timed(models, batches, *rest):
        for name, own in batches.items():
            tokenizer = AutoTokenizer.from_pretrained(name)
            seen[name] = [tokenizer.batch_decode(batch["input_ids"]) for batch in own]
        return original(models, batches, *rest)

    original = comparison.measure_latency
    monkeypatch.setattr(comparison, "measure_latency", timed)
    found = compare("model", "twin")
    assert [model["metrics"]["accuracy"] for model in found["models"]] == [1.0, 1.0]
    assert [model["metrics"]["f1"] for model in found["models"]] == [1.0, 1.0]
    assert found["models"][1]["standard_error"] == 0.0
    # Equal texts are timed.
    assert seen["model"] == seen["twin"]
    alone = measured("model", "twin")
    assert [each["accuracy"] for each in alone.values()] == [1.0, 1.0]
    assert "the same accuracy (1.0000)" in (place / "out" / "report.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_answers_one_class_is_named_and_its_teacher_too(place):
    shutil.copytree("model", "constant")
    weights = load_file("constant/model.safetensors")
    weights["classifier.weight"].zero_()
    weights["classifier.bias"] = torch.tensor([0.0, 1.0])
    save_file(weights, "constant/model.safetensors", metadata={"format": "pt"})
    training = {"trainer": "DistillationTrainer", "settings": {"teacher": "big", "alpha_task": 0.5}}
    Path("constant", "results.json").write_text(json.dumps({"training": training}))
    Path("model", "results.json").write_text("[]")
    first, second = compare("model", "constant")["models"]
    right = second["metrics"]["accuracy"]
    assert (first["only_answer"], second["only_answer"]) == (None, {"answer": "down", "right": right})
    told = f"- constant: ONE CLASS: all its answers are 'down' (right for {right:.4f} of the examples)"
    assert told in Path("out", "report.md").read_text()
    # Their folders tell of a training by a teacher, or of none.
    assert (first["steps"], second["steps"][0]["method"]) == ([], "DistillationTrainer")
    assert "- constant: DistillationTrainer (teacher=big, alpha_task=0.5)" in Path("out", "report.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_arithmetic_that_cannot_be_counted_is_blank(place):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    names = {"id2label": {0: "up", 1: "down"}, "label2id": {"up": 0, "down": 1}}
    other = BloomForSequenceClassification(BloomConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes, **names))
    other.save_pretrained(place / "other")
    write_tokenizer(place / "other")
    found = compare("model", "other", "twin")
    model, other_, twin = found["models"]
    assert other_["cost"]["params"] == sum(p.numel() for p in other.parameters())
    assert (other_["cost"]["macs"], other_["mac_ratio"], other_["heads"]) == (None, None, [])
    assert "MACs not counted" in other_["verdicts"][0]
    assert twin["mac_ratio"] == 1.0
    row = next(line for line in (place / "out" / "report.md").read_text().splitlines() if line.startswith("| other "))
    assert [cell.strip() for cell in row.split("|")[5:7]] == ["-", "-"]
    assert json.loads((place / "out" / "report.json").read_text()) == found


@pytest.mark.filterwarnings("ignore")
def test_what_is_known_survives_a_later_failure(place, monkeypatch):
    def failing(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(comparison, "measure_latency", failing)
    with pytest.raises(RuntimeError):
        compare("model", "twin")
    kept = json.loads((place / "out" / "report.json").read_text())
    assert [model["metrics"]["accuracy"] for model in kept["models"]] == [1.0, 1.0]
    assert "| twin" in (place / "out" / "report.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_loss_is_named_beside_the_gain(place):
    weights = load_file(place / "twin" / "model.safetensors")
    weights["classifier.bias"] = torch.tensor([9.0, -9.0])
    save_file(weights, place / "twin" / "model.safetensors", metadata={"format": "pt"})
    found = compare("model", "twin")
    accuracy = found["models"][1]["metrics"]["accuracy"]
    error = found["models"][1]["standard_error"]
    lost = f"LOST {1 - accuracy:.4f} accuracy (1.0000 -> {accuracy:.4f}, standard error {error:.4f}); "
    # It answers one class to everything, which is said before.
    assert f"takes no model; {lost}" in found["models"][1]["verdicts"][0]
    table = (place / "out" / "report.md").read_text()
    assert f"takes no model; {lost}" in table
    changes = found["models"][1]["changes"]
    lost = round(48 * (1 - accuracy))
    assert [changes[key] for key in ("both_right", "lost", "gained", "both_wrong")] == [48 - lost, lost, 0, 0]
    assert changes["examples"][0] == {"text": changes["examples"][0]["text"], "label": "up", "answer": "down"}
    assert changes["examples"][0]["text"] in TEXTS
    assert f" {changes['examples'][0]['text']} |" in table


def test_the_standard_error_of_accuracy_is_the_paired_one():
    generator = np.random.default_rng(1)
    labels = generator.integers(2, size=500)
    before, after = (np.eye(2)[np.where(generator.random(500) < right, labels, 1 - labels)] for right in (0.9, 0.7))
    changes = (after.argmax(-1) == labels).astype(float) - (before.argmax(-1) == labels)
    found = standard_error(ClassAnswers(before, labels), ClassAnswers(after, labels), "accuracy")
    # 200 resamples know a standard deviation to 5 %.
    assert found == pytest.approx(changes.std() / np.sqrt(500), rel=0.2)
    assert standard_error(ClassAnswers(before, labels), ClassAnswers(before, labels), "accuracy") == 0.0


@pytest.mark.parametrize("example", ["shrink_and_recover", "token_pruning", "prune_weights"])
@pytest.mark.filterwarnings("ignore")
def test_examples_say_which_split_they_use(place, monkeypatch, capsys, example):
    (place / "data" / "validation.csv").rename(place / "data" / "test.csv")
    AutoTokenizer.from_pretrained("model", model_max_length=200).save_pretrained("model")
    options = {"shrink_and_recover": "--samples 48", "token_pruning": "--mode topk", "prune_weights": "--epochs 2"}
    arguments = f"--model model --data_dir data --out out {options[example]}"
    steps = "" if example == "prune_weights" else " --max_steps 1"
    monkeypatch.setattr("sys.argv", [example, *(arguments + steps).split()])
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "measured on the test split" in printed
    if example != "token_pruning":
        # Labels in the order of the model: nothing has been trained yet.
        assert "'accuracy': 1.0" in next(line for line in printed.splitlines() if line.startswith("dense"))


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "validation", "test"), ("train",)])
@pytest.mark.filterwarnings("ignore")
def test_every_command_measures_on_the_same_split(place, capsys, splits):
    for split in ("test", "validation"):
        (place / "data" / f"{split}.csv").write_bytes((place / "data" / "train.csv").read_bytes())
        if split not in splits:
            (place / "data" / f"{split}.csv").unlink()
    training = "--max_steps 1 --learning_rate 0 --use_cpu --save_strategy no --output_dir tuned"
    commands = {
        "tuned/results.json": f"finetune --model_name_or_path model {training}",
        "scores.json": "evaluate --models model --output_file scores.json --device cpu",
        "out/report.json": "report --models model --output_dir out --device cpu --latency_batch_sizes 4 "
        "--latency_repeats 1 --latency_examples 4",
    }
    measured = {}
    for file, command in commands.items():
        code = main(f"{command} --data_dir data --max_length 16".split())
        if splits == ("train",) and not command.startswith("finetune"):
            assert code == 2
            assert "neither a validation nor a test split" in capsys.readouterr().err
            continue
        assert code == 0
        measured[file] = json.loads((place / file).read_text())
    expected = {1: None, 2: "test", 3: "validation"}[len(splits)]
    if expected:
        assert measured["out/report.json"]["split"] == expected
        assert measured["scores.json"]["model"]["split"] == expected
        assert f"examples of the {expected} split" in (place / "out" / "report.md").read_text()
    assert measured["tuned/results.json"].get("eval_split") == expected


def incomplete(place, how):
    """A folder whose weight files lack something."""
    weights = load_file(place / "model" / "model.safetensors")
    if how == "parallel":
        weights = {f"module.{name}": value for name, value in weights.items()}
    else:
        weights = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    save_file(weights, place / "model" / "model.safetensors", metadata={"format": "pt"})
    if how == "encoder":
        config = json.loads((place / "model" / "config.json").read_text())
        (place / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))


_DATA = "--data_dir data --max_length 16"
_TRAINING = f"{_DATA} --output_dir out --use_cpu --max_steps 1 --save_strategy no"
MEASURING = (
    f"evaluate --models model {_DATA}",
    f"report --models twin model {_DATA} --output_dir out",
    f"prune-structure --model_name_or_path model {_DATA} --output_dir out --calibration_samples 48",
    f"distill --model_name_or_path twin --teacher_name_or_path model {_TRAINING}",
    f"prune-tokens --model_name_or_path twin --teacher_name_or_path model {_TRAINING}",
    f"prune-weights --model_name_or_path twin --teacher_name_or_path model {_TRAINING}",
    f"prune-weights --model_name_or_path model {_DATA} --output_dir out --use_cpu --num_train_epochs 0 "
    "--criterion magnitude --pattern 2:4 --target_sparsity 0.5",
)
TRAINING = (
    f"finetune --model_name_or_path model {_TRAINING}",
    "linearize --model_name_or_path model --data_dir data --output_dir out --projected_length 4 --device cpu",
)


@pytest.mark.parametrize(
    ("line", "how"),
    [(line, how) for line in MEASURING for how in ("parallel", "encoder")]
    # Even who trains a head refuses a classifier whose head is lost, and an encoder of random weights.
    + [(line, how) for line in TRAINING for how in ("parallel", "beheaded")],
)
@pytest.mark.filterwarnings("ignore")
def test_nothing_works_with_weights_that_are_not_in_the_file(place, capsys, line, how):
    incomplete(place, how)
    assert main(line.split()) == 2
    assert "which would be random" in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "out" / "model.safetensors").exists()
    assert not (place / "out" / "report.json").exists()


def test_a_folder_given_to_the_comparison_is_whole(place):
    incomplete(place, "encoder")
    with pytest.raises(ValueError, match="which would be random"):
        comparison.compare_models({"model": "model"}, None, None, "sst2", "out")


@pytest.mark.parametrize("line", TRAINING)
@pytest.mark.filterwarnings("ignore")
def test_an_encoder_gets_a_head_where_one_is_trained(place, line):
    incomplete(place, "encoder")
    assert main(line.split()) == 0
    assert json.loads((place / "out" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:3"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"device must be auto or one of this machine .*, got '{name}'"):
        chosen_device(name)


def test_the_accelerator_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert chosen_device() == chosen_device("auto") == chosen_device("cuda") == torch.device("cuda")
    assert chosen_device("cuda:1").index == 1
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    # No double precision there, which pruning needs.
    assert (chosen_device(), chosen_device("mps")) == (torch.device("cpu"), torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"one of this machine \(cpu, cuda\), got 'cuda:2'"):
        chosen_device("cuda:2")


@pytest.mark.filterwarnings("ignore")
def test_models_go_where_they_are_told(place, monkeypatch):
    moved = []
    original = PreTrainedModel.to
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *a, **k: moved.append(a[0]) or original(self, *a, **k))
    measured("model")
    compare("model")
    assert moved[:2] == [torch.device("cpu")] * 2
    for line in (MEASURING[2], TRAINING[1]):
        moved.clear()
        assert main([*line.replace("--device cpu", "").split(), "--device", "cpu"]) == 0
        assert moved[0] == torch.device("cpu")
