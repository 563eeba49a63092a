"""The BiLSTM student as a recorded graph, and in ONNX Runtime where that is installed."""

import pytest
import torch

from tests.bilstm_models import bilstm, texts
from tests.rounding import assert_equal_to_rounding


MODES = ["joint", "separate"]
SHAPES = [([9, 4, 7], [2, 6, 5]), ([3, 12], [5, 1]), ([6], [4])]


def batch_of(mode, first, second):
    batch = dict(zip(("input_ids", "attention_mask"), texts(first), strict=True))
    if mode == "separate":
        batch.update(zip(("second_input_ids", "second_attention_mask"), texts(second, seed=2), strict=True))
    return batch


@pytest.mark.parametrize("mode", MODES)
def test_recorded_graph(mode):
    model = bilstm(pair_mode=mode, num_layers=2)
    first, other = (batch_of(mode, [9, *rest], [6, *rest]) for rest in ([4, 5], [1, 2]))
    with torch.no_grad():
        graph = torch.export.export(model, (), first).module()
        for batch in (first, other):
            assert_equal_to_rounding(graph(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[pytest.mark.slow] * (mode == "joint")) for mode in MODES])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_runtime(tmp_path, mode):
    """Batches of other sizes than the one that was recorded."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = bilstm(pair_mode=mode, num_layers=2, num_labels=3).float()
    inputs = batch_of(mode, *SHAPES[0])
    sizes = {
        name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("second" if "second" in name else "first")}
        for name in inputs
    }
    with torch.inference_mode():
        torch.onnx.export(
            model, (), str(tmp_path / "model.onnx"), dynamo=True, opset_version=18, kwargs=inputs, verbose=False,
            dynamic_shapes=sizes, input_names=list(inputs), output_names=["logits"],
        )  # fmt: skip
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for first, second in SHAPES:
        batch = batch_of(mode, first, second)
        [logits] = session.run(None, {name: value.numpy() for name, value in batch.items()})
        assert_equal_to_rounding(torch.from_numpy(logits), model(**batch).logits)
