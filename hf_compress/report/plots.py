"""Pictures of a report: quality against latency, what each layer kept, and where the zeros are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hf_compress.report.sparsity import Matrix, grid_of, has_zeros


# Okabe and Ito: told apart by colour-blind readers too.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
_INK = "#333333"
# Candidate positions of a label, in points from its marker: beside it first, then further and further away.
_AROUND = ((9, 0), (-9, 0), (7, 9), (7, -9), (-7, 9), (-7, -9), (0, 12), (0, -12))
_PLACES = [(dx * far, dy * far) for far in (1, 2, 3.5, 5) for dx, dy in _AROUND]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots must have matplotlib: pip install hf_compress[report]") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _label_points(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's name near it, without covering another name, point or edge.

    adjustText, which is made for this, was tried on 3 to 14 models and left names over markers, lines and other names.

    Args:
        figure: Already drawn once, its layout fixed: texts are measured on it.
        axes: With its final limits.
        points: x, y, name.
    """
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    pixels = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken: list[Any] = []

    def write(point: tuple[float, float, str], dx: float, dy: float) -> tuple[Any, Any]:
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        text = axes.annotate(
            point[2], point[:2], (dx, dy), textcoords="offset points", fontsize=8, color=_INK, ha=side, va="center"
        )
        return text, text.get_window_extent(renderer).padded(2)

    def is_free(box: Any) -> bool:
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if not inside or any(map(box.overlaps, taken)):
            return False
        around = box.padded(6)  # a marker has a radius
        return not any(around.contains(*pixel) for pixel in pixels)

    for point in points:
        for place in (*_PLACES, None):
            # If there is no free position, a covered name is better than none.
            dx, dy = place or _PLACES[0]
            text, box = write(point, dx, dy)
            if place is None or is_free(box):
                taken.append(box)
                if abs(dx) + abs(dy) > 17:
                    line = {"arrowstyle": "-", "color": _INK, "linewidth": 0.5}
                    axes.annotate("", point[:2], (dx, dy), textcoords="offset points", arrowprops=line)
                break
            text.remove()


def plot_quality_latency(report: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """The metric of each model against its median latency, one panel and colour for each batch size.

    Args:
        report: From `build_report`, with at least one batch size.
        file: PNG to write.

    Raises:
        ImportError: If matplotlib is missing; says how to install it.
        ValueError: If nothing was timed.
    """
    models, metric = report["models"], report["metric"]
    sizes = [timed["batch_size"] for timed in models[0]["latency"]]
    if not sizes:
        raise ValueError("report must hold latencies for this plot, got none.")
    figure = _figure(1.2 + 4.6 * len(sizes), 4.2)
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    scores = [model["metrics"][metric] for model in models]
    # Room for the names; a metric that is the same everywhere still gets an axis.
    margin = max(0.25 * (max(scores) - min(scores)), 0.005)
    labels = []
    for place, (axes, size) in enumerate(zip(panels, sizes, strict=True)):
        colour = _COLOURS[1 + place % (len(_COLOURS) - 1)]
        x = [1e3 * model["latency"][place]["p50"] for model in models]
        axes.scatter(x, scores, color=colour, s=36, zorder=3)
        axes.set_xlim(0, 1.25 * max(x))
        axes.set_ylim(min(scores) - margin, max(scores) + margin)
        axes.set_xlabel("median latency [ms per batch]")
        axes.set_title(f"batch {size}", fontsize=10)
        _plain(axes)
        labels.append((axes, [(a, b, model["name"]) for a, b, model in zip(x, scores, models, strict=True)]))
    panels[0].set_ylabel(f"{metric.replace('_', ' ')} ({report['task']})")
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes, points in labels:
        _label_points(figure, axes, points)
    figure.savefig(file, format="png")


def plot_layer_sizes(report: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Attention heads and feed-forward neurons of each layer as bars, one colour a model.

    Args:
        report: From `build_report`.
        file: PNG to write.

    Raises:
        ImportError: If matplotlib is missing; says how to install it.
        ValueError: If no model has layers.
    """
    models = [model for model in report["models"] if model["heads"]]
    if not models:
        raise ValueError("report must hold the layers of at least one model, got none.")
    depth = max(len(model["heads"]) for model in models)
    figure = _figure(min(16, max(6.0, 1.5 + depth * (0.25 + 0.14 * len(models)))), 5.2)
    panels = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(models)
    for axes, kind, title in zip(
        panels, ("heads", "neurons"), ("attention heads", "feed-forward neurons"), strict=True
    ):
        for place, model in enumerate(models):
            middle = [layer + (place - (len(models) - 1) / 2) * width for layer in range(len(model[kind]))]
            colour = "#999999" if place == 0 else _COLOURS[1 + (place - 1) % (len(_COLOURS) - 1)]
            axes.bar(middle, model[kind], width * 0.92, color=colour, label=model["name"])
        axes.set_ylabel(f"{title}\nper layer [count]")
        _plain(axes)
        axes.grid(False, axis="x")
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    panels[1].set_xlabel("layer")
    panels[1].set_xticks(range(depth))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(4, len(models)),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(file, format="png")


def plot_sparsity(report: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Fraction of zeros in each layer's matrices as a heat map, one panel a model that has zeros.

    Args:
        report: From `build_report`.
        file: PNG to write.

    Raises:
        ImportError: If matplotlib is missing; says how to install it.
        ValueError: If no model has zeros.
    """
    grids = []
    for model in report["models"]:
        matrices = [Matrix(**matrix) for matrix in model["matrices"]]
        if has_zeros(matrices) and grid_of(matrices)[0]:
            grids.append((model, *grid_of(matrices)))
    if not grids:
        raise ValueError("report must hold a model with zeros in its layers for this plot, got none.")
    widest, deepest = (max(len(grid[place]) for grid in grids) for place in (2, 1))
    height = 1.6 + 0.34 * deepest
    figure = _figure(1.8 + 0.85 * widest, 0.6 + height * len(grids))
    panels = figure.subplots(len(grids), 1, squeeze=False)[:, 0]
    for axes, (model, layers, kinds, cells) in zip(panels, grids, strict=True):
        values = [[float("nan") if cell is None else cell for cell in row] for row in cells]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                text = "-" if cell is None else f"{cell:.2f}"
                axes.text(
                    x, y, text, ha="center", va="center", fontsize=8, color="white" if (cell or 0) > 0.6 else "black"
                )
        axes.set_title(f"{model['name']}: element-wise ratio {model['element_sparsity']:.3f}", fontsize=10)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        # Long names break at their dots: they stand side by side.
        axes.set_xticks(range(len(kinds)), [kind.replace(".", "\n") for kind in kinds], fontsize=8)
        axes.set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="fraction of zeros", fraction=0.05)
    figure.savefig(file, format="png")
