"""Weights of eight bits: what the guard leaves in float. The graphs are built by hand, of two products."""

import numpy as np
import pytest
import torch


onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import hf_compress as hc  # noqa: E402
from hf_compress.export.int8 import movement, write_int8  # noqa: E402
from hf_compress.export.onnx_model import open_session  # noqa: E402
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


def test_the_layer_with_an_outlier_stays_in_float(two_products, tmp_path):
    file, feeds = two_products(outlier=300.0)
    found = write_int8(file, tmp_path / "small.onnx", feeds, everything, bound=0.1)
    assert found.kept == ["second_product"]
    assert found.moved_without_guard > 0.3 > 0.1 > found.moved > 0
    kinds = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert (kinds.count("MatMulInteger"), kinds.count("MatMul")) == (1, 1)


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
    before = hc.export_onnx(model, tmp_path / "before", batches, int8=True)["int8"]
    # Processors without VNNI add pairs of products in 16 bits, which may overflow: outputs move farther there.
    assert (before["kept"], before["moved"] < 0.2) == ([], True)
    for layer in model.model.layers[1:]:
        with torch.no_grad():
            layer.mlp_norm.weight[3] *= 1000
            layer.mlp.Wi.weight[:, 3] /= 1000
    found = hc.export_onnx(model, tmp_path / "outliers", batches, int8=True)["int8"]
    assert found["moved_without_guard"] > 0.2
    assert found["moved"] < 0.2
    assert sorted(found["kept"]) == ["model.layers.1.mlp.Wi", "model.layers.2.mlp.Wi"]
    assert found["num_int8"] == before["num_int8"] - 2
