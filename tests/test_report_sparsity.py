"""The report's table and heat map of zeros say what is counted in the live weights."""

import json
from pathlib import Path

import pandas
import pytest
import torch

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.core.cost import Cost
from hf_compress.report.markdown import render_markdown
from hf_compress.report.plots import plot_sparsity
from hf_compress.report.sparsity import element_ratio, grid_of, has_zeros, matrices_of
from hf_compress.report.table import Entry, build_report


KINDS = [
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


@pytest.fixture
def pruned(model):
    """A BERT with a different sparsity in each matrix, head and pooler untouched."""
    config = hc.WeightPruningConfig(criterion="magnitude", pattern="4x1", target_sparsity=0.6)
    return hc.compress(model("bert", "sequence_classification"), config)


def linears(model):
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]


def zeros_by_hand(model):
    return sum(int((w == 0).sum()) for w in linears(model)) / sum(w.numel() for w in linears(model))


def report_of(**models):
    entries = [
        Entry(name, {"accuracy": 0.5}, Cost(1, 1, 1.0, 4), [], matrices=matrices_of(m)) for name, m in models.items()
    ]
    return build_report(entries, "sst2", "accuracy", 1, 1.0)


def test_zeros_are_counted_by_layer_and_kind(pruned):
    layers, kinds, cells = grid_of(matrices_of(pruned))
    assert (layers, kinds) == ([0, 1, 2], KINDS)
    weights = dict(pruned.named_parameters())
    for layer, row in zip(layers, cells, strict=True):
        for kind, cell in zip(kinds, row, strict=True):
            weight = weights[f"bert.encoder.layer.{layer}.{kind}.weight"]
            assert cell == int((weight == 0).sum()) / weight.numel()
    assert len({cell for row in cells for cell in row}) > 6


def test_the_element_wise_ratio_has_heads_and_poolers_but_no_embeddings_below_the_line(pruned):
    assert len(linears(pruned)) == 3 * 6 + 2
    assert element_ratio(matrices_of(pruned)) == pytest.approx(zeros_by_hand(pruned), abs=1e-12)
    assert [m.kind for m in matrices_of(pruned) if m.layer is None] == ["bert.pooler.dense", "classifier"]


def test_a_shared_weight_is_counted_once(model):
    network = model("bert", "sequence_classification")
    before = element_ratio(matrices_of(network)), len(matrices_of(network))
    network.twin = torch.nn.Linear(32, 2)
    network.twin.weight = network.classifier.weight
    assert (element_ratio(matrices_of(network)), len(matrices_of(network))) == before


def test_markdown_shows_pruned_models_only(model, pruned):
    dense = model("bert", "sequence_classification")
    assert not has_zeros(matrices_of(dense))
    report = report_of(dense=dense, pruned=pruned)
    assert [m["element_sparsity"] for m in report["models"]] == [0.0, zeros_by_hand(pruned)]
    assert json.loads(json.dumps(report)) == report
    text = render_markdown(report)
    assert f"pruned: element-wise ratio {zeros_by_hand(pruned):.4f}" in text
    assert "outside the layers: bert.pooler.dense 0.0000, classifier 0.0000" in text
    assert "dense: element-wise" not in text
    table = [line for line in text.splitlines() if line.startswith("| ") and line[2:3].isdigit()]
    cells = [[float(cell) for cell in line.split("|")[2:-1]] for line in table]
    assert cells == [[round(cell, 4) for cell in row] for row in grid_of(matrices_of(pruned))[2]]
    assert "Zeros in weights" not in render_markdown(report_of(dense=dense))


@pytest.mark.parametrize("architecture", ["distilbert", "modernbert", "llama"])
def test_layers_are_found_in_every_architecture(model, architecture):
    network = model(architecture, "sequence_classification")
    layers, kinds, cells = grid_of(matrices_of(network))
    assert layers == list(range(network.config.num_hidden_layers))
    assert len(kinds) >= 4
    assert all(cell == 0 for row in cells for cell in row)


def test_a_missing_matrix_is_a_dash(pruned, tmp_path):
    pruned.bert.encoder.layer[1].intermediate.dense = torch.nn.Identity()
    report = report_of(pruned=pruned)
    assert "- |" in render_markdown(report)
    pytest.importorskip("matplotlib")
    plot_sparsity(report, tmp_path / "sparsity.png")


def test_the_heat_map_shows_the_same_numbers(model, pruned, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, original = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: drawn.append(self) or original(self, *a, **k))
    dense = model("bert", "sequence_classification")
    plot_sparsity(report_of(dense=dense, pruned=pruned), tmp_path / "sparsity.png")
    assert (tmp_path / "sparsity.png").stat().st_size > 5000
    panels = [axes for axes in drawn[0].axes if axes.images]
    assert [axes.get_title() for axes in panels] == [f"pruned: element-wise ratio {zeros_by_hand(pruned):.3f}"]
    cells = grid_of(matrices_of(pruned))[2]
    assert panels[0].images[0].get_array().tolist() == cells
    assert [text.get_text() for text in panels[0].texts] == [f"{cell:.2f}" for row in cells for cell in row]


def test_a_heat_map_without_zeros_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="report must hold a model with zeros"):
        plot_sparsity(report_of(dense=model("bert", "sequence_classification")), tmp_path / "sparsity.png")


def test_the_command_writes_table_and_heat_map(pruned, model, tokenizer, sentences, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name, network in (("dense", model("bert", "sequence_classification")), ("sparse", pruned)):
        network.save_pretrained(name)
        tokenizer.save_pretrained(name)
    Path("data").mkdir()
    for name in ("train", "validation"):
        pandas.DataFrame(sentences, columns=["sentence", "label"]).to_parquet(f"data/{name}.parquet")
    arguments = ["report", "--models", "dense", "sparse", "--data_dir", "data", "--max_length", "16"]
    arguments += ["--output_dir", "report"]
    assert main([*arguments, "--latency_batch_sizes", "4", "--latency_repeats", "1", "--latency_examples", "8"]) == 0
    assert f"sparse: element-wise ratio {zeros_by_hand(pruned):.4f}" in capsys.readouterr().out
    assert Path("report/sparsity.png").stat().st_size > 5000
    found = json.loads(Path("report/report.json").read_text())["models"]
    assert found[1]["element_sparsity"] == pytest.approx(zeros_by_hand(pruned))
    assert sum(m["zeros"] for m in found[1]["matrices"]) == sum(int((weight == 0).sum()) for weight in linears(pruned))
