"""The demo: its recipe on a small model, what can be replaced in it, and what it says of the reloaded model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_compress.cli.main import main
from hf_compress.core.digests import weights_digest
from hf_compress.recipes import demo
from hf_compress.stages.models import open_model
from tests.file_trees import tree
from tests.test_bad_input import write_model


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [f"{'good' if i % 2 else 'bad'} w{i % 90} w{i % 7} w{i % 11}\t{i % 2}" for i in range(300)]
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*flags):
    common = "demo --model_name_or_path model --data_dir data --output_dir out --max_length 16"
    return main([*common.split(), *flags])


def test_a_plan_is_printed_and_nothing_is_written(place, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    files = tree()
    assert run("--mac_ratio", "0.7", "--dry_run") == 0
    assert tree() == files
    printed = capsys.readouterr().out
    stages = ("dense", "pruned", "recovered", "dense_onnx", "exported", "report")
    assert [line.split()[1] for line in printed.splitlines()[:-1]] == list(stages)
    assert printed.rstrip().endswith("in out")


@pytest.mark.slow
def test_the_whole_demo_and_again(place, capsys, caplog):
    # Exporters of torch write thousands of records for themselves, which pytest would collect.
    caplog.handler.setLevel(logging.INFO)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    # This model hardly learns, so its outputs have next to no spread.
    assert run("--int8_bound", "100") == 0
    printed = capsys.readouterr().out
    assert "reloaded with plain from_pretrained in a fresh process: bit-equal weights" in printed
    found = json.loads(Path("out/report/report.json").read_text())
    names = ["dense", "dense_onnx int8", "pruned", "recovered", "exported int8"]
    assert [model["name"] for model in found["models"]] == names
    assert Path("out/report/report.html").is_file()
    assert run("--int8_bound", "100", "--mac_ratio", "0.7", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "finetune: done before with the same inputs" in printed
    assert "structured_pruning: again (mac_ratio changed)" in printed
    assert "stage 'pruned' changed" in printed


def test_only_what_is_missing_is_embedded(place, monkeypatch):
    monkeypatch.setattr(demo, "embedded_model", lambda: "encoder")
    monkeypatch.setattr(demo, "write_embedded_data", lambda folder: folder.mkdir(parents=True))
    values = {"model_name_or_path": "model", "task_name": "sst2", "output_dir": "mine"}
    assert demo.with_embedded(values) == values
    assert not Path("mine").exists()
    assert demo.with_embedded({"seed": 1}) == {
        "seed": 1, "model_name_or_path": "encoder", "data_dir": "demo_output/bbc_news"
    }  # fmt: skip
    assert demo.with_embedded({"data_dir": "data"}) == {"data_dir": "data", "model_name_or_path": "encoder"}


def test_names_of_the_recipe():
    written = yaml.safe_load(Path(demo.RECIPE).read_text())
    names = [stage.get("name", stage["stage"]) for stage in written["stages"]]
    assert {demo.RECOVERED, demo.REPORT} < set(names)
    assert demo.output_dir({}) == written["output_dir"]


@pytest.mark.slow
def test_a_fresh_process_opens_the_same_model(place):
    found = demo.compare_reloaded("model")
    assert found["weights_equal"]
    assert found["logits_differ_by"] <= 1e-5
    assert found["equal"]


@pytest.mark.parametrize(("shift", "flip"), [(0.0, False), (1e-7, False), (0.1, False), (0.0, True)])
def test_verdict_on_the_reloaded_model(place, monkeypatch, shift, flip):
    opened = open_model("model").eval()
    with torch.no_grad():
        logits = opened(input_ids=torch.arange(5, 21)[None]).logits + shift
    answer = {"weights": "another" if flip else weights_digest(opened), "logits": logits.tolist()}
    monkeypatch.setattr(demo, "_RELOAD", f"print({json.dumps(answer)!r})")
    found = demo.compare_reloaded("model")
    assert found["weights_equal"] is not flip
    assert found["logits_differ_by"] == pytest.approx(shift, abs=1e-6)
    assert found["equal"] == (shift < 1e-5 and not flip)


def test_digest_sees_every_bit(place):
    opened = open_model("model")
    before = weights_digest(opened)
    content = load_file("model/model.safetensors")
    content["classifier.bias"][0] = torch.nextafter(content["classifier.bias"][0], torch.tensor(1.0))
    save_file(content, "model/model.safetensors", metadata={"format": "pt"})
    assert weights_digest(open_model("model")) != before


@pytest.mark.parametrize(("flags", "says"), [
    ("--mac_ratio 7", "mac_ratio must be in"), ("--mac_ratio 0", "mac_ratio must be in"), ("--seed -1", "seed"),
    ("--epochs 2", "'epochs' is not an option"), ("--output_dir model/config.json", "output_dir"),
    ("--data_dir nowhere", "data_dir must be a folder"), ("--model_name_or_path nowhere", "there is no folder"),
    ("other.yaml", "demo takes no recipe"),
])  # fmt: skip
def test_dials_are_checked_before_the_first_stage(place, capsys, flags, says):
    files = tree()
    name, *_ = flags.split()
    common = {"--model_name_or_path": "model", "--data_dir": "data", "--output_dir": "out", "--max_length": "16"}
    kept = [word for flag, value in common.items() if flag != name for word in (flag, value)]
    assert main(["demo", *flags.split(), *kept]) == 2
    assert says in capsys.readouterr().err
    assert tree() == files
