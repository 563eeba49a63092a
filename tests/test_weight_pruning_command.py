"""`hf-compress prune-weights` and the example script, on a tiny model and generated sentences."""

import json
import runpy
import sys
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import hf_compress as hc
from hf_compress.cli.main import main


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "add_callback_to_existing_script.py"


@pytest.fixture
def folder(model, tokenizer, sentences, tmp_path, monkeypatch):
    """A folder with a tiny classifier and 64 labelled sentences; commands run inside it."""
    monkeypatch.chdir(tmp_path)
    model("bert", "sequence_classification").save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("data").mkdir()
    for name in ("train", "validation"):
        pandas.DataFrame(sentences, columns=["sentence", "label"]).to_parquet(f"data/{name}.parquet")
    return tmp_path


COMMON = [
    "prune-weights",
    "--model_name_or_path",
    "model",
    "--data_dir",
    "data",
    "--use_cpu",
    "--disable_tqdm",
    "true",
]
COMMON += ["--max_length", "16", "--num_train_epochs", "4", "--per_device_train_batch_size", "16"]
COMMON += ["--learning_rate", "1e-3", "--pruning_frequency", "2", "--warmup_epochs", "1", "--cooldown_epochs", "1"]


def encoder(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return model, {n: p for n, p in model.named_parameters() if "encoder" in n and p.ndim == 2}


def test_two_of_four(folder, capsys):
    assert main([*COMMON, "--pattern", "2:4", "--target_sparsity", "0.5", "--output_dir", "sparse"]) == 0
    model, weights = encoder("sparse")
    assert len(weights) == 18
    for weight in weights.values():
        assert (weight.reshape(len(weight), -1, 4) == 0).sum(2).eq(2).all()
    results = json.loads(Path("sparse/results.json").read_text())
    assert set(results["sparsity_by_layer"].values()) == {0.5}
    assert len(results["sparsity_by_layer"]) == 18
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in linears) / sum(weight.numel() for weight in linears)
    assert results["element_sparsity"] == pytest.approx(zeros)
    assert 0.4 < zeros < 0.5
    assert "accuracy" in capsys.readouterr().out


def test_dense_training_of_the_same_kind(folder):
    assert main([*COMMON, "--do_prune", "false", "--output_dir", "dense"]) == 0
    model, weights = encoder("dense")
    assert all(weight.all() for weight in weights.values())
    assert hc.steps_of(model) == []
    assert json.loads(Path("dense/results.json").read_text())["element_sparsity"] == 0


def test_a_model_without_linear_layers(folder, tokenizer, capsys):
    """GPT-2 is made of `Conv1D`."""
    sizes = {"vocab_size": 99, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
    GPT2ForSequenceClassification(GPT2Config(**sizes)).save_pretrained("model")
    flags = [*COMMON, "--max_steps", "2", "--output_dir", "dense"]
    assert main([*flags, "--do_prune", "false"]) == 0
    results = json.loads(Path("dense/results.json").read_text())
    assert (results["element_sparsity"], results["sparsity_by_layer"]) == (0, {})
    assert main([*flags, "--max_steps", "8"]) == 2
    assert "must select a layer of Linear (pruning_op_types)" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--alpha_task", "0", "--alpha_layer", "5"], ["--alpha_layer", "5"]])
def test_hidden_states_need_a_teacher(folder, capsys, flags):
    assert main([*COMMON, *flags, "--output_dir", "sparse"]) == 2
    assert "teacher_name_or_path must be given with alpha_task=" in capsys.readouterr().err


def test_mixed_patterns_from_a_file_with_a_teacher(folder):
    """The published mixed recipe: local configs as a list, the last hidden state instead of the labels."""
    recipe = {
        "teacher_name_or_path": "model",
        "alpha_task": 0,
        "alpha_output": 0,
        "alpha_layer": 5.0,
        "layer_map": [-1, -1, 2],
        "output_dir": "mixed",
        "local_configs": [
            {"op_names": [".*output", ".*intermediate"], "pattern": "1x1", "scope": "local", "target_sparsity": 0.8},
            {"op_names": [".*query", ".*key"], "pattern": "4x1", "min_sparsity_ratio_per_op": 0.5},
        ],
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([*COMMON, "--config", "recipe.yaml"]) == 0
    model, weights = encoder("mixed")
    for name, weight in weights.items():
        zeros = int((weight == 0).sum())
        if "output" in name or "intermediate" in name:
            assert zeros == int(weight.numel() * 0.8)
        else:
            assert zeros == 0 if "value" in name else zeros >= weight.numel() // 2
    (step,) = hc.steps_of(model)
    assert step["local_configs"] == recipe["local_configs"]
    # Only hidden states were taught: the head, which no loss reached, is the one that training began with.
    head = AutoModelForSequenceClassification.from_pretrained("model").classifier.weight
    assert torch.equal(model.classifier.weight, head)


CHANNELS = ["--pattern", "1xchannel", "--target_sparsity", "0.5", "--slim", "true", "--output_dir", "small"]


def test_slim(folder, capsys):
    assert main([*COMMON, *CHANNELS, "--op_names", ".*intermediate.dense"]) == 0
    model, weights = encoder("small")
    widths = [weight.shape[0] for name, weight in weights.items() if "intermediate" in name]
    assert sum(widths) == 96
    results = json.loads(Path("small/results.json").read_text())
    # What training reached, measured before the zeros were cut out.
    assert sum(results["sparsity_by_layer"].values()) == pytest.approx(1.5)
    assert results["slimmed"]["neurons_per_layer"] == widths
    assert results["slimmed"]["after"]["macs"] < 0.9 * results["slimmed"]["before"]["macs"]
    assert hc.count_cost(model).params == results["slimmed"]["after"]["params"]
    # The smaller model says what the evaluated one said.
    assert main(["evaluate", "--models", "small", "--data_dir", "data", "--max_length", "16"]) == 0
    printed = capsys.readouterr().out
    assert f"neurons left by layer  {' '.join(map(str, widths))}" in printed
    assert f"{results['eval_accuracy']:.4f}" in printed.partition("saved to small")[2]


def test_slim_says_when_there_is_nothing_to_cut(folder, capsys):
    """Rows of queries and keys do not make whole heads."""
    assert main([*COMMON, *CHANNELS, "--op_names", ".*query"]) == 0
    assert "slim: nothing to remove" in capsys.readouterr().out
    results = json.loads(Path("small/results.json").read_text())
    assert results["slimmed"] is None
    assert "neurons_per_layer" not in hc.steps_of(encoder("small")[0])[0]


@pytest.mark.parametrize("flags", [["--pattern", "4x1"], ["--do_prune", "false"]])
def test_slim_needs_a_channel_pattern(folder, capsys, flags):
    assert main([*COMMON, *CHANNELS, *flags]) == 2
    assert "slim must go with do_prune and a pattern 'Nxchannel'" in capsys.readouterr().err
    assert not Path("small").exists()


AT_ONCE = [*COMMON, "--num_train_epochs", "0", "--calibration_samples", "32", "--pattern", "2:4"]
AT_ONCE += ["--target_sparsity", "0.5", "--scope", "local", "--output_dir", "sparse"]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "snip", "magnitude"])
def test_at_once(folder, criterion, capsys):
    assert main([*AT_ONCE, "--criterion", criterion]) == 0
    model, weights = encoder("sparse")
    assert all(((w.reshape(len(w), -1, 4) == 0).sum(2) == 2).all() for w in weights.values())
    (step,) = hc.steps_of(model)
    assert (step["criterion"], step["achieved_sparsity"]) == (criterion, 0.5)
    results = json.loads(Path("sparse/results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    assert set(results["sparsity_by_layer"].values()) == {0.5}
    assert results.get("calibration_samples") == (None if criterion == "magnitude" else 32)
    assert "prune_seconds" in capsys.readouterr().out
    # The seed of the draw reaches the draw, and the draw the result.
    assert main([*AT_ONCE, "--criterion", criterion, "--calibration_seed", "1", "--output_dir", "other"]) == 0
    _, others = encoder("other")
    same = all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert same == (criterion == "magnitude")


def test_at_once_or_in_training(folder, capsys):
    for flags, message in (
        (["--criterion", "wanda", "--num_train_epochs", "2"], "num_train_epochs must be 0 (and max_steps unset)"),
        (["--criterion", "wanda", "--max_steps", "2"], "with criterion='wanda', which prunes at once, got 0 and 2"),
        (["--teacher_name_or_path", "model"], "teacher_name_or_path must be empty with num_train_epochs=0"),
        (["--criterion", "wanda", "--calibration_samples", "65"], "calibration_samples must be in 1..64"),
        (["--criterion", "sparsegpt", "--scope", "global"], "scope must be 'local' with criterion='sparsegpt'"),
    ):
        assert main([*AT_ONCE, *flags]) == 2
        assert message in capsys.readouterr().err
        assert not Path("sparse/config.json").exists()


def test_the_example_script(folder, monkeypatch, capsys):
    flags = ["--model", "model", "--data_dir", "data", "--out", "sparse"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *flags])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "bert.encoder.layer.0.attention.self.query.weight: 0.5000 zeros" in capsys.readouterr().out
    _, weights = encoder("sparse")
    assert all((weight.reshape(len(weight), -1, 4) == 0).sum(2).eq(2).all() for weight in weights.values())
    added = [line for line in EXAMPLE.read_text().splitlines() if line.endswith("# +")]
    assert len(added) == 3


def test_slim_at_once(folder):
    """Channels by weight norm, cut out without any training."""
    flags = ["--num_train_epochs", "0", "--criterion", "magnitude", "--op_names", ".*intermediate.dense"]
    assert main([*COMMON, *CHANNELS, *flags]) == 0
    widths = [weight.shape[0] for name, weight in encoder("small")[1].items() if "intermediate" in name]
    assert sum(widths) == 96
    assert json.loads(Path("small/results.json").read_text())["slimmed"]["neurons_per_layer"] == widths
