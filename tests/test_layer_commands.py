"""`--layer_by_layer` of the commands, against the same commands with the model in memory."""

import json

import pytest
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.cli.main import main
from tests.labelled_models import write_rows
from tests.rounding import assert_compressed_alike


DATA = "--data_dir data --max_length 16 --calibration_samples 48"
COMMANDS = {
    "prune": f"prune-structure {DATA} --order sequential --mac_ratio 0.6 --ridge 0.001",
    "dense target": f"prune-structure {DATA} --order sequential --mac_ratio 0.6 --ridge 0.001 --target dense",
    "gptq": f"quantize {DATA} --bits 4",
    "rtn": "quantize --bits 4 --algorithm rtn",
}


@pytest.fixture
def place(tmp_path, model, tokenizer, sentences, monkeypatch):
    model("bert", "sequence_classification").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "data" / "train.tsv", [{"text": text, "label": label} for text, label in sentences])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_the_result_is_that_of_the_command_without_it(place, line, capsys):
    common = [*line.split(), "--model_name_or_path", "model", "--device", "cpu", "--output_dir"]
    assert main([*common, "whole"]) == 0
    capsys.readouterr()
    assert main([*common, "layers", "--layer_by_layer"]) == 0
    assert "saved to layers" in capsys.readouterr().out
    models = [AutoModelForSequenceClassification.from_pretrained(place / name) for name in ("layers", "whole")]
    assert_compressed_alike(*models)
    files = {path.relative_to(place / "whole") for path in (place / "whole").rglob("*") if path.is_file()}
    lacking = {path for path in files if not (place / "layers" / path).is_file()}
    assert {path.name for path in lacking} == {"model.safetensors"}
    layers, whole = (json.loads((place / name / "results.json").read_text()) for name in ("layers", "whole"))
    assert layers["step"] == whole["step"] == hc.steps_of(models[0])[-1]
    # The command without it counts with the tokens of an average example, this one with 128.
    assert layers["after"]["params"] == whole["after"]["params"]
    assert layers["after"]["bytes"] == whole["after"]["bytes"]
    assert layers["after"]["nonzero_params"] is None
    assert layers.get("calibration_samples") == whole.get("calibration_samples")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prune-structure --model_name_or_path model", "order must be 'sequential' layer by layer"),
        ("quantize --model_name_or_path model --max_positions 64", "max_positions must be left out"),
        ("quantize --model_name_or_path nowhere", "source must be a folder"),
        ("quantize --model_name_or_path model --output_dir model", "is the folder of model_name_or_path"),
    ],
)
def test_what_it_cannot_do_is_refused(place, line, message, capsys):
    extra = [] if "--output_dir" in line else ["--output_dir", "out"]
    assert main([*line.split(), *DATA.split(), "--layer_by_layer", *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out" / "config.json").exists()


def test_tied_weights_count_once(place, model, tokenizer, capsys):
    model("opt", "causal_lm").save_pretrained(place / "decoder")
    tokenizer.save_pretrained(place / "decoder")
    line = "quantize --model_name_or_path decoder --bits 4 --algorithm rtn --device cpu --output_dir"
    assert main([*line.split(), "whole"]) == main([*line.split(), "layers", "--layer_by_layer"]) == 0
    layers, whole = (json.loads((place / name / "results.json").read_text()) for name in ("layers", "whole"))
    for moment in ("before", "after"):
        assert layers[moment] == {**whole[moment], "nonzero_params": None}
