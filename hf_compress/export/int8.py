"""Weights of eight bits for an ONNX graph, with a guard against outputs that move too far.

Products get scales first (see `scale_products`); if that is not enough, the layers that lose most stay in float.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_compress.export.onnx_model import open_session
from hf_compress.export.rounding import Array, Feed, activations_of, product_loss, scale_products, table_loss


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
        moved_without_guard: The same with every weight in eight bits, as it is.
        bound: That `moved` had to meet.
        num_scaled: Products with scales; 0 if the outputs met the bound without.
        kept: Names of the layers whose weights stay in float, those that lose most first.
        num_int8: Layers whose weights have eight bits.
    """

    moved: float
    moved_without_guard: float
    bound: float
    num_scaled: int
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

    Activations become eight bits as they come (dynamic quantization). If that moves the outputs too far, products get
    scales. If they still move too far, layers are ranked by what their own rounding loses on the inputs;
    as few as possible, those that lose most, stay in float.

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
        moved = unguarded = moved_with(0)
        scaled = scale_products(folded, feeds[0]) if unguarded > bound else 0
        if scaled:
            layers = _layers(graph, folded, feeds[0])
            moved = moved_with(0)
        kept, moved = _fewest(len(layers), moved, moved_with, bound)
    finally:
        folded.unlink(missing_ok=True)
    names = [layer.name for layer in layers[:kept]]
    return Guarded(moved, unguarded, bound, scaled, names, len(layers) - kept)


def _fewest(total: int, all_moved: float, moved_with: Any, bound: float) -> tuple[int, float]:
    """The fewest layers that must stay in float, found by halving; the last file written is the one they belong to."""
    if all_moved <= bound:
        return 0, all_moved
    failed, kept = 0, total
    while kept - failed > 1:
        middle = (failed + kept) // 2
        if moved_with(middle) <= bound:
            kept = middle
        else:
            failed = middle
    if kept == total:
        raise ValueError(
            f"int8 moves the outputs by {all_moved:.2g} of their spread, and by more than {bound:.2g} with a single "
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
    seen = activations_of(model, [node.input[0] for node in nodes if node.op_type == "MatMul"], feed)
    layers = []
    for node in nodes:
        weight = onnx.numpy_helper.to_array(weights[_weight_of(node)])
        if not np.issubdtype(weight.dtype, np.floating) or weight.ndim < 2 or not weight.size:
            continue
        loss = product_loss(seen[node.input[0]], weight) if node.op_type == "MatMul" else table_loss(weight)
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
