"""Layers that lost all heads or all neurons: what is left of such a sublayer is the bias of its output projection."""

import copy
import dataclasses

import pytest
import torch

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.empty_attention import EmptyAttention
from hf_compress.core.record import append_step
from hf_compress.core.surgery import keep_heads_, keep_neurons_
from tests.images_and_sounds import cast, real_tokens
from tests.rounding import assert_equal_to_rounding


NONE = torch.tensor([], dtype=torch.int64)
SETTINGS = [{}, {"order": "sequential"}, {"selection": "random"}, {"selection": "magnitude"}]


def emptied(model, heads=(0,), neurons=(1,)):
    """Remove all heads of some layers and all neurons of some, as a step of the record; changes the model in place."""
    for block in layers_of(model):
        if block.index in heads:
            keep_heads_(block, [])
        if block.index in neurons:
            keep_neurons_(block, NONE)
    units, widths = zip(*((block.num_units, block.num_neurons) for block in layers_of(model)), strict=True)
    step = hc.StructuredPruningConfig(heads_per_layer=list(units), neurons_per_layer=list(widths))
    append_step(model.config, "structured_pruning", step)
    return model


def answers(model, batch):
    with torch.no_grad():
        return model(**cast(batch, model))[0]


@pytest.mark.parametrize(("heads", "neurons"), [((0,), (1,)), ((0, 1, 2), (0,))])
def test_removal_equals_masking(model, batches, architecture, heads, neurons, tmp_path):
    dense = model(architecture).double()
    batch, masked = batches(dense.config, count=1)[0], copy.deepcopy(dense)
    for block in layers_of(masked):
        for out, gone in ((block.attention_out, heads), (block.ffn_out, neurons)):
            if block.index in gone:
                out.module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    before = answers(dense, batch)
    pruned, live = emptied(dense, heads, neurons), real_tokens(batch)
    expected = answers(masked, batch)
    assert_equal_to_rounding(answers(pruned, batch)[live], expected[live])
    assert float((expected - before)[live].abs().max()) > 1e-3
    # A sublayer without units costs nothing; what the others cost did not change.
    cost, full = (hc.count_cost(each, seq_len=20).macs_by_layer for each in (pruned, masked))
    for block, was in zip(layers_of(pruned), layers_of(masked), strict=True):
        gone = was.num_units * was.macs_per_unit(20) * (block.index in heads)
        gone += was.num_neurons * was.macs_per_neuron(20) * (block.index in neurons)
        assert cost[block.index] == pytest.approx(full[block.index] - gone)
        assert block.num_units == (0 if block.index in heads else was.num_units)
        assert block.macs_per_unit(20) > 0
    pruned.save_pretrained(tmp_path)
    reloaded = type(pruned).from_pretrained(tmp_path)
    ours, theirs = reloaded.state_dict(), pruned.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_equal_to_rounding(answers(reloaded, batch)[live], expected[live])


def test_every_weight_has_a_gradient(model, batches, architecture):
    """Data-parallel training waits for the gradients of all parameters that are not frozen."""
    dense = model(architecture)
    reached = copy.deepcopy(dense)
    for each in (reached, emptied(dense)):
        answers_of_all = each(**cast(batches(each.config, count=1)[0], each))[0]
        answers_of_all.square().mean().backward()
    missing = [{name for name, p in each.named_parameters() if p.requires_grad and p.grad is None}
               for each in (reached, dense)]  # fmt: skip
    assert missing[0] == missing[1]
    frozen = {name.rpartition(".")[0] for name, p in dense.named_parameters() if not p.requires_grad}
    norms = {f"layers.0.self_attn.{name}_norm" for name in ("q", "k")}
    assert frozen == (norms if architecture == "qwen3" else set())


def test_attention_weights_have_no_heads(model):
    for architecture in ("bert", "mpnet", "deberta-v2", "gpt2", "llama"):
        pruned = emptied(model(architecture))
        pruned.set_attn_implementation("eager")
        weights = pruned(torch.tensor([[5, 6, 7]]), output_attentions=True).attentions
        assert [tuple(found.shape) for found in weights[:2]] == [(1, 0, 3, 3), (1, 4, 3, 3)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("ratio", [0.05, 0.1])
def test_feed_forward_parts_go_as_a_whole(model, batches, settings, ratio):
    dense = model("bert")
    config = hc.StructuredPruningConfig(mac_ratio=ratio, min_heads=0, min_neurons=0, seq_len=20, **settings)
    pruned = hc.compress(copy.deepcopy(dense), config, data=batches(dense.config))
    assert hc.count_cost(pruned, 20).macs <= ratio * hc.count_cost(dense, 20).macs
    assert torch.isfinite(answers(pruned, batches(dense.config)[0])).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_whole_sublayers_go_where_the_minima_allow_it(model, batches, settings):
    dense = model("bert")
    config = hc.StructuredPruningConfig(mac_ratio=0.02, min_heads=0, min_neurons=0, seq_len=20, **settings)
    pruned = hc.compress(copy.deepcopy(dense), config, data=batches(dense.config))
    step, blocks = hc.steps_of(pruned)[0], layers_of(pruned)
    assert step["heads_per_layer"] == [block.num_units for block in blocks] == [0, 0, 0]
    assert step["neurons_per_layer"] == [block.num_neurons for block in blocks]
    assert 0 <= 0.02 * hc.count_cost(dense, 20).macs - hc.count_cost(pruned, 20).macs < blocks[0].macs_per_neuron(20)
    # Only the feed-forward sublayers are left to prune; the default minima ask nothing of what is gone.
    half = dataclasses.replace(config, mac_ratio=0.5, min_heads=1)
    hc.compress(pruned, half, data=batches(dense.config))
    assert sum(block.num_neurons for block in layers_of(pruned)) == sum(step["neurons_per_layer"]) // 2
    assert torch.isfinite(answers(pruned, batches(dense.config)[0])).all()


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit"])
def test_fisher_search_without_minima(model, batches, architecture):
    dense = model(architecture, "sequence_classification")
    data = [{**batch, "labels": torch.arange(8) % 2} for batch in batches(dense.config, count=3)]
    config = hc.StructuredPruningConfig(mac_ratio=0.12, selection="fisher", min_heads=0, min_neurons=0, seq_len=20)
    pruned = hc.compress(copy.deepcopy(dense), config, data=data)
    assert 0 in hc.steps_of(pruned)[0]["heads_per_layer"]
    assert hc.count_cost(pruned, 20).macs <= 0.12 * hc.count_cost(dense, 20).macs
    again = hc.StructuredPruningConfig(mac_ratio=0.8, selection="fisher", min_neurons=0, seq_len=20)
    before = hc.count_cost(pruned, 20).macs
    hc.compress(pruned, again, data=data)
    assert hc.count_cost(pruned, 20).macs <= 0.8 * before
    assert isinstance(layers_of(pruned)[hc.steps_of(pruned)[0]["heads_per_layer"].index(0)].attention, EmptyAttention)


def test_a_removed_sublayer_leaves_its_mean_when_centred(model, batches):
    """With nothing kept, the best constant is the mean of what the sublayer added."""
    dense = model("bert").double()
    data, added = batches(dense.config), []
    handle = dense.encoder.layer[0].attention.output.dense.register_forward_hook(
        lambda module, inputs, output: added.append(output[batch["attention_mask"].bool()])
    )
    for batch in data:
        answers(dense, batch)
    handle.remove()
    config = hc.StructuredPruningConfig(mac_ratio=0.02, min_heads=0, min_neurons=0, center=True)
    pruned = hc.compress(dense, config, data=data)
    out = pruned.encoder.layer[0].attention.output.dense
    assert out.weight.shape == (32, 0)
    assert_equal_to_rounding(out.bias.detach(), torch.cat(added).mean(0))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "magnitude"},
        {"criterion": "wanda"},
        {"criterion": "sparsegpt", "scope": "local"},
        {"criterion": "magnitude", "pattern": "2:4"},
        {"criterion": "magnitude", "pattern": "mha"},
        {"criterion": "magnitude", "pattern": "channelx1"},
    ],
)
def test_weights_of_the_other_sublayers_can_be_pruned(model, batches, architecture, settings):
    pruned = emptied(model(architecture))
    config = hc.WeightPruningConfig(target_sparsity=0.5, pruning_op_types=("Linear", "Conv1D"), **settings)
    hc.compress(pruned, config, data=batches(pruned.config))
    weights = [p.weight for block in layers_of(pruned) for p in block.projections.values()]
    assert sum(int((weight == 0).sum()) for weight in weights) > 0.1 * sum(weight.numel() for weight in weights)
    hc.slim(pruned)
    assert [block.num_units for block in layers_of(pruned)][0] == layers_of(pruned)[1].num_neurons == 0


def test_linear_attention_leaves_layers_without_heads_alone(model, batches, tmp_path):
    pruned = hc.compress(emptied(model("bert")), hc.LinformerConfig(projected_length=8))
    assert [hasattr(block.attention, "attention_core") for block in layers_of(pruned)] == [False, True, True]
    pruned.save_pretrained(tmp_path)
    batch = batches(pruned.config, count=1)[0]
    assert_equal_to_rounding(answers(type(pruned).from_pretrained(tmp_path), batch), answers(pruned, batch))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "head"), [("bert", "base"), ("gpt2", "causal_lm"), ("llama", "causal_lm")])
def test_exported(model, batches, architecture, head, tmp_path):
    pytest.importorskip("onnxscript")
    pruned = emptied(model(architecture, head))
    data = [batches(pruned.config, count=1, size=size, length=length)[0] for size, length in ((4, 12), (2, 20))]
    # Refuses what differs from PyTorch by more than rounding.
    report = hc.export_onnx(pruned, tmp_path, data, int8=True, int8_bound=0.5)
    assert 0 < report["int8"]["moved"] < 0.5


def test_refusals(model, batches):
    with pytest.raises(ValueError, match="Layer 0 must have attention heads to drop tokens"):
        hc.compress(emptied(model("bert")), hc.TokenPruningConfig(final_token_threshold=0.01))
    drops = hc.compress(model("bert"), hc.TokenPruningConfig(final_token_threshold=0.01))
    with pytest.raises(ValueError, match="min_heads must be at least 1 for a model that drops tokens: .* got 0"):
        hc.compress(drops, hc.StructuredPruningConfig(min_heads=0), data=batches(drops.config))
    with pytest.raises(ValueError, match="Layer 0 has 0 heads and 64 neurons: ordinary layers have at least one"):
        hc.to_plain(emptied(model("vit"), heads=(0, 1), neurons=()))
    with pytest.raises(ValueError, match="Layer 0 has 2 heads and 0 neurons: ordinary layers have at least one"):
        hc.to_plain(emptied(model("llama"), heads=(), neurons=(0, 1)))
