"""Formats beside ONNX: folders that torch.export and OpenVINO wrote give the outputs of the original."""

import json
import pickle
import zipfile
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, ViTForImageClassification, ViTImageProcessor

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.export.folder import export_model
from hf_compress.export.formats import exported_file, open_exported
from hf_compress.export.recorded_model import RecordedModel
from hf_compress.report.counting import cost_of, counted_layers, mean_length, shapes_of
from hf_compress.report.quality import Measured
from tests.bilstm_models import bilstm, texts
from tests.conftest import ARCHITECTURES, HEADS, _batches
from tests.labelled_models import TEXTS, write_perfect_model, write_rows
from tests.rounding import assert_equal_to_rounding


OTHERS = [
    "torch-export",
    pytest.param("openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is absent")),
]
BATCH = {"input_ids": torch.ones(2, 4, dtype=torch.int64)}


def dropping(architecture="distilbert"):
    """A classifier that lost heads and neurons and drops tokens."""
    torch.manual_seed(0)
    model = HEADS["sequence_classification"].from_config(ARCHITECTURES[architecture]()).eval()
    config = hc.TokenPruningConfig(final_token_threshold=0.2, threshold_ramp="one_based", score_norm="live")
    return hc.compress(model, hc.StructuredPruningConfig(mac_ratio=0.6), config, data=_batches(model.config))


def refused_with_a_pickle(file, changed):
    """PyTorch would store the recorded inputs as a pickle, and reads one that runs code."""
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(changed, "w") as target:
        entries = {name: archive.read(name) for name in archive.namelist()}
        [inputs] = [name for name in entries if name.endswith("sample_inputs/model.pt")]
        assert entries[inputs] == b""
        entries[inputs] = pickle.dumps(print)
        for name, content in entries.items():
            target.writestr(name, content)
    with pytest.raises(ValueError, match=r"torch.export cannot open .*it holds a pickle \(.*sample_inputs/model.pt\)"):
        RecordedModel(changed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format_", OTHERS)
def test_outputs_of_the_original(tmp_path, format_):
    """Of other sizes than those that were recorded and compared."""
    model = dropping()
    torch.manual_seed(1)
    ids = torch.randint(1, 90, (5, 17))
    mask = (torch.arange(17) < torch.tensor([[17], [9], [1], [12], [4]])).long()
    report = export_model(
        model, tmp_path / "out", [{"input_ids": ids[:3, :9], "attention_mask": mask[:3, :9]}], None, format_
    )
    exported = open_exported(exported_file(str(tmp_path / "out")))
    for rows in ([0, 1, 2, 3, 4], [1, 3]):
        batch = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        with torch.no_grad():
            expected = model(**batch).logits
        # Twice: a runtime that keeps its outputs in one place would change those of the first call.
        first, second = exported(**batch).logits, exported(**{**batch, "input_ids": ids[rows].flip(0)}).logits
        assert_equal_to_rounding(first, expected)
        assert not torch.equal(first, second)
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == report
    assert report["format"] == format_
    assert report["bytes"] == {name: (tmp_path / "out" / name).stat().st_size for name in report["bytes"]}
    assert sum(report["bytes"].values()) == exported.num_bytes()
    if format_ == "torch-export":
        refused_with_a_pickle(tmp_path / "out" / "model.pt2", tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format_", OTHERS)
def test_command_and_comparison(tmp_path, monkeypatch, capsys, format_):
    monkeypatch.chdir(tmp_path)
    answers = write_perfect_model(tmp_path / "dense", ["up", "down"])
    rows = [{"text": text, "label": ("up", "down")[answer]} for text, answer in zip(TEXTS, answers, strict=True)]
    write_rows(tmp_path / "data" / "validation.csv", rows)
    data = "--data_dir data --max_length 16 --latency_repeats 1 --latency_batch_sizes 2"
    assert main(f"export --model_name_or_path dense --format {format_} --output_dir out {data}".split()) == 0
    assert " of PyTorch on " in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained("out")("bad good")["input_ids"]
    assert main(f"report --models dense out --output_dir compared {data}".split()) == 0
    dense, exported = json.loads((tmp_path / "compared" / "report.json").read_text())["models"]
    assert exported["metrics"] == dense["metrics"]
    assert exported["disk_bytes"] == sum(json.loads((tmp_path / "out" / "export.json").read_text())["bytes"].values())
    assert exported["latency"][0]["runtime"] == {"openvino": "OpenVINO"}.get(format_, format_.replace("-", "."))


@pytest.mark.parametrize(
    ("format_", "int8", "words"),
    [
        ("tflite", False, "format must be one of onnx, openvino, torch-export, compressed-tensors, got 'tflite'"),
        ("torch-export", True, "int8 must be left out for format torch-export"),
    ],
)
def test_refused(tmp_path, format_, int8, words):
    with pytest.raises(ValueError, match=words):
        export_model(dropping(), tmp_path / "out", [BATCH], None, format_, int8)
    assert not (tmp_path / "out").exists()


def test_broken_files(tmp_path):
    (tmp_path / "model.pt2").write_text("no program")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"torch.export cannot open '.*model.pt2'"):
        open_exported(tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="must be a file that export wrote, one of model_int8.onnx, model.onnx"):
        open_exported(tmp_path / "other.pt2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_length_that_becomes_a_constant_is_refused(tmp_path):
    model = bilstm(num_layers=1).float().eval()
    batch = dict(zip(("input_ids", "attention_mask"), texts([9, 4, 7]), strict=True))
    with pytest.raises(ValueError, match="BiLSTMForSequenceClassification cannot be exported to torch.export: Constr"):
        export_model(model, tmp_path / "out", [batch], None, "torch-export")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_images_are_counted_on_shapes_alone(tmp_path):
    torch.manual_seed(0)
    model = ViTForImageClassification(ARCHITECTURES["vit"](num_labels=3)).eval()
    config = hc.StructuredPruningConfig(mac_ratio=0.6, selection="magnitude", correction=False)
    model = hc.compress(model, config, data=_batches(model.config))
    images = _batches(model.config, count=1)[0]["pixel_values"]
    export_model(model, tmp_path / "out", [{"pixel_values": images}], None, "torch-export")
    exported = open_exported(exported_file(str(tmp_path / "out")))
    shapes = shapes_of(exported)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    side = model.config.image_size
    rows = Dataset.from_dict({"pixel_values": images.tolist()}).with_format("numpy")
    processor = ViTImageProcessor(size={"height": side, "width": side})
    # Patches and the class token.
    tokens = mean_length(Measured(exported, rows, processor, None, ""), shapes)
    assert tokens == (side // model.config.patch_size) ** 2 + 1
    found = cost_of(exported, shapes, counted_layers(shapes, "exported"), tokens, None, [])
    expected = hc.count_cost(model, tokens)
    assert (found.macs, found.params, found.nonzero_params) == (
        expected.macs, expected.params, expected.nonzero_params,
    )  # fmt: skip
