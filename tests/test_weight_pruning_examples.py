"""The example scripts of weight pruning run as a person runs them, and the stock one is stock but for three lines."""

import runpy
import sys
from pathlib import Path

import pandas
import pytest
import yaml
from transformers import AutoModelForSequenceClassification

import hf_compress as hc


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(model, tokenizer, sentences, tmp_path, monkeypatch):
    """`run(name, *flags)`: an example on a tiny classifier and 64 sentences; returns the model it leaves."""
    monkeypatch.chdir(tmp_path)
    model("bert", "sequence_classification").save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    Path("data").mkdir()
    for name in ("train", "validation"):
        pandas.DataFrame(sentences, columns=["sentence", "label"]).to_parquet(f"data/{name}.parquet")

    def run(name, *flags):
        text = [str(EXAMPLES / name), "--model", "dense", "--data_dir", "data", "--out", "sparse", *flags]
        monkeypatch.setattr(sys, "argv", text)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return AutoModelForSequenceClassification.from_pretrained("sparse")

    return run


def zeros(network):
    return {
        n: int((p == 0).sum()) / p.numel() for n, p in network.named_parameters() if "encoder" in n and p.ndim == 2
    }


SCHEDULE = ("--epochs", "8", "--pruning_frequency", "1")


def test_a_stock_trainer(run, capsys):
    network = run("prune_weights.py", *SCHEDULE, "--pattern", "2:4", "--target_sparsity", "0.5")
    assert set(zeros(network).values()) == {0.5}
    printed = capsys.readouterr().out
    assert "0.0000 zeros" in printed
    assert printed.index("dense ") < printed.index("sparse {")


def test_the_published_recipe_with_mixed_patterns(run):
    """Keys of the original's lists are understood, and the head is the teacher's."""
    entries = [
        {"op_names": [".*output", ".*intermediate"], "pattern": "1x1", "pruning_scope": "local"},
        {"op_names": [".*query", ".*key"], "pattern": "4x1", "pruning_type": "magnitude", "target_sparsity": 0.5},
    ]
    Path("mixed.yaml").write_text(yaml.safe_dump(entries))
    flags = ("--teacher", "dense", "--pruning_configs", "mixed.yaml", "--target_sparsity", "0.75")
    network = run("prune_weights.py", *SCHEDULE, *flags)
    for name, fraction in zeros(network).items():
        if "output" in name or "intermediate" in name:
            assert fraction == 0.75
        elif "value" in name:
            assert fraction == 0
    attention = [f for n, f in zeros(network).items() if "query" in n or "key" in n]
    assert sum(attention) / len(attention) == 0.5
    (step,) = hc.steps_of(network)
    assert [entry.get("scope") for entry in step["local_configs"]] == ["local", None]
    assert step["local_configs"][1]["criterion"] == "magnitude"
    head = AutoModelForSequenceClassification.from_pretrained("dense").classifier.weight
    assert network.classifier.weight.equal(head)


def test_three_lines_make_a_stock_script_prune(run):
    script = EXAMPLES / "add_callback_to_existing_script.py"
    lines = script.read_text().splitlines(keepends=True)
    stock = [line for line in lines if not line.endswith("# +\n")]
    assert len(lines) - len(stock) == 3
    code = "".join(stock).partition("from __future__")[2]
    for word in ("hc.", "hf_compress", "config", "callbacks"):
        assert word not in code
    Path("stock.py").write_text("".join(stock))
    assert not any(zeros(run(Path("stock.py").resolve(), "--max_train_samples", "16")).values())


def test_tasks_of_sentence_pairs_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("add_callback_to_existing_script.py", "--task_name", "mrpc")
    assert "argument --task_name: invalid choice: 'mrpc'" in capsys.readouterr().err
