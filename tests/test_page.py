"""The page of a report: every number stands in report.json, nothing is loaded, and it reads in light and dark."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

import hf_compress as hc
from hf_compress.core.cost import Cost
from hf_compress.report.comparison import _lineage
from hf_compress.report.page import render_page
from hf_compress.report.page_charts import quality_latency
from hf_compress.report.page_facts import Facts
from hf_compress.report.sparsity import Matrix
from hf_compress.report.table import Entry, build_report
from hf_compress.report.tokens import surviving_words, trace_tokens
from hf_compress.stages.arguments import OutputArguments
from hf_compress.stages.report import Report, ReportArguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.class_answers import ClassAnswers, SetAnswers
from hf_compress.tasks.token_classification import TagAnswers
from tests.page_reading import Page, at, untraced
from tests.test_report import entry


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def named(place):
    return {
        "name": f"kind {'abc'[place]}",
        "examples": 40 + place,
        "precision": 0.5,
        "recall": 0.9 - place / 7,
        "f1": 0.61,
    }


def full_entries():
    """A dense model and three others, one of each kind of compression that the page has a section for."""
    dense = entry("dense", 0.92, 1000, [1.0, 1.1, 1.0], [9.0, 9.9, 9.0], folder="models/dense", disk_bytes=8_123_456)
    classes = [named(0), named(1)]
    heads = entry("heads", 0.905, 500, [0.61, 0.7, 0.65], [5.0, 5.5, 5.0], (2, 3), (20, 44), classes=classes,
                  standard_error=0.0041, steps=[{"method": "structured_pruning", "settings": {"mac_ratio": 0.5}}],
                  changes={"both_right": 700, "lost": 30, "gained": 12, "both_wrong": 130, "examples": [
                      {"text": "a film of 90 minutes", "label": "good", "answer": "bad"}]})  # fmt: skip
    matrices = [Matrix(layer, kind, 30 * (layer + 1), 99) for layer in (0, 1) for kind in ("self.query", "self.key")]
    matrices.append(Matrix(None, "cls", 0, 9))
    zeros = entry("zeros", 0.87, 1000, [1.0, 1.2, 1.1], [9.1, 9.9, 9.0], matrices=matrices,
                  classes=classes, standard_error=0.006, disk_bytes=8_000_000)  # fmt: skip
    text = {"tokens": ["[CLS]", "a", "<b>", "film"], "layers": [2, 0, 1, 2], "depth": 2}
    job = {"name": "words", "stage": "token_pruning", "options": {"learning_rate": 2e-5, "seed": 1}, "seconds": 93.4}
    words = entry("words", 0.91, 300, [0.4, 0.5, 0.41], [3.0, 3.5, 3.0], words=[text], standard_error=0.02,
                  lineage=[job])  # fmt: skip
    return [replace(dense, classes=classes), heads, zeros, words]


@pytest.fixture
def report():
    found = build_report(full_entries(), "sst2", "accuracy", 872, 25.25, {}, "validation", second_baseline="zeros")
    return {**json.loads(json.dumps(found)), "command": "hf-compress report --models dense heads --split validation"}


def test_every_number_of_the_page_stands_in_the_report(report):
    page = Page(render_page(report))
    assert untraced(page, report) == []
    assert page.embedded() == report
    told = " ".join(element.attributes.get("data-from", "") for element in page.elements).split()
    for place in (
        "models.1.verdicts.0", "models.1.quality_change", "models.2.latency.1.speedup_over_second.median",
        "models.1.heads.1", "models.1.neurons.0", "models.3.words.0.layers.2", "models.2.matrices.3.zeros",
        "models.1.classes.1.recall", "models.1.steps.0.settings.mac_ratio", "models.1.changes.lost", "command",
        "models.3.lineage.0.options.learning_rate",
        "hardware", "models.0.disk_bytes", "num_examples",
    ):  # fmt: skip
        assert place in told, place


def test_what_reads_the_page_back_finds_what_is_wrong(report):
    text = render_page(report)
    changed = text.replace(">0.9050</data>", ">0.9060</data>", 1)
    assert changed != text
    assert untraced(Page(changed), report) == [("models.1.metrics.accuracy", "0.9060", 0.905)]
    assert ("p", "12 models") in untraced(Page(text.replace("<footer>", "<p>12 models</p><footer>")), report)


def test_sections_come_in_the_order_of_interest(report):
    titles = [element.text for element in Page(render_page(report)).elements if element.tag == "h2"]
    assert titles == [
        "Verdict", "Quality and size", "Measured speed at batch 1", "Measured speed at batch 32",
        "Quality against latency", "Sizes per layer", "Surviving words", "Zeros in weights", "Quality per class",
        "Answers that changed", "Lineage", "Command", "How it was measured",
    ]  # fmt: skip


def test_the_page_loads_nothing_and_runs_nothing(report):
    page = Page(render_page(report))
    for element in page.elements:
        assert "src" not in element.attributes
        assert element.tag != "script" or element.attributes["type"] == "application/json"
        assert element.tag != "link" or element.attributes["href"] == "data:,"
        assert not [name for name in element.attributes if name.startswith("on")]
    style = next(element.text for element in page.elements if element.tag == "style")
    assert not re.search(r"url\(|@import", style)
    assert "prefers-color-scheme:dark" in style


def test_names_cannot_break_the_page(report):
    evil = '</script><script>alert("1")</script>&'
    report["models"][1]["name"] = evil
    page = Page(render_page(report))
    assert [element.tag for element in page.elements].count("script") == 1
    assert page.embedded() == report
    assert evil in [element.text for element in page.elements if element.tag == "data"]


def test_points_stand_where_their_numbers_say(report):
    page = Page(quality_latency(Facts(report), 0))
    circles = [element.attributes for element in page.elements if element.tag == "circle"]
    places = np.array([[float(circle["cx"]), float(circle["cy"])] for circle in circles])
    numbers = np.array([[at(report, place) for place in circle["data-from"].split()] for circle in circles])
    assert [circle["data-from"].split()[0] for circle in circles] == [f"models.{i}.latency.0.p50" for i in range(4)]
    for axis, sign in ((0, 1), (1, -1)):
        slope, start = np.polyfit(numbers[:, axis], places[:, axis], 1)
        assert np.sign(slope) == sign
        assert np.allclose(numbers[:, axis] * slope + start, places[:, axis], atol=0.02)


def test_names_beside_points_do_not_overlap():
    crowd = [entry(f"candidate-{i}", 0.9 + 0.0004 * (i % 3), 500, [1.0 + 0.01 * i], [5.0]) for i in range(9)]
    page = Page(quality_latency(Facts(build_report(crowd, "t", "accuracy", 1, 1.0)), 0))
    texts = [e for e in page.elements if e.tag == "text" and "candidate" in e.text]
    assert len(texts) >= 4
    boxes = []
    for element in texts:
        # At least 6 units a character in every usual font of 12.
        wide, x, y = 6 * len(element.text), float(element.attributes["x"]), float(element.attributes["y"])
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[element.attributes["text-anchor"]]
        boxes.append((left, y - 10, left + wide, y + 2))
    for place, a in enumerate(boxes):
        assert not [b for b in boxes[:place] if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


@pytest.mark.parametrize("apart", [0.0, 0.002, 0.008, 0.02, 0.05])
def test_names_leave_the_markers_of_near_points_free(apart):
    near = [entry(name, 0.73, 500, [seconds], [5.0])
            for name, seconds in (("dense", 1.7), ("pruned", 1.0), ("small", 1.0 + apart))]  # fmt: skip
    page = Page(quality_latency(Facts(build_report(near, "t", "accuracy", 1, 1.0)), 0))
    circles = [(float(e.attributes["cx"]), float(e.attributes["cy"])) for e in page.elements if e.tag == "circle"]
    names = {e.text: e.attributes for e in page.elements if e.tag == "text" and e.attributes.get("class") == "name"}
    assert list(names) == ["dense", "pruned", "small"]
    for i, (name, found) in enumerate(names.items()):
        wide, x, y = 6 * len(name), float(found["x"]), float(found["y"])
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[found["text-anchor"]]
        for k, (cx, cy) in enumerate(circles):
            # The halo is 2 wide; a name's own marker may be nearer.
            far = 6.5 + (2 if k != i else 0)
            beside = left - cx >= far or cx - left - wide >= far
            # Of the letters above the line, and of those that go below it.
            assert beside or cy - y - 3 >= far - 2 or y - 9 - cy >= far - 2, (name, k)


@pytest.mark.parametrize(("dense", "small"), [(True, True), (True, False), (False, True), (False, False)])
def test_models_that_answer_one_class_are_not_shown_in_green(dense, small):
    bad = {"answer": "bad", "right": 0.73}
    entries = [entry(name, score, 1000, seconds, [9.0], only_answer=bad if constant else None, standard_error=error)
               for name, score, seconds, constant, error in
               (("dense", 0.73, [1.0], dense, None), ("small", 0.75, [0.5], small, 0.001))]  # fmt: skip
    report = json.loads(json.dumps(build_report(entries, "cola", "accuracy", 200, 9.0)))
    page = Page(render_page(report))
    assert untraced(page, report) == []
    tiles = [element for element in page.elements if element.tag == "b" and element.within.classes() == {"tile"}]
    assert any("good" in tile.classes() for tile in tiles) == (not dense and not small)
    assert ("bad" in tiles[2].classes()) == small
    told = [element.text for element in page.elements if element.tag == "li" and "ONE CLASS" in element.text]
    assert len(told) == 2 * (dense or small) + dense


def test_an_error_of_zero_is_not_shown_as_certainty():
    entries = [
        entry(name, 0.73, 1000, [1.0], [9.0], standard_error=error) for name, error in (("a", None), ("b", 0.0))
    ]
    text = render_page(build_report(entries, "cola", "accuracy", 200, 9.0))
    assert "&plusmn;" not in text
    assert "no example differs" in text


def test_a_report_with_little_in_it_is_a_page():
    entries = [Entry(name, {"accuracy": 0.5}, Cost(1, 1, None, 4), []) for name in ("a", "b")]
    report = build_report(entries, "sst2", "accuracy", 1, 1.0)
    page = Page(render_page(report))
    assert untraced(page, report) == []
    titles = [element.text for element in page.elements if element.tag == "h2"]
    assert titles == ["Verdict", "Quality and size", "Lineage", "How it was measured"]


def test_the_second_baseline_is_another_model():
    entries = full_entries()
    for name in ("dense", "no such"):
        with pytest.raises(ValueError, match=r"second_baseline must be one of \['heads', 'zeros', 'words'\], got"):
            build_report(entries, "t", "accuracy", 1, 1.0, second_baseline=name)
    found = build_report(entries, "t", "accuracy", 1, 1.0, second_baseline="heads")
    ratios = [model["latency"][1]["speedup_over_second"]["median"] for model in found["models"]]
    assert ratios == pytest.approx([5 / 9, 1.0, np.median([5 / 9.1, 5.5 / 9.9, 5 / 9]), 5 / 3], rel=1e-6)
    assert "speedup_over_second" not in build_report(entries, "t", "accuracy", 1, 1.0)["models"][0]["latency"][0]


def test_quality_of_each_class_counts_by_hand():
    labels, answered = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    found = ClassAnswers(np.eye(4)[answered], labels, ("a", "b", "c")).by_class()
    assert [row["name"] for row in found] == ["a", "b", "c", "3"]
    assert [row["examples"] for row in found] == [3, 2, 1, 0]
    assert [row["recall"] for row in found] == pytest.approx([2 / 3, 1 / 2, 0, 0])
    assert [row["precision"] for row in found] == pytest.approx([2 / 4, 1 / 2, 0, 0])
    assert [row["f1"] for row in found] == pytest.approx([4 / 7, 1 / 2, 0, 0])
    assert ClassAnswers(np.zeros((2, 1)), np.zeros(2)).by_class() is None
    sets = SetAnswers(np.array([[1.0, -1], [1, 1], [-1, 1]]), np.array([[1, 1], [1, 0], [0, 1]]), ("x", "y"))
    assert [row["recall"] for row in sets.by_class()] == pytest.approx([1.0, 0.5])
    assert [row["examples"] for row in sets.by_class()] == [2, 2]


def test_the_only_answer_counts_by_hand():
    def classes(*answered):
        return ClassAnswers(np.eye(3)[list(answered)], np.zeros(len(answered)), ("a", "b")).only_answer()

    assert [classes(1, 1, 1), classes(2, 2), classes(1, 0, 1), classes(1)] == ["b", "2", None, None]
    assert ClassAnswers(np.ones((3, 1)), np.zeros(3)).only_answer() is None
    sets = [SetAnswers(np.array(logits), np.zeros((2, 2)), ("x", "y")).only_answer()
            for logits in ([[1, -1], [2, -3]], [[-1, -1], [-2, -3]], [[1, -1], [1, 1]])]  # fmt: skip
    assert sets == ["x", "none", None]
    tags = [TagAnswers([np.zeros(2)] * 2, [np.array(row) for row in found], ("O", "B-x")).only_answer()
            for found in ([[0, 0], [0, 0]], [[0, 0], [0, 1]])]  # fmt: skip
    assert tags == ["O", None]


def test_surviving_words_are_those_of_a_trace(model, tokenizer, sentences):
    dense = model("bert", "sequence_classification")
    texts = [text for text, _ in sentences[:3]]
    rows = Dataset.from_list([dict(tokenizer(text)) for text in texts])
    assert surviving_words(dense, tokenizer, rows) == []
    hc.compress(dense, hc.TokenPruningConfig(final_token_threshold=0.05))
    found = surviving_words(dense, tokenizer, rows)
    dropped = 0
    for text, words in zip(texts, found, strict=True):
        trace = trace_tokens(dense, tokenizer, text)
        assert words["tokens"] == trace.tokens
        assert words["depth"] == len(trace.kept) == 3
        for layer, kept in enumerate(trace.kept):
            assert [layers > layer for layers in words["layers"]] == kept
        dropped += sum(layers < 3 for layers in words["layers"])
    assert dropped


def test_the_command_of_a_report_is_the_one_that_was_typed(tmp_path):
    arguments = Report(
        comparison=ReportArguments(["a b", "c"], latency_repeats=3),
        data=DataArguments(task_name="sst2", max_length=64),
        output=OutputArguments(str(tmp_path)),
    )
    data = f"--task_name sst2 --max_length 64 --output_dir {tmp_path}"
    assert arguments.command_line() == f"hf-compress report --models 'a b' c --latency_repeats 3 {data}"


def test_the_jobs_of_a_recipe_are_read_from_beside_a_model(tmp_path, caplog):
    assert _lineage(None) == _lineage(str(tmp_path)) == []
    job = {"name": "a", "stage": "finetune", "options": {"seed": 1}, "seconds": 1.5}
    (tmp_path / "lineage.json").write_text(json.dumps([{**job, "files": {}, "code": {}}]))
    assert _lineage(str(tmp_path)) == [job]
    (tmp_path / "lineage.json").write_text("[1]")
    assert _lineage(str(tmp_path)) == []
    assert "lineage.json cannot be read" in caplog.text


PROBE = """<script>parent.document.documentElement.dataset.probe = JSON.stringify({
width: innerWidth, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
page: getComputedStyle(document.body).backgroundColor, text: document.body.innerText.length,
wide: [...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && !e.closest('svg') &&
e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))})</script>"""


def framed(page, width):
    """A page in a frame: windows of a headless browser are at least 500 wide."""
    frame = f'<iframe srcdoc="{html.escape(page)}" style="border:0;width:{width}px;height:3000px"></iframe>'
    head = '<!doctype html><html><head><link rel="icon" href="data:,"></head>'
    return f'{head}<body style="margin:0">{frame}</body></html>'


def chromium(text, folder, scheme, width, *more):
    """What a headless browser prints of a page of a width, and its messages."""
    page = folder / "framed.html"
    page.write_text(framed(text, width))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},3000",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}", "--enable-logging=stderr", *more, f"file://{page}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_a_browser_shows_the_page_in_both_schemes_and_widths(report, tmp_path):
    page = render_page(report)
    probed = page.replace("</body>", f"{PROBE}</body>")
    backgrounds, brightness = {}, {}

    def measured(text, scheme, width):
        dom, messages = chromium(text, tmp_path, scheme, width, "--dump-dom")
        return json.loads(next(e.attributes["data-probe"] for e in Page(dom).elements if e.tag == "html")), messages

    for scheme in ("light", "dark"):
        for width in (390, 1280):
            shot = tmp_path / f"{scheme}-{width}.png"
            assert chromium(page, tmp_path, scheme, width, f"--screenshot={shot}")[1] == []
            found, messages = measured(probed, scheme, width)
            assert messages == []
            assert (found["width"], found["scroll"], found["wide"]) == (width, width, [])
            assert found["text"] > 1500
            picture = np.asarray(Image.open(shot).convert("RGB"))[:, :width]
            # Not empty: much is neither the background nor alike.
            assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200
            backgrounds[scheme], brightness[scheme] = found["page"], picture.mean()
    assert backgrounds["light"] != backgrounds["dark"]
    assert brightness["light"] > 180
    assert brightness["dark"] < 90
    # The same look finds an error of a script and what is too wide.
    wide = '<p style="width:900px">wide</p><script>nothing()</script></main>'
    found, messages = measured(probed.replace("</main>", wide), "light", 390)
    assert messages
    assert found["scroll"] > 390
    assert found["wide"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_the_classes_of_five_models_fit_a_page_of_1100(tmp_path):
    entries = [entry(f"recovered-0.{i} int8", 0.9, 500, [1.0], [5.0], classes=[named(0), named(1)]) for i in range(5)]
    probe = """<script>parent.document.documentElement.dataset.probe = JSON.stringify(
    [...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth))</script></body>"""
    page = render_page(build_report(entries, "t", "accuracy", 1, 1.0)).replace("</body>", probe)
    dom, _ = chromium(page, tmp_path, "light", 1100, "--dump-dom")
    assert max(json.loads(next(e.attributes["data-probe"] for e in Page(dom).elements if e.tag == "html"))) <= 0
