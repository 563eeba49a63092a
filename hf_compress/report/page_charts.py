"""Drawings of a report's page as inline SVG: quality against latency, and what each layer kept.

matplotlib draws the PNG files; its SVG has fixed colours, which do not follow a dark page, and is no dependency.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import Any

from hf_compress.report.page_facts import Facts
from hf_compress.report.page_style import colour_of


_WIDTH, _HEIGHT = 460.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 14.0, 14.0, 42.0
# Of one character of a label in the page's fonts, generously, and of its line.
_CHARACTER, _LINE = 6.9, 14.0
_LONGEST = 30
# Half the width of a marker, and of one with the space that the halo of another model's name covers.
_MARKER, _CLEAR = 7.0, 10.0
# Where a label may stand beside its point: offsets in x and y, and which end of the text is there.
_PLACES = (
    (10, 4, "start"), (-10, 4, "end"), (8, -9, "start"), (8, 17, "start"), (-8, -9, "end"), (-8, 17, "end"),
    (0, -12, "middle"), (0, 22, "middle"), (12, -24, "start"), (12, 32, "start"), (-12, -24, "end"), (-12, 32, "end"),
)  # fmt: skip

Box = tuple[float, float, float, float]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within a range, about as many as wanted.

    Example:
        >>> ticks(0, 10)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
        >>> ticks(0.861, 0.884, 3)
        [0.87, 0.88]
    """
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def front_of(points: Sequence[tuple[float, float]], lower_is_better: bool = False) -> list[int]:
    """The points that no other one beats both in time and in quality, from the fastest on.

    Args:
        points: Time and quality.
        lower_is_better: Whether a lower quality number is the better one.

    Example:
        >>> front_of([(9.0, 0.92), (5.0, 0.90), (6.0, 0.88)])
        [1, 0]
    """
    sign = -1 if lower_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    front: list[int] = []
    for place in order:
        if not front or sign * points[place][1] > sign * points[front[-1]][1]:
            front.append(place)
    return front


class _Axes:
    """A plane of numbers on a drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: float = _HEIGHT) -> None:
        self._x, self._y, self.height = x, y, height

    def x(self, value: float) -> float:
        low, high = self._x
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM), 2)

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str, y_name: str) -> Iterator[str]:
        bottom, right = self.height - _BOTTOM, _WIDTH - _RIGHT
        for value in y_ticks:
            yield f'<line x1="{_LEFT}" x2="{right}" y1="{self.y(value)}" y2="{self.y(value)}"/>'
            yield f'<text class="tick" x="{_LEFT - 6}" y="{self.y(value) + 4}" text-anchor="end">{value:g}</text>'
        for value in x_ticks:
            yield f'<text class="tick" x="{self.x(value)}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>'
        yield f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        yield f'<text class="axis" x="{right}" y="{self.height - 6}" text-anchor="end">{html.escape(x_name)}</text>'
        middle = (bottom + _TOP) / 2
        yield (
            f'<text class="axis" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
            f"{html.escape(y_name)}</text>"
        )


def _svg(title: str, parts: Iterator[str] | Sequence[str], height: float = _HEIGHT) -> str:
    drawn = "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{html.escape(title)}">{drawn}</svg>'


def _free(box: Box, taken: Sequence[Box]) -> bool:
    inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
    return inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)


def _labels(points: Sequence[tuple[float, float, str]]) -> Iterator[str]:
    """Names beside their points where there is room; the legend names the others."""
    taken: list[Box] = []
    for place, (x, y, name) in enumerate(points):
        markers = [
            (a - half, b - half, a + half, b + half)
            for other, (a, b, _) in enumerate(points)
            for half in [_MARKER if other == place else _CLEAR]
        ]
        text = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."
        width = _CHARACTER * len(text)
        for dx, dy, anchor in _PLACES:
            left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left, y + dy - _LINE + 3, left + width, y + dy + 3)
            if _free(box, [*taken, *markers]):
                taken.append(box)
                yield f'<text class="name" x="{x + dx}" y="{y + dy}" text-anchor="{anchor}">{html.escape(text)}</text>'
                break


def quality_latency(facts: Facts, place: int) -> str:
    """Quality against median latency at one batch size, with a line through the models that no other one beats."""
    models, metric = facts.at("models"), facts.at("metric")
    points = [(1e3 * model["latency"][place]["p50"], model["metrics"][metric]) for model in models]
    scores = [score for _, score in points]
    margin = max(0.25 * (max(scores) - min(scores)), 0.005)
    right, low, high = 1.15 * max(x for x, _ in points), min(scores) - margin, max(scores) + margin
    axes = _Axes((0.0, right), (low, high))

    def parts() -> Iterator[str]:
        yield from axes.grid(ticks(0, right), ticks(low, high), "median latency, ms a batch", metric.replace("_", " "))
        front = " ".join(
            f"{axes.x(points[i][0])},{axes.y(points[i][1])}" for i in front_of(points, facts.at("lower_is_better"))
        )
        yield f'<path class="front" d="M{front.replace(" ", "L")}"/>'
        for i, (model, (x, y)) in enumerate(zip(models, points, strict=True)):
            time, score = f"models.{i}.latency.{place}.p50", f"models.{i}.metrics.{metric}"
            yield (
                f'<circle class="own" style="--own:{colour_of(i)}" cx="{axes.x(x)}" cy="{axes.y(y)}" r="6.5" '
                f"{facts.attributes(time, score)}><title>{html.escape(model['name'])}: "
                f"{facts.shown(time, 'milliseconds')} ms, {facts.shown(score, 'fraction')}</title></circle>"
            )
        yield from _labels([(axes.x(x), axes.y(y), m["name"]) for m, (x, y) in zip(models, points, strict=True)])

    return _svg(f"{metric} against latency", parts())


def layer_sizes(facts: Facts, kind: str) -> str:
    """What each layer kept, as bars.

    Args:
        facts: Of a report.
        kind: `heads` or `neurons`.
    """
    models = [(place, model) for place, model in enumerate(facts.at("models")) if model[kind]]
    depth = max(len(model[kind]) for _, model in models)
    most = max(max(model[kind]) for _, model in models) or 1
    axes = _Axes((-0.5, depth - 0.5), (0.0, 1.05 * most), 230.0)
    width = 0.8 / len(models)

    def parts() -> Iterator[str]:
        steps = max(1, math.ceil(depth / 12))
        yield from axes.grid(range(0, depth, steps), ticks(0, most, 4), "layer", f"{kind} left")
        for bar, (place, model) in enumerate(models):
            for layer, left in enumerate(model[kind]):
                yield _bar(
                    axes, facts, f"models.{place}.{kind}.{layer}", layer - 0.4 + bar * width, width, left, model
                )

    def _bar(axes: _Axes, facts: Facts, at: str, start: float, width: float, left: int, model: dict[str, Any]) -> str:
        x, y = axes.x(start), axes.y(left)
        wide, tall = 0.92 * (axes.x(start + width) - x), axes.y(0) - y
        colour = colour_of(int(at.split(".")[1]))
        return (
            f'<rect class="own" style="--own:{colour};stroke:none" x="{x}" y="{y}" width="{wide:.2f}" '
            f'height="{tall:.2f}" {facts.attributes(at)}><title>{html.escape(model["name"])}, layer '
            f"{at.rpartition('.')[2]}: {left}</title></rect>"
        )

    return _svg(f"{kind} left in each layer", parts(), 230.0)
