"""The table of proximal training: each cell is computed once, on the rows and at the rate that it says."""

import json
import runpy
import sys
from pathlib import Path

import pandas
import pytest
from transformers import BertConfig, BertModel


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, sentences, tokenizer):
    """`run(*flags)`: (what the program printed, the lines of its result file)."""
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    for task in ("first", "second"):
        (tmp_path / task).mkdir()
        rows = pandas.DataFrame(sentences, columns=["sentence", "label"])
        rows[:40].to_parquet(tmp_path / task / "train.parquet")
        for split in ("validation", "test"):
            rows[40:].to_parquet(tmp_path / task / f"{split}.parquet")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        common = ["--teacher", "teacher", "--data_dir", "first", "second", "--tuned_on", "first",
                  "--out", "cells.jsonl",
                  "--train_rows", "24", "--heldout_rows", "16", "--max_steps", "2", "--batch_size", "8",
                  "--student_layers", "2", "--teacher_learning_rates", "1e-3", "--learning_rates", "1e-3", "2e-3",
                  "--bilstm_learning_rates", "1e-3"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["proximal.py", *common, *flags])
        runpy.run_path(str(BENCHMARKS / "proximal.py"), run_name="__main__")
        return capsys.readouterr().out, [json.loads(line) for line in Path("cells.jsonl").read_text().splitlines()]

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_steps is given")
def test_cells_are_computed_once_and_make_a_table(run):
    flags = ("--student", "shallow", "bilstm", "--proximal_weights", "0.4", "0", "--only", "first")
    _, partial = run(*flags, "--seeds", "0", "--methods", "hard")
    printed, cells = run(*flags, "--seeds", "0", "1")
    assert cells[: len(partial)] == partial
    keys = [json.dumps(cell["key"], sort_keys=True) for cell in cells]
    assert len(keys) == len(set(keys))
    of = [cell for cell in cells if cell["key"]["student"] == "shallow" and cell["key"]["method"] == "hard"]
    # The first seed tries both rates on the task that chooses; all else runs at the chosen one.
    assert sorted((c["key"]["task"], c["key"]["seed"]) for c in of) == [("first", 0), ("first", 0), ("first", 1)]
    weights = {cell["key"].get("proximal_weight") for cell in cells if cell["key"]["method"] == "proximal"}
    assert weights == {0.4, 0.0}
    assert all(cell["key"]["rows"] == 24 for cell in cells)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    methods = {row[0].removeprefix("| ") for row in rows}
    assert methods >= {"hard", "distillation", "distillation_labels", "proximal 0.4", "proximal 0"}
    again, unchanged = run(*flags, "--seeds", "0", "1")
    assert unchanged == cells
    assert again.splitlines()[-5:] == printed.splitlines()[-5:]
    _, longer = run("--methods", "hard", "--only", "second", "--seeds", "0")
    assert longer[: len(cells)] == cells
    # The other task runs at the rate that the first one has chosen.
    assert [(c["key"]["task"], c["key"]["method"]) for c in longer[len(cells) :]] == [("second", "hard")]
