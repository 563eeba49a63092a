"""`report` and `evaluate` measure exported models beside those of transformers."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hc
from hf_compress.stages.arguments import DeviceArguments, OutputArguments
from hf_compress.stages.evaluate import Evaluate, EvaluateArguments, evaluate
from hf_compress.stages.measured import common_device, label_of
from hf_compress.stages.report import Report, ReportArguments, report
from hf_compress.tasks.sources import DataArguments
from tests.labelled_models import TEXTS, write_perfect_model, write_rows


for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

INT8 = "small_onnx/model_int8.onnx"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model that answers everything rightly, a pruned copy, and that exported with both graphs."""
    root = tmp_path_factory.mktemp("exported")
    answers = write_perfect_model(root / "dense", ["up", "down"])
    rows = [{"text": text, "label": ("up", "down")[answer]} for text, answer in zip(TEXTS, answers, strict=True)]
    for split in ("train", "validation"):
        write_rows(root / "data" / f"{split}.csv", rows)
    tokenizer = AutoTokenizer.from_pretrained(root / "dense")
    batches = [dict(tokenizer(TEXTS[:16], padding=True, return_tensors="pt"))]
    small = AutoModelForSequenceClassification.from_pretrained(root / "dense")
    small = hc.compress(small, hc.StructuredPruningConfig(mac_ratio=0.6), data=batches)
    small.save_pretrained(root / "small")
    tokenizer.save_pretrained(root / "small")
    hc.export_onnx(small, root / "small_onnx", batches, tokenizer, int8=True, int8_bound=0.5)
    return root


def data():
    return DataArguments(data_dir="data", max_length=16)


@pytest.mark.filterwarnings("ignore")
def test_exported_models_beside_their_original(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "small_onnx" / "lineage.json").write_text(
        json.dumps([{"name": "small_onnx", "stage": "export", "options": {"int8": True}, "seconds": 2.0}])
    )
    comparison = ReportArguments(
        ["dense", "small", "small_onnx", INT8], second_baseline="small_onnx",
        latency_batch_sizes=[4], latency_repeats=2, latency_examples=8,
    )  # fmt: skip
    found = report(Report(comparison=comparison, data=data(), output=OutputArguments("out")))
    dense, small, runtime, int8 = found["models"]
    assert [model["name"] for model in found["models"]] == ["dense", "small", "small_onnx", "small_onnx int8"]
    # The same model: sizes, arithmetic and answers of the original, which had to load for them; the exported had not.
    assert runtime["metrics"] == small["metrics"]
    for key in ("heads", "neurons", "mac_ratio", "seq_len"):
        assert runtime[key] == int8[key] == small[key] != []
    for key in ("params", "nonzero_params", "macs", "macs_by_layer"):
        assert runtime["cost"][key] == int8["cost"][key] == small["cost"][key]
    assert int8["cost"]["macs"] < dense["cost"]["macs"]
    weights = {file: (place / "small_onnx" / file).stat().st_size for file in ("model.onnx", "model_int8.onnx")}
    assert [model["disk_bytes"] for model in (runtime, int8)] == list(weights.values())
    assert int8["steps"][:-1] == small["steps"]
    kept = json.loads((place / "small_onnx" / "export.json").read_text())["int8"]["kept"]
    settings = {"runtime": "ONNX Runtime", "weights": "int8", "layers_in_float": len(kept)}
    assert int8["steps"][-1] == {"method": "export", "settings": settings}
    assert int8["lineage"][0]["name"] == "small_onnx"
    timed = [model["latency"][0] for model in found["models"]]
    assert [(entry["runtime"], entry["dtype"]) for entry in timed] == [
        ("PyTorch", "float32"), ("PyTorch", "float32"), ("ONNX Runtime", "float32"), ("ONNX Runtime", "int8"),
    ]  # fmt: skip
    assert timed[0]["peak_memory"] > 0
    assert timed[3]["peak_memory"] is None
    # Over both baselines: by hand, from the rounds.
    for entry in timed:
        for which, baseline in (("speedup", timed[0]), ("speedup_over_second", timed[2])):
            ratios = sorted(base / own for base, own in zip(baseline["totals"], entry["totals"], strict=True))
            assert entry[which]["median"] == pytest.approx(sum(ratios) / 2)
    sentences = int8["verdicts"]
    assert any("small_onnx" in sentence for sentence in sentences)
    assert not any("small_onnx" in sentence for sentence in runtime["verdicts"])
    markdown, page = ((place / "out" / f"report.{end}").read_text() for end in ("md", "html"))
    assert "over small_onnx" in markdown
    assert "over small_onnx" in page
    assert "second baseline" in page
    assert json.loads((place / "out" / "report.json").read_text()) == found


@pytest.mark.filterwarnings("ignore")
def test_an_exported_model_comes_first(place, monkeypatch):
    """It decides about the kind of task, and stands for the original."""
    monkeypatch.chdir(place)
    arguments = EvaluateArguments(["small_onnx", "small"])
    found = evaluate(Evaluate(evaluation=arguments, data=data(), device=DeviceArguments("cpu")))
    assert found["small_onnx"] == found["small"]


def test_exported_models_that_cannot_be_measured(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    for names, words in (
        (["dense", "small_onnx/other.onnx"], "must be a file that export wrote, one of"),
        (["dense", "nowhere/model.onnx"], "No tokenizer can be opened at 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(Evaluate(evaluation=EvaluateArguments(names), data=data()))
    with pytest.raises(ValueError, match="output_dir 'small_onnx' is the folder of the model"):
        Report(comparison=ReportArguments(["dense", INT8]), data=data(), output=OutputArguments("small_onnx"))


def test_names(place, monkeypatch):
    monkeypatch.chdir(place)
    assert [label_of(name) for name in ("small_onnx", INT8, "small_onnx/model.onnx", "dense", "org/name")] == [
        "small_onnx", "small_onnx int8", "small_onnx", "dense", "name",
    ]  # fmt: skip
    assert [common_device(["dense", name], "auto") for name in ("small", INT8)] == ["auto", "cpu"]
    assert common_device([INT8], "cpu") == "cpu"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dropped_tokens_are_not_counted(place, monkeypatch, tmp_path):
    """Only the original can tell what it drops; the exported one says that it is not known."""
    monkeypatch.chdir(place)
    model = AutoModelForSequenceClassification.from_pretrained("dense")
    tokenizer = AutoTokenizer.from_pretrained("dense")
    pruned = hc.compress(model, hc.TokenPruningConfig(final_token_threshold=0.1))
    batch = dict(tokenizer(TEXTS[:4], padding=True, return_tensors="pt"))
    hc.export_onnx(pruned, tmp_path / "tokens_onnx", [batch], tokenizer)
    pruned.save_pretrained(tmp_path / "tokens")
    tokenizer.save_pretrained(tmp_path / "tokens")
    comparison = ReportArguments(
        ["dense", str(tmp_path / "tokens"), "small_onnx", str(tmp_path / "tokens_onnx")],
        latency_batch_sizes=[4], latency_repeats=1, latency_examples=4,
    )  # fmt: skip
    found = report(Report(comparison=comparison, data=data(), output=OutputArguments(str(tmp_path / "out"))))
    dense, tokens, small, exported = found["models"]
    assert exported["metrics"] == tokens["metrics"]
    assert exported["mac_ratio"] is None
    assert exported["cost"]["params"] == tokens["cost"]["params"]
    # All others are counted on the same examples.
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    small_model = AutoModelForSequenceClassification.from_pretrained("small")
    expected = sum(hc.count_cost(small_model, length).macs for length in lengths) / len(lengths)
    assert small["cost"]["macs"] == pytest.approx(expected)
    assert small["mac_ratio"] < 1 > tokens["mac_ratio"]
    assert torch.isfinite(torch.tensor(dense["cost"]["macs"]))
