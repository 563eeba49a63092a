"""Weights of eight bits for an ONNX graph, with a guard: layers that move the outputs too far stay in float.

Letters: B batch, S padded length, K inputs of a product, N outputs of a product.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_compress.export.onnx_model import open_session


Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

# Products with a weight and the look-up of embeddings. The head of a classifier is another kind of node (Gemm): it is
# small, and nothing after it evens out what it loses. The runtime cannot run what its quantizer makes of recurrent
# layers.
_TYPES = ("MatMul", "Gather")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Guarded:
    """The result of storing weights of a graph in eight bits.

    Args:
        moved: How far the outputs move on the real inputs, see `movement`.
        moved_without_guard: The same with every weight in eight bits.
        bound: That `moved` had to meet.
        kept: Names of the layers whose weights stay in float, those that lose most first.
        num_int8: Layers whose weights have eight bits.
    """

    moved: float
    moved_without_guard: float
    bound: float
    kept: list[str]
    num_int8: int


@dataclass(frozen=True)
class _Layer:
    """A node whose weights can have eight bits: its name, what a person calls it, and its loss by itself."""

    node: str
    name: str
    loss: float


def movement(before: Sequence[Array], after: Sequence[Array]) -> float:
    """How far outputs move: the root mean square of their change over the standard deviation of the outputs.

    Args:
        before: The values of each output, live positions only: [examples or tokens, ...].
        after: The same of the other model.

    Returns:
        The largest of all outputs: 0 if nothing moves, 1 if the change is as large as what tells examples apart.

    Example:
        >>> movement([np.array([[1.0], [3.0]])], [np.array([[1.1], [2.9]])])
        0.1
    """
    moved = [0.0]
    for old, new in zip(before, after, strict=True):
        spread = old - old.mean(0, keepdims=True) if len(old) > 1 else old
        scale = float(np.sqrt(np.mean(np.square(spread, dtype=np.float64))))
        change = float(np.sqrt(np.mean(np.square(new - old, dtype=np.float64))))
        moved.append(change / scale if scale else (0.0 if not change else float("inf")))
    return round(max(moved), 9)


@contextmanager
def _quiet() -> Iterator[None]:
    """The runtime's quantizer gives its advice through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def write_int8(graph: Path, file: Path, feeds: Sequence[Feed], live: Any, bound: float) -> Guarded:
    """Write a graph with weights of eight bits, one scale for each output of a product.

    Activations become eight bits as they come (dynamic quantization). Layers are ranked by what their own rounding
    loses on the inputs; as few as possible, those that lose most, stay in float.

    Args:
        graph: An ONNX file in single precision.
        file: Is written.
        feeds: Real inputs by name.
        live: `(outputs, feed number) -> values of each output that count`, see `movement`.
        bound: The outputs must not move farther.

    Raises:
        ValueError: If the outputs move farther although only one layer has eight bits.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded = file.with_name("folded.onnx")
    with _quiet():
        # Only weights that stand in the file can have eight bits, not those that are computed from them.
        quant_pre_process(str(graph), str(folded), skip_symbolic_shape=True)
    expected = _outputs(graph, feeds, live)
    layers = _layers(graph, folded, feeds[0])
    if not layers:
        raise ValueError("int8 must be left out: the exported graph has no weights that can be stored in eight bits.")

    def moved_with(kept: int) -> float:
        with _quiet():
            quantize_dynamic(
                str(folded), str(file), op_types_to_quantize=list(_TYPES), per_channel=True,
                weight_type=QuantType.QInt8, nodes_to_quantize=[layer.node for layer in layers[kept:]],
            )  # fmt: skip
        return movement(expected, _outputs(file, feeds, live))

    try:
        unguarded = moved_with(0)
        kept, moved = _fewest(len(layers), unguarded, moved_with, bound)
    finally:
        folded.unlink(missing_ok=True)
    names = [layer.name for layer in layers[:kept]]
    return Guarded(moved, unguarded, bound, names, len(layers) - kept)


def _fewest(total: int, unguarded: float, moved_with: Any, bound: float) -> tuple[int, float]:
    """The fewest layers that must stay in float, found by halving; the last file written is the one they belong to."""
    if unguarded <= bound:
        return 0, unguarded
    failed, kept = 0, total
    while kept - failed > 1:
        middle = (failed + kept) // 2
        if moved_with(middle) <= bound:
            kept = middle
        else:
            failed = middle
    if kept == total:
        raise ValueError(
            f"int8 moves the outputs by {unguarded:.2g} of their spread, and by more than {bound:.2g} with a single "
            "layer in eight bits: leave int8 out, or allow more with int8_bound."
        )
    return kept, moved_with(kept)


def _outputs(file: Path, feeds: Sequence[Feed], live: Any) -> list[Array]:
    """Each output of all feeds, only the values that count, one after the other."""
    session = open_session(file)
    found = [live(session.run(None, dict(feed)), number) for number, feed in enumerate(feeds)]
    return [np.concatenate(values) for values in zip(*found, strict=True)]


def _layers(graph: Path, folded: Path, feed: Feed) -> list[_Layer]:
    """The layers whose weights can have eight bits, those that lose most first."""
    import onnx

    names = {node.name: _scope(node) for node in onnx.load(str(graph), load_external_data=False).graph.node}
    model = onnx.load(str(folded))
    weights = {entry.name: entry for entry in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in _TYPES and _weight_of(node) in weights]
    seen = _activations(model, [node.input[0] for node in nodes if node.op_type == "MatMul"], feed)
    layers = []
    for node in nodes:
        weight = onnx.numpy_helper.to_array(weights[_weight_of(node)])
        if not np.issubdtype(weight.dtype, np.floating) or weight.ndim < 2 or not weight.size:
            continue
        loss = _loss(seen[node.input[0]], weight) if node.op_type == "MatMul" else _rounding(weight)
        layers.append(_Layer(node.name, names.get(node.name) or node.name, loss))
    return sorted(layers, key=lambda layer: -layer.loss)


def _weight_of(node: Any) -> str:
    """Name of the input that may be a weight: of a look-up, the table."""
    return str(node.input[0] if node.op_type == "Gather" else node.input[1])


def _scope(node: Any) -> str:
    """The module that a node was recorded in; empty if the node does not tell."""
    told = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    scopes = [scope for scope in ast.literal_eval(told)[:-1] if scope]
    return str(scopes[-1]) if scopes else ""


def _activations(model: Any, names: Sequence[str], feed: Feed) -> dict[str, Array]:
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


def _loss(states: Array, weight: Array) -> float:
    """What a product loses in eight bits: the root mean square of its change over that of its result.

    Args:
        states: [..., K].
        weight: [K, N].
    """
    rows = states.reshape(-1, weight.shape[0])
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    rounded = (np.clip(np.round(rows / scale) + zero, 0, 255) - zero) * scale
    exact = rows @ weight
    change = rounded @ _per_channel(weight) - exact
    return float(np.sqrt(np.mean(change**2) / max(float(np.mean(exact**2)), 1e-30)))


def _per_channel(weight: Array) -> Array:
    """[K, N] rounded to eight bits with one scale for each of the N outputs."""
    scale = np.abs(weight).max(0, keepdims=True) / 127
    scale = np.where(scale == 0, 1.0, scale)
    return np.asarray(np.round(weight / scale) * scale, dtype=weight.dtype)


def _rounding(weight: Array) -> float:
    """What a table loses in eight bits with one scale for all of it."""
    scale = float(np.abs(weight).max()) / 127 or 1.0
    change = np.round(weight / scale) * scale - weight
    return float(np.sqrt(np.mean(change**2) / max(float(np.mean(weight**2)), 1e-30)))
