"""Packed weights in the layout of compressed-tensors: what other programs read, and what the layout cannot say."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompressedTensorsConfig,
)

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.core.exported import ExportedModel
from hf_compress.export.folder import export_model
from hf_compress.methods.weight_quantization.packed import PackedModule
from tests.labelled_models import TEXTS, write_perfect_model, write_rows
from tests.test_bad_input import write_tokenizer


FORMAT = "compressed-tensors"
SETTINGS = {
    "4 bits": {"bits": 4},
    "8 bits": {"bits": 8},
    "groups": {"bits": 4, "group_size": 16},
    "symmetric": {"bits": 4, "group_size": 8, "symmetric": True},
    "symmetric, 8 bits": {"bits": 8, "symmetric": True},
    "in order": {"bits": 4, "group_size": 16, "act_order": True, "static_groups": True},
}


@pytest.fixture
def quantized(model, batches):
    """A small model with packed weights."""

    def make(architecture="llama", head="causal_lm", pruning=None, **settings):
        made = model(architecture, head)
        steps = [] if pruning is None else [pruning]
        data = batches(made.config, count=2)
        return hc.compress(made, *steps, hc.WeightQuantizationConfig(**{"algorithm": "rtn", **settings}), data=data)

    return make


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def bits_of(words, bits, count):
    """By hand: bit i of a row is bit `i % 32` of its word `i // 32`."""
    found = []
    for number in range(count):
        places = range(number * bits, (number + 1) * bits)
        found.append(sum(((int(words[place // 32]) >> (place % 32)) & 1) << at for at, place in enumerate(places)))
    return found


@pytest.mark.parametrize("setting", ["4 bits", "groups", "symmetric", "8 bits"])
def test_the_files_hold_the_weights(tmp_path, quantized, setting):
    model = quantized(**SETTINGS[setting])
    report = export_model(model, tmp_path / "out", [], None, FORMAT)
    saved, bits = load_file(tmp_path / "out" / "model.safetensors"), SETTINGS[setting]["bits"]
    layers = packed_layers(model)
    assert report["layers"] == len(layers) > 0
    for name, module in list(layers.items())[:3]:
        rows, columns = module.weight.shape
        assert saved[f"{name}.weight_shape"].tolist() == [rows, columns]
        assert f"{name}.weight" not in saved
        scale = saved[f"{name}.weight_scale"]
        zeros = [[2 ** (bits - 1)] * scale.shape[1]] * rows
        if not module.storage.symmetric:
            packed = saved[f"{name}.weight_zero_point"]
            by_group = [bits_of(packed[:, group], bits, rows) for group in range(scale.shape[1])]
            zeros = [list(row) for row in zip(*by_group, strict=True)]
        each = columns // scale.shape[1]
        for row in (0, rows - 1):
            codes = bits_of(saved[f"{name}.weight_packed"][row], bits, columns)
            for column, code in enumerate(codes):
                group = column // each
                assert float(module.weight[row, column]) == float(scale[row, group] * (code - zeros[row][group]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert not any("hf_compress" in str(value) for value in config.values())


@pytest.mark.parametrize(("architecture", "head"), [("llama", "causal_lm"), ("bert", "base"), ("opt", "causal_lm")])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_transformers_reads_the_same_weights(tmp_path, quantized, architecture, head, setting):
    pytest.importorskip("compressed_tensors")
    options = SETTINGS[setting]
    model = quantized(architecture, head, **options, algorithm="gptq" if "act_order" in options else "rtn")
    export_model(model, tmp_path / "out", [], None, FORMAT)
    wanted = "dequantize" in inspect.signature(CompressedTensorsConfig).parameters
    config = CompressedTensorsConfig(**({"dequantize": True} if wanted else {"run_compressed": False}))
    kind = AutoModelForCausalLM if head == "causal_lm" else AutoModel
    with pytest.warns(UserWarning, match="quantization_config"):
        opened = kind.from_pretrained(tmp_path / "out", quantization_config=config)
    for name, module in packed_layers(model).items():
        assert torch.equal(opened.get_submodule(name).weight, module.weight), name
    packed, state = packed_layers(model), opened.state_dict()
    for name, value in model.state_dict().items():
        assert name.rpartition(".")[0] in packed or torch.equal(state[name], value), name


REFUSED = {
    "without packed weights": (None, "must have a model with packed weights, got a LlamaForCausalLM without"),
    "3 bits": ({"bits": 3}, "must have weights of 4 or 8 bits, which all that reads it can unpack, got 3:"),
    "groups in order": (
        {"bits": 4, "group_size": 16, "act_order": True, "algorithm": "gptq"},
        "must have groups of neighbouring inputs, got those of act_order",
    ),
    "groups that do not divide": ({"bits": 4, "group_size": 12}, "must have whole groups, got 32 inputs of"),
    "Conv1D": ({"architecture": "gpt2", "bits": 4}, "must have weights of linear layers, got the Conv1D"),
    "unequal layers": (
        {"bits": 4, "pruning": hc.StructuredPruningConfig(mac_ratio=0.5, seq_len=16)},
        "must have a model that stock transformers can build: Layer 1 has 22 neurons",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_the_layout_cannot_say_is_refused(tmp_path, model, quantized, what):
    settings, expected = REFUSED[what]
    made = model("llama", "causal_lm") if settings is None else quantized(**settings)
    with pytest.raises(ValueError, match=re.escape(f"format {FORMAT} {expected}")) as found:
        export_model(made, tmp_path / "out", [], None, FORMAT)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_an_exported_model_writes_no_text(tmp_path):
    class Nothing(ExportedModel):
        runtime = "ONNX Runtime"

        def compute(self, inputs):
            return []

    exported = Nothing(tmp_path / "model.onnx", ["input_ids"], [], None)
    with pytest.raises(
        ValueError, match="generate must be called on the original, got a model in ONNX Runtime"
    ) as found:
        exported.generate(torch.ones(1, 2, dtype=torch.int64))
    assert "\n" not in str(found.value)


def test_int8_and_unknown_formats_are_refused(tmp_path, quantized):
    with pytest.raises(ValueError, match=f"int8 must be left out for format {FORMAT}"):
        export_model(quantized(bits=4), tmp_path / "out", [], None, FORMAT, int8=True)
    with pytest.raises(ValueError, match="format must be one of onnx, .*, compressed-tensors, got 'tflite'"):
        export_model(quantized(bits=4), tmp_path / "out", [], None, "tflite")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = write_perfect_model(tmp_path / "dense", ["no", "yes"])
    rows = [{"text": text, "label": answer} for text, answer in zip(TEXTS, answers, strict=True)]
    write_rows(tmp_path / "data" / "validation.jsonl", rows)
    options = "--data_dir data --output_dir out --format compressed-tensors --max_length 32"
    line = f"export --model_name_or_path dense {options}"
    assert main(line.split()) == 2
    assert "must have a model with packed weights" in capsys.readouterr().err
    model = AutoModelForSequenceClassification.from_pretrained("dense")
    hc.compress(model, hc.WeightQuantizationConfig(bits=8, algorithm="rtn")).save_pretrained("packed")
    write_tokenizer(tmp_path / "packed")
    assert main(line.replace("dense", "packed").split()) == 0
    said = capsys.readouterr().out
    assert re.search(r"12 packed layers, read back bit for bit; model.safetensors 0\.\d MB", said)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"]["PyTorch"]["accuracy"] > 0.9
    assert (tmp_path / "out" / "tokenizer.json").is_file()
