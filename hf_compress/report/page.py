"""A report as one self-contained HTML page: verdict first, no scripts, nothing that is read from a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any

from hf_compress.methods import METHODS
from hf_compress.report.page_charts import layer_sizes, quality_latency
from hf_compress.report.page_facts import Facts
from hf_compress.report.page_style import STYLE, colour_of
from hf_compress.report.page_tables import (
    change_tables,
    class_table,
    heat_maps,
    hidden_classes,
    name_of,
    quality_table,
    speed_table,
)
from hf_compress.report.verdicts import is_faster


def render_page(report: dict[str, Any]) -> str:
    """Write a report as an HTML page.

    Every number is an element whose `data-from` says where in `report.json` it stands. The report itself is in the
    page, too, as the element `report`, so that a page that was passed on alone can still be checked.

    Args:
        report: From `build_report`.

    Returns:
        The page. It follows the reader's choice of light or dark and any width.
    """
    facts = Facts(report)
    title = f"{report['task']}: {report['baseline']} against compressed models"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Browsers ask for one, which is not there, and call that an error.
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>',
        *_head(facts), *_verdict(facts), *_tables(facts), *_plots(facts), *_layers(facts), *_words(facts),
        *_samples(facts),
        *_section("Zeros in weights", "Fraction of zeros in each matrix.", heat_maps(facts)),
        *_classes(facts), *_lineage(facts), *_commands(facts), *_hardware(facts),
        '<footer>Written by hf_compress. All numbers are those of <code>report.json</code>.</footer></main>'
        f'<script type="application/json" id="report">{_embedded(report)}</script></body></html>\n',
    ]  # fmt: skip
    return "\n".join(parts)


def _embedded(report: dict[str, Any]) -> str:
    # What looks like a tag would end the element.
    return json.dumps(report).replace("<", "\\u003c")


def _section(title: str, lead: str, content: str) -> Iterator[str]:
    if content:
        above = f'<p class="soft">{lead}</p>' if lead else ""
        yield f"<section><h2>{title}</h2>{above}{content}</section>"


def _head(facts: Facts) -> Iterator[str]:
    split = f" of the {facts.write('split')} split" if facts.at("split") else ""
    noun = "windows" if facts.at("protocol") else "examples"
    yield f"<h1>{facts.write('task')}: {facts.write('baseline')} against compressed models</h1>"
    yield (
        f'<p class="soft">Quality on {facts.write("num_examples", "text")} {noun}{split}; '
        f"{facts.write('seq_len', 'rate')} tokens on average.</p>"
    )


def _verdict(facts: Facts) -> Iterator[str]:
    cards = [_card(facts, i) for i in range(1, len(facts.at("models")))]
    # The baseline has no card; a sentence stands there only where it is no baseline to trust.
    own = [f"<li>{facts.write(f'models.0.verdicts.{k}')}</li>" for k in range(len(facts.at("models.0.verdicts")))]
    told = f'<div class="bad">{name_of(facts, 0)}<ul>{"".join(own)}</ul></div>' if own else ""
    if cards or told:
        yield f'<section><h2>Verdict</h2>{told}<div class="cards">{"".join(cards)}</div></section>'


def _card(facts: Facts, i: int) -> str:
    """The three numbers that decide about a model, and the sentences."""
    at, tiles = f"models.{i}", []
    for place, timed in enumerate(facts.at(f"{at}.latency")[:2]):
        # The speed of models that answer one class to everything is no success.
        fast = "" if _constant(facts, 0) or _constant(facts, i) else "good"
        good = fast if is_faster(timed["speedup"]["median"]) else "bad"
        speed = facts.write(f"{at}.latency.{place}.speedup.median", "times")
        batch = facts.write(f"{at}.latency.{place}.batch_size", "text")
        tiles.append(f'<div class="tile"><b class="{good}">{speed}</b><span>at batch {batch}</span></div>')
    metric = html.escape(facts.at("metric").replace("_", " "))
    change = facts.write(f"{at}.quality_change", "signed")
    tiles.append(f'<div class="tile"><b class="{_judged(facts, i)}">{change}</b><span>{metric}</span></div>')
    sentences = "".join(
        f"<li>{facts.write(f'{at}.verdicts.{k}')}</li>" for k in range(len(facts.at(f"{at}.verdicts")))
    )
    return (
        f'<div class="card" style="--own:{colour_of(i)}"><h3>{name_of(facts, i)}</h3>'
        f'<div class="tiles">{"".join(tiles)}</div><ul>{sentences}</ul></div>'
    )


def _judged(facts: Facts, i: int) -> str:
    """Whether the change of quality is good, bad, or no more than chance."""
    if _constant(facts, i):
        return "bad"
    change, error = facts.at(f"models.{i}.quality_change"), facts.at(f"models.{i}.standard_error")
    if not change or _constant(facts, 0) or (error is not None and abs(change) <= 2 * error):
        return ""
    return "good" if (change > 0) != facts.at("lower_is_better") else "bad"


def _constant(facts: Facts, i: int) -> bool:
    """Whether a model answers one class to every example."""
    return facts.at(f"models.{i}.only_answer") is not None


def _tables(facts: Facts) -> Iterator[str]:
    yield from _section("Quality and size", "MACs: multiply-accumulates of a sequence.", quality_table(facts))
    for place in range(len(facts.at("models.0.latency"))):
        batch = facts.write(f"models.0.latency.{place}.batch_size", "text")
        lead = "Median and range of the ratios of rounds, in which the models took turns on the same texts."
        yield from _section(f"Measured speed at batch {batch}", "" if place else lead, speed_table(facts, place))


def _legend(facts: Facts) -> str:
    names = "".join(f"<span>{name_of(facts, i)}</span>" for i in range(len(facts.at("models"))))
    return f'<div class="legend">{names}</div>'


def _plots(facts: Facts) -> Iterator[str]:
    figures = [
        f"<figure><figcaption>batch {facts.write(f'models.0.latency.{place}.batch_size', 'text')}</figcaption>"
        f"{quality_latency(facts, place)}</figure>"
        for place in range(len(facts.at("models.0.latency")))
    ]
    if figures:
        content = f'{_legend(facts)}<div class="figures">{"".join(figures)}</div>'
        lead = "The dashed line joins the models that no other one beats in both."
        yield from _section("Quality against latency", lead, content)


def _layers(facts: Facts) -> Iterator[str]:
    kinds = [kind for kind in ("heads", "neurons") if any(model[kind] for model in facts.at("models"))]
    titles = {"heads": "attention heads", "neurons": "feed-forward neurons"}
    figures = [f"<figure><figcaption>{titles[kind]}</figcaption>{layer_sizes(facts, kind)}</figure>" for kind in kinds]
    if figures:
        yield from _section("Sizes per layer", "", f'{_legend(facts)}<div class="figures">{"".join(figures)}</div>')


def _words(facts: Facts) -> Iterator[str]:
    content = []
    for i, model in enumerate(facts.at("models")):
        texts = "".join(_text(facts, i, k) for k in range(len(model.get("words") or ())))
        if texts:
            content.append(f"<h3>{name_of(facts, i)}</h3>{texts}")
    lead = "Under each token: how many layers it leaves. The stronger its colour, the further it comes."
    yield from _section("Surviving words", lead, "".join(content))


def _text(facts: Facts, i: int, k: int) -> str:
    at = f"models.{i}.words.{k}"
    depth, words = facts.at(f"{at}.depth"), []
    for place, layers in enumerate(facts.at(f"{at}.layers")):
        gone = " gone" if layers < depth else ""
        words.append(
            f'<span class="word{gone}" style="--part:{layers / max(depth, 1):.3f}">'
            f"{facts.write(f'{at}.tokens.{place}')}<small>{facts.write(f'{at}.layers.{place}', 'text')}</small></span>"
        )
    return f'<div class="text" style="--own:{colour_of(i)}">{"".join(words)}</div>'


def _samples(facts: Facts) -> Iterator[str]:
    """For each beginning, what every model writes."""
    told = [i for i, model in enumerate(facts.at("models")) if model.get("samples")]
    content = []
    for k in range(len(facts.at(f"models.{told[0]}.samples"))) if told else ():
        rows = "".join(
            f"<dt>{name_of(facts, i, tagged=False)}</dt><dd>{facts.write(f'models.{i}.samples.{k}.continuation')}</dd>"
            for i in told
        )
        content.append(f"<p><b>{facts.write(f'models.{told[0]}.samples.{k}.prompt')}</b> ...</p><dl>{rows}</dl>")
    lead = "Each model continues the same beginnings with the tokens that it finds likeliest."
    yield from _section("What the models write", lead, "".join(content))


def _classes(facts: Facts) -> Iterator[str]:
    lead = "The classes whose recall fell most." if hidden_classes(facts) else ""
    yield from _section("Quality per class", lead, class_table(facts))
    yield from _section("Answers that changed", "", change_tables(facts))


def _lineage(facts: Facts) -> Iterator[str]:
    content = []
    for i, model in enumerate(facts.at("models")):
        steps = "".join(f"<li>{_step(facts, i, k)}</li>" for k in range(len(model["steps"])))
        where = f' <span class="soft">from {facts.write(f"models.{i}.folder")}</span>' if model["folder"] else ""
        done = f'<ol class="steps">{steps}</ol>' if steps else '<p class="soft">Its record holds no steps.</p>'
        jobs = "".join(f"<li>{_job(facts, i, k)}</li>" for k in range(len(model.get("lineage") or ())))
        made = f'<p class="soft">Made by a recipe, job after job:</p><ol class="steps">{jobs}</ol>' if jobs else ""
        content.append(f'<p class="model"><b>{name_of(facts, i)}</b>{where}</p>{done}{made}')
    yield from _section("Lineage", "What was done to each model, as its record and its folder tell.", "".join(content))


def _job(facts: Facts, i: int, k: int) -> str:
    """One job of the recipe that made a model, as it stands in the recipe."""
    at = f"models.{i}.lineage.{k}"
    options = " ".join(
        f"<code>{html.escape(name)}: {facts.write(f'{at}.options.{name}')}</code>"
        for name in facts.at(f"{at}.options")
    )
    seconds = facts.write(f"{at}.seconds", "rate")
    return f"<b>{facts.write(f'{at}.name')}</b>: {facts.write(f'{at}.stage')} {options} ({seconds} s)"


def _step(facts: Facts, i: int, k: int) -> str:
    at = f"models.{i}.steps.{k}"
    method = METHODS.get(facts.at(f"{at}.method"))
    settings = " ".join(
        f"<code>{html.escape(name)}={facts.write(f'{at}.settings.{name}', 'setting')}</code>"
        for name in facts.at(f"{at}.settings")
    )
    paper = ""
    if method is not None:
        link = f"https://arxiv.org/abs/{html.escape(method.paper.identifier)}"
        paper = f' (<a href="{link}">{html.escape(method.paper.title)}</a>)'
    return f"<b>{facts.write(f'{at}.method')}</b>{paper} {settings}"


def _commands(facts: Facts) -> Iterator[str]:
    command = facts.at("command")
    yield from _section("Command", "", f"<pre><code>{facts.write('command')}</code></pre>" if command else "")


def _windows(facts: Facts) -> str:
    names = {"windows": "", "context": "tokens of a window: ", "stride": "stride: ", "predicted_tokens": "predicted: "}
    names["tokens_added_per_window"] = "tokens added to a window: "
    at = facts.at("protocol")
    return "; ".join(f"{told}{facts.write(f'protocol.{name}', 'text')}" for name, told in names.items() if name in at)


def _hardware(facts: Facts) -> Iterator[str]:
    timed = facts.at("models.0.latency")
    rows = [("machine", facts.write("hardware"))]
    versions = ", ".join(f"{name} {facts.write(f'environment.{name}')}" for name in ("torch", "transformers"))
    if facts.at("protocol"):
        rows.append(("windows", _windows(facts)))
    rows.append(("software", f"Python {facts.write('environment.python')}, {versions}"))
    for i in range(len(facts.at("models"))) if timed else ():
        at = f"models.{i}.latency.0"
        shown = ", ".join(facts.write(f"{at}.{key}") for key in ("runtime", "dtype", "device", "attention"))
        threads = facts.write(f"{at}.threads", "text")
        rows.append((name_of(facts, i), f"{shown}; threads of one operation: {threads}"))
    if timed:
        at = "models.0.latency.0"
        rows.append(("rounds", f"{facts.write(f'{at}.repeats', 'text')}; p50 and p95 are a batch's"))
        rows.append(("timed texts", facts.write(f"{at}.num_examples", "text")))
        rows.append(("memory", facts.write(f"{at}.memory_kind")))
    content = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    yield from _section("How it was measured", "", f"<dl>{content}</dl>")
