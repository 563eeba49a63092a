"""The demo on a tiny model: what counts as done, and what it says of the reloaded model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.cli.main import main
from hf_compress.core.digests import weights_digest
from hf_compress.stages import demo as demo_stage
from tests.test_bad_input import write_model


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [f"{'good' if i % 2 else 'bad'} w{i % 90} w{i % 7} w{i % 11}\t{i % 2}" for i in range(300)]
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_stage, "report", lambda arguments: {})
    monkeypatch.setattr("hf_compress.cli.output.print_report", lambda folder: None)
    return tmp_path


def run(*flags):
    common = "demo --model_name_or_path model --data_dir data --output_dir out --max_length 16"
    return main([*common.split(), *flags])


def weights(stage):
    return Path("out", stage, "model.safetensors").read_bytes()


def test_a_stage_is_done_for_its_inputs_only(place, monkeypatch, capsys, caplog):
    monkeypatch.setattr(demo_stage, "compare_reloaded", lambda folder: {
        "weights_equal": True, "logits_differ_by": 0.0, "equal": True})  # fmt: skip
    caplog.set_level(logging.INFO, logger="hf_compress")
    assert run("--mac_ratio", "0.7") == 0
    first = {stage: weights(stage) for stage in ("dense", "pruned", "recovered")}
    before = Path("out/dense/model.safetensors").stat().st_mtime_ns
    caplog.clear()
    assert run("--mac_ratio", "0.7") == 0
    assert caplog.text.count("Done before with the same inputs") == 3
    assert {stage: weights(stage) for stage in first} == first

    caplog.clear()
    assert run("--mac_ratio", "0.5") == 0
    assert caplog.text.count("Done before with the same inputs") == 1
    assert caplog.text.count("Again: mac_ratio changed.") == 2
    assert Path("out/dense/model.safetensors").stat().st_mtime_ns == before
    results = json.loads(Path("out/pruned/results.json").read_text())
    assert results["inputs"]["mac_ratio"] == 0.5
    assert results["mac_ratio"] <= 0.5
    assert weights("pruned") != first["pruned"]

    caplog.clear()
    assert run("--mac_ratio", "0.5", "--recovery_epochs", "2") == 0
    assert caplog.text.count("Done before with the same inputs") == 2
    assert "Again: recovery_epochs changed." in caplog.text

    caplog.clear()
    with Path("data/train.tsv").open("a") as file:
        file.write("good w1 w2\t1\n")
    assert run("--mac_ratio", "0.5", "--recovery_epochs", "2") == 0
    assert caplog.text.count("Again: data changed.") == 3

    Path("out/pruned/model.safetensors").unlink()
    caplog.clear()
    assert run("--mac_ratio", "0.5", "--recovery_epochs", "2") == 0
    assert caplog.text.count("Done before with the same inputs") == 2


@pytest.mark.slow
def test_a_fresh_process_opens_the_same_model(place):
    found = demo_stage.compare_reloaded("model")
    assert found["weights_equal"]
    assert found["logits_differ_by"] <= 1e-5
    assert found["equal"]


@pytest.mark.parametrize(("shift", "flip"), [(0.0, False), (1e-7, False), (0.1, False), (0.0, True)])
def test_verdict_on_the_reloaded_model(place, monkeypatch, shift, flip):
    opened = demo_stage.open_model("model").eval()
    with torch.no_grad():
        logits = opened(input_ids=torch.arange(5, 21)[None]).logits + shift
    answer = {"weights": "another" if flip else weights_digest(opened), "logits": logits.tolist()}
    monkeypatch.setattr(demo_stage, "_RELOAD", f"print({json.dumps(answer)!r})")
    found = demo_stage.compare_reloaded("model")
    assert found["weights_equal"] is not flip
    assert found["logits_differ_by"] == pytest.approx(shift, abs=1e-6)
    assert found["equal"] == (shift < 1e-5 and not flip)


def test_digest_sees_every_bit(place):
    opened = demo_stage.open_model("model")
    before = weights_digest(opened)
    content = load_file("model/model.safetensors")
    content["classifier.bias"][0] = torch.nextafter(content["classifier.bias"][0], torch.tensor(1.0))
    save_file(content, "model/model.safetensors", metadata={"format": "pt"})
    assert weights_digest(demo_stage.open_model("model")) != before


@pytest.mark.parametrize(("flag", "value"), [
    ("--mac_ratio", "7"), ("--mac_ratio", "0"), ("--epochs", "-1"), ("--epochs", "0"), ("--recovery_epochs", "nan"),
    ("--seed", "-1"), ("--output_dir", ""), ("--output_dir", "model/config.json"),
])  # fmt: skip
def test_dials_are_checked_before_the_first_stage(place, capsys, flag, value):
    assert run(flag, value) == 2
    assert not Path("out").exists()
