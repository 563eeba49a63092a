"""Layers as they are recorded for other runtimes: fewer operators, the same outputs."""

import copy

import pytest
import torch

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.surgery import keep_heads_, keep_neurons_
from hf_compress.export.lean_layers import MERGED, first_token_suffices, lean_layers
from tests.conftest import ARCHITECTURES, HEADS
from tests.contract.conftest import METHOD_CONFIGS, logits_of
from tests.rounding import assert_equal_to_rounding


HEAD = "sequence_classification"
KNOWN = [
    name for name in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
    if name in ARCHITECTURES
]  # fmt: skip


def _rows_of_last_layer(model, batch):
    """The outputs, and the tokens that the feed-forward part of the last layer computes."""
    seen = []
    hook = layers_of(model)[-1].ffn_out.module.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    try:
        found = logits_of(model, batch)[0]
    finally:
        hook.remove()
    return found, seen


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", KNOWN)
def test_outputs_stay_and_one_token_is_left(model, batches, architecture, attention, merge):
    dense = model(architecture, HEAD)
    dense.set_attn_implementation(attention if architecture != "mpnet" else "eager")
    before = [dict(vars(layer.module)) for layer in layers_of(dense)]
    names = list(dense.state_dict())
    assert first_token_suffices(dense)
    for batch in batches(dense.config, count=2):
        batch["attention_mask"][0, 3:] = 0
        wanted, everything = _rows_of_last_layer(dense, batch)
        for narrow in (True, False):
            with lean_layers(dense, narrow, merge):
                found, seen = _rows_of_last_layer(dense, batch)
            assert (seen, everything) == ([1] if narrow else everything, [batch["input_ids"].shape[1]])
            assert_equal_to_rounding(found, wanted)
    assert [dict(vars(layer.module)) for layer in layers_of(dense)] == before
    assert list(dense.state_dict()) == names


@pytest.mark.parametrize("architecture", KNOWN)
def test_padding_inside_of_a_text_and_no_mask(model, batches, architecture):
    dense = model(architecture, HEAD)
    (batch,) = batches(dense.config, count=1)
    batch["attention_mask"][1, 1] = 0
    # Any number but zero is a token.
    batch["attention_mask"][1, 2] = 2
    for given in (batch, {name: values for name, values in batch.items() if name != "attention_mask"}):
        wanted = logits_of(dense, given)[0]
        with lean_layers(dense, narrow=True):
            assert_equal_to_rounding(logits_of(dense, given)[0], wanted)
    # An example without tokens has numbers, too.
    batch["attention_mask"][0] = 0
    with lean_layers(dense, narrow=True):
        assert logits_of(dense, batch)[0].isfinite().all()


@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_a_pruned_model_with_a_layer_without_heads(model, batches, architecture):
    pruned = model(architecture, HEAD)
    data = batches(pruned.config, count=4)
    hc.compress(pruned, hc.StructuredPruningConfig(mac_ratio=0.5), data=data)
    empty = copy.deepcopy(pruned)
    keep_heads_(layers_of(empty)[0], [], layers_of(empty)[0].attention_out.weight[:, :0])
    assert not layers_of(empty)[0].num_units
    assert any(layer.num_units < pruned.config.num_attention_heads for layer in layers_of(pruned))
    for small in (pruned, empty):
        wanted = logits_of(small, data[0])[0]
        with lean_layers(small, narrow=first_token_suffices(small)):
            assert_equal_to_rounding(logits_of(small, data[0])[0], wanted)


def _without_first_layer(model):
    """Nothing is left of the first layer but biases and norms, and no neuron in the last one."""
    first, *_, last = layers_of(model)
    keep_heads_(first, [])
    for layer in (first, last):
        keep_neurons_(layer, torch.tensor([], dtype=torch.int64))
    for layer in (first, last):
        torch.nn.init.normal_(layer.ffn_out.module.bias)
    return model


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("architecture", KNOWN)
def test_sublayers_with_nothing_left_add_their_bias(model, batches, architecture, merge):
    small = _without_first_layer(model(architecture, HEAD))
    batch = batches(small.config, count=1)[0]
    wanted = logits_of(small, batch)[0]
    with lean_layers(small, narrow=first_token_suffices(small), merge=merge):
        assert_equal_to_rounding(logits_of(small, batch)[0], wanted)
    assert_equal_to_rounding(logits_of(small, batch)[0], wanted)


def test_sublayers_with_nothing_left_have_no_products_in_the_graph(model, batches, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    def operators(name, given):
        hc.export_onnx(given, tmp_path / name, batches(given.config, count=2))
        nodes = onnx.load(tmp_path / name / "model.onnx").graph.node
        return [sum(node.op_type == operator for node in nodes) for operator in ("MatMul", "Erf", "Softmax")]

    dense = model("bert", HEAD)
    products, gelus, attentions = operators("dense", dense)
    # The merged product, scores, context, output, and both of the feed-forward part; these in the last layer, too.
    assert operators("small", _without_first_layer(dense)) == [products - 8, gelus - 2, attentions - 1]


@pytest.mark.parametrize("method", ["linformer", "token_pruning"])
def test_layers_with_graphs_of_their_own_stay(model, batches, method):
    changed = hc.compress(model("bert", HEAD), METHOD_CONFIGS[method]())
    assert not first_token_suffices(changed)
    with lean_layers(changed, narrow=False):
        assert all("forward" not in vars(layer.module) for layer in layers_of(changed))


def test_a_class_of_somebody_else_stays(model):
    own = model("bert", HEAD)
    attention = layers_of(own)[0].attention
    attention.__class__ = type("OwnAttention", (type(attention),), {"__module__": "somewhere.modeling"})
    assert not first_token_suffices(own)
    with lean_layers(own, narrow=False):
        assert all("forward" not in vars(layer.module) for layer in layers_of(own))


@pytest.mark.parametrize("head", ["base", "token_classification"])
def test_heads_that_read_all_tokens_get_them(head):
    assert not first_token_suffices(HEADS[head].from_config(ARCHITECTURES["bert"]()).eval())


def test_packed_projections_are_merged_as_the_numbers_they_stand_for(model, batches):
    packed = model("bert", HEAD)
    data = batches(packed.config, count=4)
    hc.compress(packed, hc.WeightQuantizationConfig(bits=4), data=data)
    wanted = logits_of(packed, data[0])[0]
    drawn = torch.get_rng_state()
    with lean_layers(packed, narrow=True):
        assert torch.equal(torch.get_rng_state(), drawn)
        assert hasattr(packed.bert.encoder.layer[0], MERGED)
        assert_equal_to_rounding(logits_of(packed, data[0])[0], wanted)


def test_the_exported_graph_is_lean(model, batches, tmp_path):
    """One product for queries, keys and values in all layers but the last, whose feed-forward part has one token."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    dense = model("bert", HEAD)
    width, wide = dense.config.hidden_size, dense.config.intermediate_size

    def exported(name):
        report = hc.export_onnx(dense, tmp_path / name, batches(dense.config, count=2))
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        weights = sorted(tuple(weight.dims) for weight in graph.initializer if weight.dims[:1] == [width])
        shapes = [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.value_info]
        return report["first_token_alone"], weights, sum(shape[1:] == [1, wide] for shape in shapes)

    alone, weights, single = exported("lean")
    assert alone
    assert single
    layers = dense.config.num_hidden_layers
    assert weights.count((width, 3 * width)) == layers - 1
    # Masks are zeros and lowest numbers, and the runtime finds GELU.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "lean" / "model.onnx", options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert not {"Erf", "Range", "GatherND", "Where"} & set(operators)
    assert sum(name.endswith("Gelu") for name in operators) == layers
    # A model that returns its hidden states returns those of all tokens, one that returns attentions has them.
    dense.set_attn_implementation("eager")
    dense.config.output_attentions = True
    report = hc.export_onnx(dense, tmp_path / "attentions", batches(dense.config, count=2))
    assert report["outputs"] == ["logits", *(f"attentions.{index}" for index in range(layers))]
    dense.config.output_attentions = False
    dense.config.output_hidden_states = True
    alone, weights, single = exported("whole")
    assert (alone, single) == (False, 0)
    assert weights.count((width, 3 * width)) == layers
