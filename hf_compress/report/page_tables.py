"""Tables of a report's page: quality and size, speed, classes, changed answers, and zeros."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from hf_compress.report.page_facts import Facts
from hf_compress.report.page_style import colour_of
from hf_compress.report.sparsity import Matrix, grid_of, has_zeros


# Classes of a task with more are shown where the models differ most.
_MOST_CLASSES = 20


def name_of(facts: Facts, place: int, tagged: bool = True) -> str:
    """A model's name with the dot of its colour, and whether it is a baseline."""
    name = facts.at(f"models.{place}.name")
    kinds = {facts.at("baseline"): "baseline", facts.at("second_baseline"): "second baseline"}
    tag = f'<span class="tag">{kinds[name]}</span>' if tagged and name in kinds else ""
    return f'<span class="dot" style="--own:{colour_of(place)}"></span>{facts.write(f"models.{place}.name")}{tag}'


def table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """A table that scrolls by itself where the page is narrow.

    Args:
        header: Escaped.
        rows: The class of each row, and its cells: contents, or whole `<td>` elements.
        kind: A class of the table.
    """
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f'<tr class="{mark}">{"".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)}</tr>'
        for mark, cells in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _mark(facts: Facts, place: int) -> str:
    baselines = (facts.at("baseline"), facts.at("second_baseline"))
    return "base" if facts.at(f"models.{place}.name") in baselines else ""


def quality_table(facts: Facts) -> str:
    """Quality and size, one row a model."""
    metric, models = facts.at("metric"), facts.at("models")
    rows = []
    for i in range(len(models)):
        at = f"models.{i}"
        rows.append(
            (
                _mark(facts, i),
                [
                    name_of(facts, i),
                    facts.write(f"{at}.metrics.{metric}", "fraction"),
                    facts.write(f"{at}.quality_change", "signed") if i else "",
                    _error(facts, at),
                    facts.write(f"{at}.cost.params", "count"),
                    facts.write(f"{at}.cost.nonzero_params", "count"),
                    facts.write(f"{at}.cost.macs", "count"),
                    facts.write(f"{at}.mac_ratio", "percent"),
                    facts.write(f"{at}.disk_bytes", "megabytes"),
                ],
            )
        )
    name = html.escape(metric.replace("_", " "))
    header = ["model", name, "change", "standard error", "parameters", "not zero", "MACs", "MACs kept", "on disk"]
    return table(header, rows)


def _error(facts: Facts, at: str) -> str:
    """The standard error of a change. One of 0 only says that these examples show no difference."""
    error = facts.at(f"{at}.standard_error")
    if error is None:
        return ""
    return f"&plusmn; {facts.write(f'{at}.standard_error', 'fraction')}" if error else "no example differs"


def speed_table(facts: Facts, place: int) -> str:
    """Measured speed at one batch size, one row a model."""
    second = facts.at("second_baseline")
    rows = []
    for i in range(len(facts.at("models"))):
        at = f"models.{i}.latency.{place}"
        cells = [
            name_of(facts, i),
            facts.write(f"{at}.p50", "milliseconds"),
            facts.write(f"{at}.p95", "milliseconds"),
            facts.write(f"{at}.throughput", "rate"),
            facts.write(f"{at}.peak_memory", "megabytes"),
            *(_speedup(facts, f"{at}.{which}") for which in ("speedup", *(["speedup_over_second"] if second else []))),
        ]
        rows.append((_mark(facts, i), cells))
    header = ["model", "p50 ms", "p95 ms", "examples/s", "memory", f"over {html.escape(facts.at('baseline'))}"]
    return table(header + ([f"over {html.escape(second)}"] if second else []), rows)


def _speedup(facts: Facts, at: str) -> str:
    low, high = (facts.write(f"{at}.{end}", "times") for end in ("low", "high"))
    return f'<b>{facts.write(f"{at}.median", "times")}</b> <span class="soft">{low} to {high}</span>'


def class_table(facts: Facts) -> str:
    """Recall and F1 of each class, one column a model; empty where answers are no classes."""
    models: list[dict[str, Any]] = facts.at("models")
    shown = [i for i, model in enumerate(models) if model.get("classes")]
    if not shown:
        return ""
    first = models[shown[0]]["classes"]

    def lost(number: int) -> float:
        before = float(first[number]["recall"])
        return min(float(models[i]["classes"][number]["recall"]) - before for i in shown)

    numbers = sorted(range(len(first)), key=lost)[:_MOST_CLASSES] if len(first) > _MOST_CLASSES else range(len(first))
    rows = []
    for number in sorted(numbers):
        at = f"models.{shown[0]}.classes.{number}"
        cells = [facts.write(f"{at}.name"), facts.write(f"{at}.examples", "count")]
        for kind in ("recall", "f1"):
            for i in shown:
                value = facts.write(f"models.{i}.classes.{number}.{kind}", "fraction")
                part = 100 * models[i]["classes"][number][kind]
                cells.append(f'<td class="bar" style="--own:{colour_of(i)};--part:{part:.4g}%">{value}</td>')
        rows.append(("", cells))
    names = [facts.write(f"models.{i}.name") for i in shown]
    header = ["class", "examples", *(f"{kind}<br>{name}" for kind in ("recall", "F1") for name in names)]
    return table(header, rows, "classes")


def hidden_classes(facts: Facts) -> bool:
    """Whether `class_table` leaves classes out."""
    return any(len(model.get("classes") or ()) > _MOST_CLASSES for model in facts.at("models"))


def change_tables(facts: Facts) -> str:
    """How many answers each model changed, and examples that only the baseline answers rightly."""
    changed = [i for i, model in enumerate(facts.at("models")) if model["changes"]]
    if not changed:
        return ""
    keys = ("both_right", "lost", "gained", "both_wrong")
    counts = [
        ("", [name_of(facts, i), *(facts.write(f"models.{i}.changes.{key}", "text") for key in keys)]) for i in changed
    ]
    examples = [
        ("", [name_of(facts, i, False), *(facts.write(f"models.{i}.changes.examples.{k}.{key}") for key in _EXAMPLE)])
        for i in changed
        for k in range(len(facts.at(f"models.{i}.changes.examples")))
    ]
    found = table(["model", *(key.replace("_", " ") for key in keys)], counts)
    header = ["model", "example that was lost", "right answer", "its answer"]
    return found + (table(header, examples, "words") if examples else "")


_EXAMPLE = ("text", "label", "answer")


def heat_maps(facts: Facts) -> str:
    """Sparsity of each layer's matrices, one map a model that has zeros; empty where none has."""
    maps = []
    for i, model in enumerate(facts.at("models")):
        matrices = [Matrix(**matrix) for matrix in model["matrices"]]
        layers, kinds, _ = grid_of(matrices)
        if not has_zeros(matrices) or not layers:
            continue
        places = {(m.layer, m.kind): place for place, m in enumerate(matrices)}
        rows = [
            (
                "",
                [
                    _layer_cell(facts, i, matrices, layer),
                    *(_heat_cell(facts, i, places.get((layer, kind))) for kind in kinds),
                ],
            )
            for layer in layers
        ]
        header = ["layer", *(html.escape(kind).replace(".", ".<wbr>") for kind in kinds)]
        ratio = facts.write(f"models.{i}.element_sparsity", "percent")
        maps.append(f"<h3>{name_of(facts, i)}: {ratio} of its weights are zero</h3>{table(header, rows, 'heat')}")
    return "".join(maps)


def _layer_cell(facts: Facts, model: int, matrices: Sequence[Matrix], layer: int) -> str:
    place = next(place for place, matrix in enumerate(matrices) if matrix.layer == layer)
    return facts.write(f"models.{model}.matrices.{place}.layer")


def _heat_cell(facts: Facts, model: int, place: int | None) -> str:
    if place is None:
        return "-"
    at = f"models.{model}.matrices.{place}"
    part = facts.at(f"{at}.zeros") / max(facts.at(f"{at}.weights"), 1)
    mark = " full" if part > 0.6 else ""
    counts = facts.attributes(f"{at}.zeros", f"{at}.weights")
    return f'<td class="cell{mark}" style="--part:{part:.4f}"><data {counts}>{part:.2f}</data></td>'
