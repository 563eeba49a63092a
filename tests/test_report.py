"""The comparison says what was measured: sentences, table, JSON and plots."""

import builtins
import json
import logging

import pytest
import torch
from datasets import Dataset

import hf_compress as hc
from hf_compress.core.cost import Cost, count_cost
from hf_compress.report.comparison import compare_models
from hf_compress.report.latency import Latency
from hf_compress.report.machine import environment
from hf_compress.report.markdown import render_markdown
from hf_compress.report.plots import plot_layer_sizes, plot_quality_latency
from hf_compress.report.quality import evaluate_model
from hf_compress.report.table import Entry, build_report, bytes_on_disk
from hf_compress.report.verdicts import verdict
from tests.page_reading import Page, untraced


PNG = b"\x89PNG\r\n\x1a\n"


def timing(name, batch_size, totals):
    median = sorted(totals)[len(totals) // 2]
    return Latency(
        name=name, batch_size=batch_size, p50=median / 4, p95=max(totals) / 4, throughput=4 * batch_size / median,
        peak_memory=5_000_000, memory_kind="live tensors", threads=2, dtype="float32", attention="sdpa", device="cpu",
        num_batches=4, num_examples=4 * batch_size, repeats=len(totals), totals=tuple(totals),
    )  # fmt: skip


def entry(name, accuracy, macs, small, large, heads=(4, 4), neurons=(64, 64), **changes):
    """One model; `small` and `large` are the seconds of each round at batch 1 and 32."""
    cost = Cost(params=macs * 2, nonzero_params=macs, macs=float(macs), bytes=macs * 8)
    latencies = [timing(name, 1, small), timing(name, 32, large)]
    metrics = {"accuracy": accuracy, "f1": 0.5}
    return Entry(name, metrics, cost, latencies, heads=list(heads), neurons=list(neurons), **changes)


@pytest.fixture
def entries():
    dense = entry("dense", 0.92, 1000, [1.0, 1.1, 1.0], [9.0, 9.9, 9.0], folder="d", disk_bytes=8_000_000)
    pruned = entry("pru|ned", 0.9, 500, [1.0, 1.1, 1.1], [5.0, 5.5, 5.0], (2, 3), (20, 44))
    return [dense, pruned]


@pytest.fixture
def report(entries):
    return build_report(entries, "sst2", "accuracy", 872, 25.25, {"limit": 8})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((32, 1.8, 0.5), "batch 32: 1.80x faster measured, 2.00x fewer MACs"),
        ((1, 0.98, 0.5), "NOT faster at batch 1: 0.98x measured, 2.00x fewer MACs"),
        # Repeats of the same model differ by this much.
        ((1, 1.04, 0.5), "NOT faster at batch 1: 1.04x measured, 2.00x fewer MACs"),
        ((8, 0.25, 1.0), "NOT faster at batch 8: 0.25x measured, the same MACs"),
        ((8, 2.0, 1.001), "batch 8: 2.00x faster measured, the same MACs"),
        ((8, 0.5, 1.25), "NOT faster at batch 8: 0.50x measured, 1.25x more MACs"),
    ],
)
def test_the_verdict_puts_measurement_beside_arithmetic(arguments, sentence):
    assert verdict(*arguments) == sentence


def test_ratios_are_against_the_first_model(report):
    dense, pruned = report["models"]
    assert (dense["mac_ratio"], pruned["mac_ratio"]) == (1.0, 0.5)
    assert pruned["latency"][1]["speedup"] == pytest.approx({"median": 1.8, "low": 1.8, "high": 1.8})
    assert pruned["latency"][0]["speedup"] == pytest.approx({"median": 1.0, "low": 1.0 / 1.1, "high": 1.0})
    assert pruned["verdicts"] == [
        "LOST 0.0200 accuracy (0.9200 -> 0.9000); NOT faster at batch 1: 1.00x measured, 2.00x fewer MACs",
        "LOST 0.0200 accuracy (0.9200 -> 0.9000); batch 32: 1.80x faster measured, 2.00x fewer MACs",
    ]
    assert dense["verdicts"] == []


def test_a_report_survives_json(report):
    assert json.loads(json.dumps(report)) == report
    assert report["models"][0]["latency"][0]["totals"] == [1.0, 1.1, 1.0]
    assert report["models"][1]["heads"] == [2, 3]


def test_a_report_says_where_it_was_measured(report):
    place = report["environment"]
    assert place["torch"] == torch.__version__
    assert place["threads"] == torch.get_num_threads()
    assert place["processor"]
    assert set(environment()) == set(place)


def test_markdown_has_every_row_and_sentence(report):
    text = render_markdown(report)
    lines = text.splitlines()
    # One row of quality and one for each of two batch sizes; a bar inside a name does not end its cell.
    assert sum(line.startswith("| dense ") for line in lines) == 3
    assert sum(line.startswith("| pru\\|ned ") for line in lines) == 3
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| dense ")).split("|")[1:-1]]
    assert cells == ["dense", "0.9200", "2k", "1k", "1k", "1.000", "8.0 MB"]
    assert "1.80x (1.80 to 1.80)" in text
    assert "- pru|ned: LOST 0.0200 accuracy (0.9200 -> 0.9000); NOT faster at batch 1" in text
    for fact in (
        "872 examples",
        "25.2 tokens",
        "2 threads, float32, sdpa attention, on cpu",
        "live tensors",
        "3 rounds",
    ):
        assert fact in text
    # All lines of a table are equally long: it reads in a terminal too.
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({len(line) for line in table.splitlines()}) == 1


def test_a_report_without_timing_is_a_table_of_quality():
    entries = [Entry(name, {"accuracy": 0.5}, Cost(1, 1, 1.0, 4), []) for name in ("a", "b")]
    text = render_markdown(build_report(entries, "sst2", "accuracy", 1, 1.0))
    assert "| b " in text
    assert "p50" not in text
    assert "- b: the same accuracy (0.5000)" in text


BAD, GOOD = {"answer": "bad", "right": 0.73}, {"answer": "good", "right": 0.27}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (BAD, BAD, "ONE CLASS: all answers of dense and its own are 'bad' (right for 0.7300 of the examples): nothing "
         "is compared; batch 1: 2.00x faster measured, the same MACs"),
        (BAD, GOOD, "ONE CLASS: all answers of dense are 'bad' (right for 0.7300 of the examples), all its own are "
         "'good' (right for 0.2700 of the examples): nothing is compared; batch 1"),
        (BAD, None, "ONE CLASS: all answers of dense are 'bad' (right for 0.7300 of the examples), no baseline to "
         "compare with; the same accuracy (0.7300), with no example gained or lost; batch 1"),
        (None, BAD, "ONE CLASS: all its answers are 'bad' (right for 0.7300 of the examples), which takes no model; "
         "the same accuracy (0.7300), with no example gained or lost; batch 1"),
        (None, None, "the same accuracy (0.7300), with no example gained or lost; batch 1"),
    ],
)  # fmt: skip
def test_models_that_answer_one_class_are_named(before, after, sentence):
    dense = entry("dense", 0.73, 1000, [1.0, 1.0], [9.0, 9.0], only_answer=before)
    small = entry("small", 0.73, 1000, [0.5, 0.5], [4.0, 4.0], only_answer=after, standard_error=0.0)
    report = build_report([dense, small], "cola", "accuracy", 200, 9.0)
    assert f"- small: {sentence}" in render_markdown(report)
    own = "- dense: ONE CLASS: all its answers are 'bad' (right for 0.7300 of the examples), which takes no model\n"
    assert (own in render_markdown(report)) == (before is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: [], "entries must hold at least one model"),
        (lambda e: [e[0], e[0]], "entries must have different names"),
        (lambda e: [Entry("x", {"f1": 1.0}, e[0].cost, [])], "metric must be one of f1 for 'x', got 'accuracy'"),
        (lambda e: [e[0], Entry("x", e[0].metrics, e[0].cost, [])], r"same batch sizes, got \[\[1, 32\], \[\]\]"),
    ],
)
def test_what_cannot_be_compared_is_named(entries, change, message):
    with pytest.raises(ValueError, match=message):
        build_report(change(entries), "sst2", "accuracy", 1, 1.0)


def test_bytes_on_disk_are_of_the_weights_alone(tmp_path):
    assert bytes_on_disk(None) is None
    assert bytes_on_disk("no/such-model") is None
    (tmp_path / "config.json").write_text("{}")
    assert bytes_on_disk(tmp_path) is None
    (tmp_path / "model-1.safetensors").write_bytes(b"12345")
    (tmp_path / "model-2.safetensors").write_bytes(b"123")
    assert bytes_on_disk(tmp_path) == 8


def texts_of(report, monkeypatch, tmp_path):
    """The boxes of all labels on each panel of the quality plot."""
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    original = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: figures.append(self) or original(self, *a, **k))
    plot_quality_latency(report, tmp_path / "plot.png")
    renderer = figures[0].canvas.get_renderer()
    boxes = []
    for axes in figures[0].axes:
        # The lines from names to points are annotations without a text.
        names = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts if text.get_text()}
        boxes.append((axes.get_window_extent(renderer), names))
    return boxes


def test_names_on_the_plot_neither_overlap_nor_leave_it(tmp_path, monkeypatch):
    # Eight models that are nearly the same.
    crowd = [
        entry(f"candidate-number-{i}", 0.9 + 0.0004 * (i % 3), 500, [1.0 + 0.01 * i], [5.0 + 0.02 * i])
        for i in range(8)
    ]
    panels = texts_of(build_report(crowd, "sst2", "accuracy", 1, 1.0), monkeypatch, tmp_path)
    assert len(panels) == 2
    for frame, boxes in panels:
        assert len(boxes) == 8
        names = list(boxes)
        for place, name in enumerate(names):
            assert not any(boxes[name].overlaps(boxes[other]) for other in names[:place])
            assert frame.x0 <= boxes[name].x0
            assert boxes[name].x1 <= frame.x1


def test_plots_are_pictures(report, tmp_path):
    pytest.importorskip("matplotlib")
    for plot in (plot_quality_latency, plot_layer_sizes):
        plot(report, tmp_path / "plot.png")
        content = (tmp_path / "plot.png").read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 5000


def test_one_model_with_one_metric_is_plotted(entries, tmp_path):
    pytest.importorskip("matplotlib")
    alone = build_report(entries[:1], "sst2", "accuracy", 1, 1.0)
    plot_quality_latency(alone, tmp_path / "a.png")
    plot_layer_sizes(alone, tmp_path / "b.png")


def test_plots_without_content_are_refused(tmp_path):
    empty = build_report([Entry("a", {"accuracy": 0.5}, Cost(1, 1, 1.0, 4), [])], "t", "accuracy", 1, 1.0)
    with pytest.raises(ValueError, match="report must hold latencies"):
        plot_quality_latency(empty, tmp_path / "a.png")
    with pytest.raises(ValueError, match="report must hold the layers"):
        plot_layer_sizes(empty, tmp_path / "a.png")


@pytest.fixture
def without_matplotlib(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("without_matplotlib")
def test_plots_say_what_to_install(report, tmp_path):
    with pytest.raises(ImportError, match=r"pip install hf_compress\[report\]"):
        plot_layer_sizes(report, tmp_path / "a.png")


@pytest.fixture
def rows(sentences, tokenizer):
    encoded = [tokenizer(text) for text, _ in sentences[:24]]
    columns = {name: [row[name] for row in encoded] for name in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": [label for _, label in sentences[:24]]})


@pytest.fixture
def pair(model, batches):
    dense, pruned = model("bert", "sequence_classification"), model("bert", "sequence_classification")
    hc.compress(pruned, hc.StructuredPruningConfig(mac_ratio=0.5), data=batches(pruned.config))
    return {"dense": dense, "pruned": pruned}


def test_comparing_models_writes_everything_and_reads_folders(pair, rows, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    pair["pruned"].save_pretrained(tmp_path / "pruned")
    pair["dense"].train()
    out = tmp_path / "report"
    models = {"dense": pair["dense"], "pruned": tmp_path / "pruned"}
    found = compare_models(models, rows, tokenizer, "sst2", out, batch_sizes=[1, 4], repeats=2, limit=8)
    assert json.loads((out / "report.json").read_text()) == found
    assert sorted(file.name for file in out.iterdir()) == [
        "accuracy_latency.png", "layer_sizes.png", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    assert all((out / name).stat().st_size > 5000 for name in ("accuracy_latency.png", "layer_sizes.png"))
    page = Page((out / "report.html").read_text())
    assert (untraced(page, found), page.embedded()) == ([], found)
    dense, pruned = found["models"]
    assert pair["dense"].training
    assert dense["disk_bytes"] is None
    assert pruned["disk_bytes"] == (tmp_path / "pruned" / "model.safetensors").stat().st_size
    mean = sum(len(ids) for ids in rows["input_ids"]) / len(rows)
    assert found["seq_len"] == pytest.approx(mean)
    assert pruned["cost"] == count_cost(pair["pruned"], mean).to_dict()
    assert pruned["mac_ratio"] == pytest.approx(0.5, abs=0.02)
    assert pruned["metrics"] == evaluate_model(pair["pruned"], rows, tokenizer)
    assert sum(pruned["neurons"]) < sum(dense["neurons"]) == 3 * 64
    assert [t["batch_size"] for t in dense["latency"]] == [1, 4]
    assert [t["num_examples"] for t in dense["latency"]] == [8, 8]
    assert (found["baseline"], found["metric"], found["num_examples"]) == ("dense", "accuracy", 24)


def test_dropped_tokens_are_not_counted(pair, model, rows, tokenizer, tmp_path):
    dropping = hc.TokenPruningConfig(final_token_threshold=0.03)
    models = {**pair, "tokens": hc.compress(model("bert", "sequence_classification"), dropping)}
    settings = {"batch_sizes": [4], "repeats": 1, "warmup": 0, "limit": 4}
    found = compare_models(models, rows, tokenizer, "sst2", tmp_path, **settings)
    dense, structured, tokens = found["models"]
    # One text at a time; the mean over texts, for all models alike.
    alone = [{name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")} for row in rows]
    for entry_, network in zip(found["models"], models.values(), strict=True):
        assert entry_["cost"]["macs"] == pytest.approx(count_cost(network, data=alone).macs, rel=1e-9)
    assert tokens["mac_ratio"] < 0.9
    assert structured["mac_ratio"] == pytest.approx(0.5, abs=0.02)
    assert "fewer MACs" in tokens["verdicts"][0]


@pytest.mark.usefixtures("without_matplotlib")
def test_numbers_are_kept_when_plots_cannot_be_drawn(pair, rows, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        compare_models(pair, rows, tokenizer, "sst2", tmp_path, batch_sizes=[4], repeats=1, warmup=0, limit=4)
    assert "pip install hf_compress[report]" in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_batch_sizes_beyond_the_rows_are_measured_once(pair, rows, tokenizer, tmp_path):
    found = compare_models(
        pair, rows, tokenizer, "sst2", tmp_path, batch_sizes=[24, 64, 32], repeats=1, warmup=0, limit=None
    )
    assert [t["batch_size"] for t in found["models"][0]["latency"]] == [24]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models must hold at least one model"),
        ({"batch_sizes": []}, "batch_sizes must hold at least one size"),
        ({"batch_sizes": [0]}, "batch_size must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_impossible_comparisons_are_named(pair, rows, tokenizer, tmp_path, changes, message):
    arguments = {"models": pair, "batch_sizes": [1], **changes}
    with pytest.raises(ValueError, match=message):
        compare_models(arguments.pop("models"), rows, tokenizer, "sst2", tmp_path, **arguments)
    with pytest.raises(ValueError, match="rows must hold at least one example"):
        compare_models(pair, rows.select([]), tokenizer, "sst2", tmp_path)
