"""The BiLSTM student as a recorded graph, and in ONNX Runtime where that is installed."""

import pytest
import torch

import hf_compress as hc
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_onnx_runtime(tmp_path, mode):
    """Batches of other sizes than the one that was recorded."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = bilstm(pair_mode=mode, num_layers=2, num_labels=3).float().eval()
    report = hc.export_onnx(model, tmp_path / "model", [batch_of(mode, *SHAPES[0])], int8=True, int8_bound=0.5)
    # Recurrent weights stay in float.
    assert report["int8"]["num_int8"] >= 1
    exported = hc.OnnxModel.from_pretrained(tmp_path / "model")
    for first, second in SHAPES:
        batch = batch_of(mode, first, second)
        with torch.no_grad():
            assert_equal_to_rounding(exported(**batch).logits, model(**batch).logits)
