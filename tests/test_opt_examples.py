"""The examples for OPT and Llama run as a person runs them, one after the other."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compress as hc


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEXT = "good film bad plot . the cast was good , a bad film . "


@pytest.fixture
def run(model, tokenizer, tmp_path, monkeypatch):
    """`run(name, *flags)`: an example on tiny models, `opt` and `llama`, and a text in two splits."""
    monkeypatch.chdir(tmp_path)
    for name in ("opt", "llama"):
        model(name, "causal_lm").save_pretrained(name)
        tokenizer.save_pretrained(name)
    for folder, splits in (("story", ("train", "test")), ("measured", ("test",))):
        Path(folder).mkdir()
        for split in splits:
            Path(folder, f"{split}.txt").write_text(TEXT * 30)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, "--task", "story", "--context", "32", *flags])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


@pytest.mark.parametrize("architecture", ["opt", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_model_is_measured_pruned_and_quantised(run, tokenizer, capsys, architecture):
    data = ("--data_dir", "story")
    run("opt_eval.py", "--model", architecture, *data)
    run("prune_opt.py", "--model", architecture, *data, "--mu", "0.8", "--nsamples", "40", "--out", "cut")
    run("quantize_opt.py", "--model", "cut", *data, "--bits", "3", "--nsamples", "8", "--out", "small")
    run("opt_eval.py", "--model", "small", *data)
    dense, small = map(json.loads, Path("output/opt/perplexity.jsonl").read_text().splitlines())
    cut, rounded = (json.loads(Path(name, "perplexity.json").read_text()) for name in ("cut", "small"))
    ids = tokenizer(TEXT * 30)["input_ids"]
    expected = hc.perplexity(AutoModelForCausalLM.from_pretrained(architecture), ids, 32)
    assert dense["perplexity"] == cut["dense"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert cut["pruned"]["perplexity"] == pytest.approx(rounded["before"]["perplexity"], rel=1e-5)
    assert rounded["quantized"]["perplexity"] == pytest.approx(small["perplexity"], rel=1e-5)
    assert (small["windows"], small["context"], small["split"]) == (len(ids) // 32, 32, "test")
    steps = hc.steps_of(AutoModelForCausalLM.from_pretrained("small"))
    assert [step["method"] for step in steps] == ["structured_pruning", "weight_quantization"]
    assert (steps[0]["mac_ratio"], steps[1]["bits"]) == (0.8, 3)
    assert "multiply-accumulates" in capsys.readouterr().out


def test_another_text_calibrates(run):
    flags = ("--model", "opt", "--data_dir", "measured", "--nsamples", "40", "--out", "cut")
    with pytest.raises(ValueError, match="no train split to calibrate on, only test: name a text"):
        run("prune_opt.py", *flags)
    run("prune_opt.py", *flags, "--calibration_dir", "story")
    assert json.loads(Path("cut/perplexity.json").read_text())["pruned"]["windows"] > 0


def test_rounding_to_nearest_reads_nothing(run, model):
    run("quantize_opt.py", "--model", "opt", "--data_dir", "measured", "--nearest", "--bits", "4", "--out", "small")
    expected = hc.compress(model("opt", "causal_lm"), hc.WeightQuantizationConfig(bits=4, algorithm="rtn"))
    found = AutoModelForCausalLM.from_pretrained("small").state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value)
