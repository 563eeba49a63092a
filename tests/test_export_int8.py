"""Weights of eight bits: what the guard scales, what it leaves in float. Graphs built by hand, of two products."""

import numpy as np
import pytest
import torch


onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import hf_compress as hc  # noqa: E402
from hf_compress.export.int8 import movement, write_int8  # noqa: E402
from hf_compress.export.onnx_model import open_session  # noqa: E402
from hf_compress.export.rounding import product_loss, scale_products  # noqa: E402
from tests.conftest import ARCHITECTURES, HEADS, _batches  # noqa: E402


WIDTH = 32


@pytest.fixture
def two_products(tmp_path):
    """`two_products(outlier)`: a file that computes y = ((x A) * s) B, and real inputs; s makes one channel large."""

    def make(outlier):
        random = np.random.default_rng(0)
        # One large weight for each output: sums of two products of full size overflow in processors without VNNI.
        first, second = ((random.normal(size=(WIDTH, WIDTH)) + 8 * np.eye(WIDTH)).astype(np.float32) for _ in range(2))
        scale = np.ones(WIDTH, dtype=np.float32)
        scale[3] = outlier
        # What a channel adds to the outputs does not depend on the outlier; only the range of the activations does.
        second[3] /= outlier
        value, helper = onnx.TensorProto.FLOAT, onnx.helper
        nodes = [
            helper.make_node("MatMul", ["x", "first"], ["inner"], name="first_product"),
            helper.make_node("Mul", ["inner", "scale"], ["scaled"], name="stretch"),
            helper.make_node("MatMul", ["scaled", "second"], ["y"], name="second_product"),
        ]
        weights = [
            onnx.numpy_helper.from_array(array, name)
            for name, array in (("first", first), ("second", second), ("scale", scale))
        ]
        sizes = ["batch", WIDTH]
        ends = [helper.make_tensor_value_info(name, value, sizes) for name in ("x", "y")]
        graph = helper.make_graph(nodes, "two_products", ends[:1], ends[1:], weights)
        file = tmp_path / "model.onnx"
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 10
        onnx.save(model, file)
        return file, [{"x": random.normal(size=(50, WIDTH)).astype(np.float32)}]

    return make


def everything(outputs, number):
    return outputs


def test_nothing_stays_in_float_without_need(two_products, tmp_path):
    file, feeds = two_products(outlier=1.0)
    small = tmp_path / "small.onnx"
    found = write_int8(file, small, feeds, everything, bound=0.1)
    assert (found.kept, found.num_int8) == ([], 2)
    # By hand: the outputs of both files.
    exact, rounded = (open_session(path).run(None, feeds[0])[0] for path in (file, small))
    assert 0 < found.moved == found.moved_without_guard < 0.03
    assert found.moved == pytest.approx(
        np.sqrt(np.mean((rounded - exact) ** 2)) / np.std(exact - exact.mean(0)), rel=1e-3
    )
    assert small.stat().st_size < 0.6 * file.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "small.onnx"]


def test_a_large_channel_has_a_scale(two_products, tmp_path):
    file, feeds = two_products(outlier=300.0)
    found = write_int8(file, tmp_path / "small.onnx", feeds, everything, bound=0.1)
    assert (found.kept, found.num_int8, found.num_scaled) == ([], 2, 1)
    assert found.moved_without_guard > 0.3 > 0.1 > found.moved > 0
    nodes = onnx.load(tmp_path / "small.onnx").graph.node
    assert [node.op_type for node in nodes].count("MatMulInteger") == 2
    assert "scaled_scaled" in [node.output[0] for node in nodes]


def test_the_layer_that_loses_most_stays_in_float(two_products, tmp_path):
    """A bound that scales do not meet."""
    file, feeds = two_products(outlier=300.0)
    scaled = write_int8(file, tmp_path / "small.onnx", feeds, everything, bound=0.1).moved
    found = write_int8(file, tmp_path / "small.onnx", feeds, everything, bound=0.9 * scaled)
    assert (len(found.kept), found.num_int8, found.num_scaled) == (1, 1, 1)
    assert 0 < found.moved <= 0.9 * scaled
    kinds = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert (kinds.count("MatMulInteger"), kinds.count("MatMul")) == (1, 1)


def test_large_rows_have_a_scale(two_products, tmp_path):
    """A neuron of one example takes the whole range; what the others have of it shows in their outputs."""
    file, feeds = two_products(outlier=1.0)
    feeds[0]["x"] = np.maximum(feeds[0]["x"], 0)
    feeds[0]["x"][0, 5] = 300

    def others(outputs, number):
        return [values[1:] for values in outputs]

    found = write_int8(file, tmp_path / "small.onnx", feeds, others, bound=0.3)
    assert (found.kept, found.num_int8) == ([], 2)
    assert found.num_scaled > 0
    assert found.moved_without_guard > 3 * found.moved > 0
    assert "ReduceMax" in [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]


@pytest.mark.parametrize("by_rows", [True, False])
def test_scales_change_nothing_in_single_precision(two_products, tmp_path, by_rows):
    file, feeds = two_products(outlier=1.0 if by_rows else 300.0)
    if by_rows:
        feeds[0]["x"] = np.maximum(feeds[0]["x"], 0)
        feeds[0]["x"][0, 5] = 300
    # Rows whose largest number is not positive, and zeros.
    other = {"x": np.concatenate([-feeds[0]["x"], np.zeros((1, WIDTH), np.float32), feeds[0]["x"]])}
    wanted = open_session(file).run(None, other)[0]
    assert scale_products(file, feeds[0]) > 0
    found = open_session(file).run(None, other)[0]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(1, keepdims=True).min() + 1e-3)


def test_a_feed_without_rows_has_no_scales(two_products):
    file, feeds = two_products(outlier=300.0)
    assert scale_products(file, {"x": feeds[0]["x"][:0]}) == 0


def test_what_a_product_loses_by_hand():
    """Uint8 activations with one range, int8 weights with a range for each output; a row divided and multiplied."""
    random = np.random.default_rng(1)
    states, weight = random.normal(size=(6, 5)), random.normal(size=(5, 3))
    by = np.abs(states).max(1, keepdims=True)
    divided = states / by
    step = (divided.max() - divided.min()) / 255
    zero = round(-divided.min() / step)
    changes = []
    for row in range(6):
        for output in range(3):
            largest = max(abs(value) for value in weight[:, output]) / 127
            total = 0.0
            for channel in range(5):
                value = min(max(round(divided[row, channel] / step) + zero, 0), 255) - zero
                total += value * step * round(weight[channel, output] / largest) * largest
            changes.append(total * by[row, 0] - states[row] @ weight[:, output])
    wanted = np.sqrt(np.mean(np.square(changes)) / np.mean((states @ weight) ** 2))
    assert product_loss(states, weight, by) == pytest.approx(wanted, rel=1e-9)


def test_a_bound_that_no_layer_meets(two_products, tmp_path):
    file, feeds = two_products(outlier=300.0)
    with pytest.raises(ValueError, match=r"int8 moves the outputs .* leave int8 out, or allow more with int8_bound"):
        write_int8(file, tmp_path / "small.onnx", feeds, everything, bound=1e-6)


def test_movement():
    before = [np.array([[0.0, 10.0], [2.0, 10.0]]), np.array([[5.0], [7.0]])]
    assert movement(before, before) == 0
    # The second output moves by half of its spread of 1; a constant part of an output is no spread.
    assert movement(before, [before[0], before[1] + 0.5]) == 0.5
    assert movement([np.array([[3.0, 4.0]])], [np.array([[3.0, 4.5]])]) == pytest.approx(0.1)
    assert movement([np.zeros((2, 1))], [np.ones((2, 1))]) == float("inf")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_outliers_in_a_modernbert(tmp_path):
    """A channel of two layers becomes large and its weights small: the same model, too much for eight bits."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = HEADS["sequence_classification"].from_config(ARCHITECTURES["modernbert"]()).eval()
    batches = _batches(model.config, count=2, size=8, length=20)
    before = hc.export_onnx(model, tmp_path / "before", batches, int8=True, int8_bound=0.2)["int8"]
    # Processors without VNNI add pairs of products in 16 bits, which may overflow: outputs move farther there.
    assert (before["kept"], before["moved"] < 0.2) == ([], True)
    for layer in model.model.layers[1:]:
        with torch.no_grad():
            layer.mlp_norm.weight[3] *= 1000
            layer.mlp.Wi.weight[:, 3] /= 1000
    found = hc.export_onnx(model, tmp_path / "outliers", batches, int8=True, int8_bound=0.2)["int8"]
    assert found["moved_without_guard"] > 0.2
    assert found["moved"] < 0.2
    assert (found["kept"], found["num_int8"]) == ([], before["num_int8"])
    assert found["num_scaled"] >= 2
