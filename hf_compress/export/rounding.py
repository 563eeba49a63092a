"""What products and tables of an ONNX graph lose in eight bits, and scales that let products lose less.

Letters: K inputs of a product, N outputs of a product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

# Of the range of a channel, how much its scale moves from the activations into the weights.
_SHARES = (0.3, 0.5, 0.7, 0.9)
# A product takes more operators with scales: they must be worth it.
_HELPS = 0.6
# Rows that losses are computed on; more say the same.
_ROWS = 2048


def activations_of(model: Any, names: Sequence[str], feed: Feed) -> dict[str, Array]:
    """The values inside a graph on one feed."""
    import onnx
    import onnxruntime

    wanted = [name for name in dict.fromkeys(names) if name not in feed]
    known = {entry.name for entry in model.graph.output}
    added = [onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in known]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(added)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(wanted, dict(feed)) if wanted else []
    return {**feed, **dict(zip(wanted, values, strict=True))}


def products_of(model: Any) -> list[Any]:
    """The nodes of a graph that multiply by a weight which stands in the file."""
    weights = {entry.name for entry in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def scale_products(file: Path, feed: Feed) -> int:
    """Give products scales with which they lose less in eight bits; in single precision the graph computes the same.

    The inputs of a product share one range in eight bits, which few numbers may take for themselves. A scale for each
    channel, whose inverse is part of the weight, helps against large channels: normalised states have them. A scale
    for each row, which the outputs are multiplied by, helps against large rows: neurons have them. One of the two is
    used where the product loses at most three fifths with it, on the feed.

    Channels: max|x_j|^a / max|w_j|^(1-a), with the best of some shares a. Source: Xiao et al. 2023, "SmoothQuant",
    equation 4. There a is one number, and the scales of activations move into the layer before; of encoders that
    normalise after the residual they cannot, because the residual reads the same numbers. Rows: the largest number of
    a row, as in quantization by token (Dettmers et al. 2022, "LLM.int8()"), as operators of the graph.

    Args:
        file: An ONNX file in single precision, which is changed.
        feed: Real inputs by name.

    Returns:
        How many products have scales.
    """
    import onnx

    model = onnx.load(str(file))
    graph = _Graph(model)
    readers: dict[str, list[Any]] = {}
    for node in products_of(model):
        readers.setdefault(node.input[0], []).append(node)
    seen = activations_of(model, list(readers), feed)
    scaled = 0
    for name, nodes in readers.items():
        weights = [weight for node in nodes if (weight := graph.weight(node.input[1])) is not None]
        # A weight that something else reads, too, stays as it is.
        if len(weights) == len(nodes):
            scaled += len(nodes) * graph.scale(name, nodes, _best_scale(seen[name], np.concatenate(weights, 1)))
    onnx.save(model, str(file))
    return scaled


@dataclass(frozen=True)
class _Scale:
    """Of the inputs of a product: for each channel [K], or, if `channels` is None, for each row, at least `floor`."""

    channels: Array | None = None
    floor: float = 0.0


def _best_scale(states: Array, weight: Array) -> _Scale | None:
    """What a product [..., K] x [K, N] loses least with; None if it loses about as much without."""
    rows = states.reshape(-1, weight.shape[0])
    if not len(rows):
        return None
    rows = rows[:: -(-len(rows) // _ROWS)]
    candidates = [_Scale(channels) for channels in _channels(rows, weight)]
    if rows.max() > 0:
        # A row without large numbers must not make its negative ones large.
        candidates.append(_Scale(floor=max(-float(rows.min()), 1e-6 * float(rows.max()))))
    best, found = _HELPS * product_loss(rows, weight), None
    for scale in candidates:
        if scale.channels is not None:
            loss = product_loss(rows / scale.channels, weight * scale.channels[:, None])
        else:
            loss = product_loss(rows, weight, np.maximum(rows.max(1, keepdims=True), scale.floor))
        if loss < best:
            best, found = loss, scale
    return found


def _channels(rows: Array, weight: Array) -> Iterator[Array]:
    large, heavy = np.abs(rows).max(0), np.abs(weight).max(1)
    live = (large > 0) & (heavy > 0)
    for share in _SHARES if live.any() else ():
        logs = share * np.log(large[live]) - (1 - share) * np.log(heavy[live])
        scale = np.ones_like(large)
        scale[live] = np.exp(logs - logs.mean())
        yield scale


class _Graph:
    """Adds scales to a graph."""

    def __init__(self, model: Any) -> None:
        import onnx

        self._onnx, self._graph = onnx, model.graph
        self._weights = {entry.name: entry for entry in model.graph.initializer}
        self._reads = Counter(name for node in model.graph.node for name in node.input)

    def weight(self, name: str) -> Array | None:
        """A matrix that nothing else reads; None if it is something else."""
        array = self._onnx.numpy_helper.to_array(self._weights[name])
        floating = np.issubdtype(array.dtype, np.floating)
        return array if floating and array.ndim == 2 and array.size and self._reads[name] == 1 else None

    def scale(self, name: str, nodes: Sequence[Any], scale: _Scale | None) -> bool:
        """Scale the value `name`, which some products read; returns whether there is a scale."""
        if scale is None:
            return False
        before = list(self._graph.node).index(nodes[0])
        if scale.channels is not None:
            inverse = self._constant(f"{name}_inverse", 1 / scale.channels)
            self._insert(before, "Mul", [name, inverse], f"{name}_scaled")
        else:
            axes = self._constant(f"{name}_axes", np.array([-1]))
            self._insert(before, "ReduceMax", [name, axes], f"{name}_largest", keepdims=1)
            floor = self._constant(f"{name}_floor", np.array(scale.floor, np.float32))
            self._insert(before + 1, "Max", [f"{name}_largest", floor], f"{name}_rows")
            self._insert(before + 2, "Div", [name, f"{name}_rows"], f"{name}_scaled")
        for node in nodes:
            node.input[0] = f"{name}_scaled"
            if scale.channels is not None:
                entry = self._weights[node.input[1]]
                values = self._onnx.numpy_helper.to_array(entry) * scale.channels[:, None]
                entry.CopyFrom(self._onnx.numpy_helper.from_array(values, entry.name))
            else:
                output, node.output[0] = node.output[0], f"{node.output[0]}_by_rows"
                after = list(self._graph.node).index(node) + 1
                self._insert(after, "Mul", [node.output[0], f"{name}_rows"], output)
        return True

    def _constant(self, name: str, values: Array) -> str:
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(values, name))
        return name

    def _insert(self, place: int, operator: str, inputs: list[str], output: str, **more: Any) -> None:
        node = self._onnx.helper.make_node(operator, inputs, [output], f"{output}_{operator}", **more)
        self._graph.node.insert(place, node)


def product_loss(states: Array, weight: Array, by: Array | float = 1.0) -> float:
    """What a product loses in eight bits: the root mean square of its change over that of its result.

    Args:
        states: [..., K].
        weight: [K, N].
        by: [..., 1] by which inputs are divided before they have eight bits, and outputs multiplied.
    """
    rows = states.reshape(-1, weight.shape[0])
    exact, rows = rows @ weight, rows / by
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    rounded = (np.clip(np.round(rows / scale) + zero, 0, 255) - zero) * scale
    change = rounded @ _per_channel(weight) * by - exact
    return float(np.sqrt(np.mean(change**2) / max(float(np.mean(exact**2)), 1e-30)))


def _per_channel(weight: Array) -> Array:
    """[K, N] rounded to eight bits with one scale for each of the N outputs."""
    scale = np.abs(weight).max(0, keepdims=True) / 127
    scale = np.where(scale == 0, 1.0, scale)
    return np.asarray(np.round(weight / scale) * scale, dtype=weight.dtype)


def table_loss(weight: Array) -> float:
    """What a table loses in eight bits with one scale for all of it."""
    scale = float(np.abs(weight).max()) / 127 or 1.0
    change = np.round(weight / scale) * scale - weight
    return float(np.sqrt(np.mean(change**2) / max(float(np.mean(weight**2)), 1e-30)))
