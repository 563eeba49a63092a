"""The exported last layer of a classifier: the same outputs from the token that the head reads."""

import pytest
import torch

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.export.first_token import first_token_alone
from tests.conftest import ARCHITECTURES, HEADS
from tests.contract.conftest import METHOD_CONFIGS, logits_of
from tests.rounding import assert_equal_to_rounding


HEAD = "sequence_classification"
KNOWN = [
    name for name in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
    if name in ARCHITECTURES
]  # fmt: skip


def _rows_of_last_layer(model, batch):
    """Tokens that the feed-forward part of the last layer computes."""
    seen = []
    hook = layers_of(model)[-1].ffn_out.module.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    try:
        found = logits_of(model, batch)[0]
    finally:
        hook.remove()
    return found, seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", KNOWN)
def test_outputs_stay_and_one_token_is_left(model, batches, architecture, attention):
    dense = model(architecture, HEAD)
    dense.set_attn_implementation(attention if architecture != "mpnet" else "eager")
    before = vars(layers_of(dense)[-1].module).get("forward")
    for batch in batches(dense.config, count=2):
        batch["attention_mask"][0, 3:] = 0
        wanted, everything = _rows_of_last_layer(dense, batch)
        with first_token_alone(dense) as alone:
            found, seen = _rows_of_last_layer(dense, batch)
        assert alone
        assert (seen, everything) == ([1], [batch["input_ids"].shape[1]])
        assert_equal_to_rounding(found, wanted)
    assert vars(layers_of(dense)[-1].module).get("forward") is before


def test_a_pruned_model_is_narrowed_too(model, batches):
    pruned = model("bert", HEAD)
    data = batches(pruned.config, count=4)
    hc.compress(pruned, hc.StructuredPruningConfig(mac_ratio=0.6), data=data)
    wanted = logits_of(pruned, data[0])[0]
    with first_token_alone(pruned) as alone:
        assert alone
        assert_equal_to_rounding(logits_of(pruned, data[0])[0], wanted)


@pytest.mark.parametrize("method", ["linformer", "token_pruning"])
def test_layers_with_graphs_of_their_own_stay(model, method):
    changed = hc.compress(model("bert", HEAD), METHOD_CONFIGS[method]())
    with first_token_alone(changed) as alone:
        assert not alone


@pytest.mark.parametrize("head", ["base", "token_classification"])
def test_heads_that_read_all_tokens_get_them(model, batches, head):
    dense = HEADS[head].from_config(ARCHITECTURES["bert"]()).eval()
    (batch,) = batches(dense.config, count=1)
    with first_token_alone(dense) as alone, torch.no_grad():
        assert not alone
        assert dense(**batch)[0].shape[1] == batch["input_ids"].shape[1]


def test_the_exported_graph_is_narrowed(model, batches, tmp_path):
    """What the graph computes for all tokens of the last layer: keys and values, but no feed-forward part."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    dense = model("bert", HEAD)
    report = hc.export_onnx(dense, tmp_path / "narrow", batches(dense.config, count=2))
    assert report["first_token_alone"]
    graph = onnx.load(tmp_path / "narrow" / "model.onnx").graph
    last = dense.config.num_hidden_layers - 1
    shapes = {
        value.name: [axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    wide = dense.config.intermediate_size
    tokens = [shape[1] for shape in shapes.values() if len(shape) == 3 and shape[2] == wide]
    assert tokens.count(1)
    assert tokens.count(1) * (last + 1) == len(tokens)
    # A model that returns its hidden states returns those of all tokens.
    dense.config.output_hidden_states = True
    assert not hc.export_onnx(dense, tmp_path / "whole", batches(dense.config, count=2))["first_token_alone"]
