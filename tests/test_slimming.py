"""Slimmed models are the masked models, only smaller: same outputs, same records, same tools."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.projections import NEURON_ROLES, Role
from hf_compress.core.surgery import unit_columns
from tests.contract.conftest import assert_same_outputs, logits_of


HEAD = "sequence_classification"
CHANNELS = {"pattern": "1xchannel", "criterion": "magnitude", "target_sparsity": 0.5, "scope": "local"}


def zero_neurons_(layer, neurons, where):
    """Make neurons dead at their entrance (all entrances of a gated layer) or at their exit."""
    if where == "out":
        layer.ffn_out.weight.data[:, neurons] = 0
        return
    for role, projection in layer.projections.items():
        if role in NEURON_ROLES:
            projection.weight.data[neurons] = 0


def zero_units_(layer, units, where):
    """Make attention units dead: their value rows or their output columns."""
    if where == "out":
        layer.attention_out.weight.data[:, unit_columns(units, layer.unit_size)] = 0
        return
    values, rows = layer.projection(Role.VALUE), unit_columns(units, layer.head_size)
    values.weight.data[rows] = 0
    if layer.attention_out.bias is None and values.bias is not None:
        # Qwen2: no bias could take the constant.
        values.bias.data[rows] = 0


def masked(model, where):
    """A model with dead heads and neurons, different ones in each layer, and what must be left of it."""
    heads, neurons = [], []
    for layer in layers_of(model):
        gone_heads = [1] if layer.index else [0]
        gone_neurons = list(range(layer.index, layer.num_neurons, 3))
        zero_units_(layer, gone_heads, where)
        zero_neurons_(layer, gone_neurons, where)
        heads.append(layer.num_units - len(gone_heads))
        neurons.append(layer.num_neurons - len(gone_neurons))
    return model, heads, neurons


def sizes(model):
    layers = layers_of(model)
    return [layer.num_units for layer in layers], [layer.num_neurons for layer in layers]


def assert_close(model, other, batch):
    live = batch["attention_mask"].bool() if "attention_mask" in batch else None
    for ours, theirs in zip(logits_of(model, batch), logits_of(other, batch), strict=True):
        # Nothing is promised about padding.
        if live is not None and ours.shape[:2] == live.shape:
            ours, theirs = ours[live], theirs[live]
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("where", ["in", "out"])
def test_slimmed_equals_masked(model, batches, architecture, where):
    dense, heads, neurons = masked(model(architecture).double(), where)
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed) == (heads, neurons)
    for batch in batches(dense.config, count=2, seed=3):
        assert_close(slimmed, dense, batch)
    before, after = hc.count_cost(dense), hc.count_cost(slimmed)
    assert after.macs < 0.8 * before.macs
    assert after.params < before.params
    assert slimmed.dtype == torch.float64


@pytest.mark.parametrize("where", ["in", "out"])
def test_single_precision(model, batches, architecture, where):
    dense, _, _ = masked(model(architecture, HEAD) if architecture != "opt" else model(architecture), where)
    slimmed = hc.slim(copy.deepcopy(dense))
    (batch,) = batches(dense.config, count=1, seed=3)
    assert torch.allclose(logits_of(slimmed, batch)[0], logits_of(dense, batch)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "sigmoid", "gelu_new", "prelu"])
def test_the_constant_goes_into_the_next_bias(batches, activation):
    """Also where the activation of zero is not zero, and where it has a parameter."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        hidden_act=activation, initializer_range=0.3,
    )  # fmt: skip
    dense = BertModel(config).eval()
    layer = dense.encoder.layer[0]
    layer.intermediate.dense.bias.data.normal_()
    layer.intermediate.dense.weight.data[[0, 5]] = 0
    slimmed = hc.slim(copy.deepcopy(dense))
    act = layer.intermediate.intermediate_act_fn(layer.intermediate.dense.bias.detach())
    expected = layer.output.dense.bias + layer.output.dense.weight[:, [0, 5]] @ act[[0, 5]]
    smaller = slimmed.encoder.layer[0].output.dense
    assert smaller.in_features == 10
    assert torch.allclose(smaller.bias, expected, atol=1e-6)
    assert not torch.allclose(smaller.bias, layer.output.dense.bias, atol=1e-3)
    (batch,) = batches(config, count=1)
    assert torch.allclose(logits_of(slimmed, batch)[0], logits_of(dense, batch)[0], atol=1e-5)


def test_without_a_bias_to_fold_into_a_constant_head_stays(model):
    """Qwen2's values have a bias, its attention output has none."""
    dense = model("qwen2")
    layers_of(dense)[0].projection(Role.VALUE).weight.data[:8] = 0
    assert sizes(hc.slim(copy.deepcopy(dense))) == sizes(dense)
    layers_of(dense)[0].projection(Role.VALUE).bias.data[:8] = 0
    assert sizes(hc.slim(dense))[0] == [1, 2]


def test_without_a_bias_to_fold_into_a_constant_neuron_stays(batches):
    """Sigmoid gives 0.5 for a zero row; OPT without biases has no place for that."""
    config = copy.deepcopy(_opt_without_biases())
    torch.manual_seed(0)
    dense = AutoModel.from_config(config).eval().double()
    layers = layers_of(dense)
    zero_neurons_(layers[0], [0, 1], "in")
    zero_neurons_(layers[1], [2], "out")
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed)[1] == [64, 63]
    assert_close(slimmed, dense, batches(config, count=1)[0])


def _opt_without_biases():
    from tests.conftest import ARCHITECTURES

    return ARCHITECTURES["opt"](enable_bias=False, activation_function="sigmoid")


@pytest.mark.parametrize("zero", ["gate", "up"])
def test_one_zero_factor_of_a_gated_block(model, batches, zero):
    dense = model("llama").double()
    mlp = layers_of(dense)[0].module.mlp
    (mlp.gate_proj if zero == "gate" else mlp.up_proj).weight.data[:7] = 0
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed)[1] == [57, 64]
    assert_close(slimmed, dense, batches(dense.config, count=1)[0])


def test_biases_of_a_gated_block(batches):
    from tests.conftest import ARCHITECTURES

    config = ARCHITECTURES["llama"](mlp_bias=True, attention_bias=True)
    torch.manual_seed(0)
    dense = AutoModel.from_config(config).eval().double()
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    mlp = layers_of(dense)[0].module.mlp
    mlp.gate_proj.weight.data[:4] = 0  # Alone: still a multiple of the other projection.
    mlp.up_proj.weight.data[2:6] = 0  # 2 and 3 are constants.
    mlp.up_proj.bias.data[5] = 0  # 5 is nothing.
    mlp.gate_proj.bias.data[1] = 0  # 1 is nothing: silu(0) = 0.
    zero_units_(layers_of(dense)[1], [1], "in")
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed) == ([2, 1], [60, 64])
    assert_close(slimmed, dense, batches(config, count=1)[0])


def test_a_head_of_two_halves(model, batches):
    """Some positions have no value rows, the others no output columns: the head is dead all the same."""
    dense = model("bert").double()
    layer = layers_of(dense)[1]
    layer.projection(Role.VALUE).weight.data[8:12] = 0
    layer.attention_out.weight.data[:, 12:16] = 0
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed)[0] == [4, 3, 4]
    assert_close(slimmed, dense, batches(dense.config, count=1)[0])


def test_parts_of_heads_stay(model, caplog):
    dense = model("bert")
    for layer in layers_of(dense):
        for role in (Role.QUERY, Role.KEY):
            layer.projection(role).weight.data[:24] = 0
        layer.projection(Role.VALUE).weight.data[:7] = 0
    before = copy.deepcopy(dense.state_dict())
    with caplog.at_level(logging.WARNING):
        assert hc.slim(dense) is dense
    assert "Nothing to remove: no whole head and no feed-forward neuron is zero in any of 3 layers" in caplog.text
    assert hc.steps_of(dense) == []
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_one_of_each_always_stays(model, batches):
    dense = model("distilbert").double()
    for layer in layers_of(dense):
        layer.ffn_out.weight.data.zero_()
        layer.projection(Role.VALUE).weight.data.zero_()
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed) == ([1, 1], [1, 1])
    assert_close(slimmed, dense, batches(dense.config, count=1)[0])


def test_round_to(model, batches):
    dense, heads, _ = masked(model("bert").double(), "in")
    slimmed = hc.slim(copy.deepcopy(dense), round_to=16)
    assert sizes(slimmed) == (heads, [48, 48, 48])
    assert_close(slimmed, dense, batches(dense.config, count=1)[0])
    with pytest.raises(ValueError, match="round_to must be at least 1, got 0"):
        hc.slim(dense, round_to=0)


RELOAD = """
import sys, torch
import hf_compress
from transformers import AutoModelForSequenceClassification
batch, logits = torch.load(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    assert torch.allclose(model(**batch).logits, logits, rtol=0, atol=1e-5)
print([tuple(m.weight.shape) for m in model.modules() if type(m) is torch.nn.Linear][4])
"""


@pytest.mark.slow
def test_recommended_config_reloads_in_a_fresh_process(model, batches, tmp_path):
    start = model("bert", HEAD)
    pruned = hc.compress(start, hc.WeightPruningConfig(**CHANNELS, op_names=(".*intermediate.dense",)))
    dense = copy.deepcopy(pruned)
    hc.slim(pruned)
    assert sizes(pruned) == ([4] * 3, [32] * 3)
    (batch,) = batches(pruned.config, count=1)
    assert torch.allclose(logits_of(pruned, batch)[0], logits_of(dense, batch)[0], atol=1e-5)
    (step,) = hc.steps_of(pruned)
    assert (step["method"], step["pattern"], step["achieved_sparsity"]) == ("weight_pruning", "1xchannel", 0.5)
    assert (step["heads_per_layer"], step["neurons_per_layer"]) == ([4] * 3, [32] * 3)
    pruned.save_pretrained(tmp_path / "small")
    torch.save((batch, logits_of(pruned, batch)[0]), tmp_path / "logits.pt")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "small"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(32, 32)"


def test_reload_save_again_and_rebuild(model, batches, architecture, tmp_path):
    pruned = hc.slim(masked(model(architecture), "in")[0])
    (batch,) = batches(pruned.config, count=1)
    pruned.save_pretrained(tmp_path / "once")
    reloaded = AutoModel.from_pretrained(tmp_path / "once")
    assert_same_outputs(reloaded, pruned, batch)
    reloaded.save_pretrained(tmp_path / "twice")
    assert_same_outputs(AutoModel.from_pretrained(tmp_path / "twice"), pruned, batch)
    assert json.loads((tmp_path / "once/config.json").read_text()) == json.loads(
        (tmp_path / "twice/config.json").read_text()
    )
    skeleton = hc.rebuild(AutoModel.from_config(pruned.config))
    skeleton.load_state_dict(pruned.state_dict())
    assert_same_outputs(skeleton, pruned, batch)


def test_to_plain(model, batches, tmp_path):
    config = hc.WeightPruningConfig(**CHANNELS, op_names=(".*intermediate.dense",))
    pruned = hc.to_plain(hc.slim(hc.compress(model("bert", HEAD), config)))
    assert pruned.config.intermediate_size == 32
    pruned.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    (batch,) = batches(pruned.config, count=1)
    assert_same_outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path), pruned, batch)
    uneven = hc.slim(masked(model("bert"), "in")[0])
    with pytest.raises(ValueError, match="Layer 1 has 43 neurons, layer 0 has 42"):
        hc.to_plain(uneven)


@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_with_structured_pruning(model, batches, order, tmp_path):
    """Before, after, and with the channels pruned first: the record then gets a step of its own."""
    start = model("bert", HEAD)
    data = batches(start.config)
    channels = hc.WeightPruningConfig(**CHANNELS, op_names=(".*intermediate.dense",))
    structured = hc.StructuredPruningConfig(mac_ratio=0.9 if order == "between" else 0.55)
    steps = {"before": [structured, channels], "after": [channels], "between": [channels, structured]}[order]
    hc.compress(start, *steps, data=data)
    dense = copy.deepcopy(start)
    hc.slim(start)
    (batch,) = batches(start.config, count=1, seed=5)
    assert torch.allclose(logits_of(start, batch)[0], logits_of(dense, batch)[0], atol=1e-5)
    names = [step["method"] for step in hc.steps_of(start)]
    if order == "before":
        assert names == ["structured_pruning", "weight_pruning"]
    elif order == "after":
        hc.compress(start, structured, data=data)
        assert [step["method"] for step in hc.steps_of(start)] == ["weight_pruning", "structured_pruning"]
        assert hc.count_cost(start).macs < hc.count_cost(dense).macs
    start.save_pretrained(tmp_path)
    assert_same_outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path), start, batch)


def test_dead_channels_that_a_later_step_left(model, batches, tmp_path):
    """The last step is another one: what slimming did stands behind it."""
    start = model("bert", HEAD)
    hc.compress(start, hc.StructuredPruningConfig(mac_ratio=0.8), data=batches(start.config))
    zero_neurons_(layers_of(start)[0], [0, 1], "in")
    before = sizes(start)[1]
    dense = copy.deepcopy(start)
    hc.slim(start)
    first, second = hc.steps_of(start)
    assert (first["method"], second["method"]) == ("structured_pruning", "weight_pruning")
    assert second["neurons_per_layer"] == [before[0] - 2, *before[1:]]
    assert (second["target_sparsity"], second["achieved_sparsity"]) == (0.0, 0.0)
    (batch,) = batches(start.config, count=1)
    assert torch.allclose(logits_of(start, batch)[0], logits_of(dense, batch)[0], atol=1e-5)
    start.save_pretrained(tmp_path)
    assert_same_outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path), start, batch)


def test_with_token_pruning_heads_keep_their_say(model, batches):
    """A dead head still decides which tokens stay; neurons do not."""
    start = model("bert", HEAD).double()
    hc.compress(start, hc.TokenPruningConfig(final_token_threshold=0.03))
    dense, _, neurons = masked(start, "in")
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed) == ([4] * 3, neurons)
    assert_close(slimmed, dense, batches(dense.config, count=1)[0])


@pytest.mark.parametrize("where", ["in", "out"])
def test_with_linear_attention(model, batches, where):
    """Its weights do not sum to one: a head without value rows goes only when its bias is zero, too."""
    start = model("bert", HEAD).double()
    hc.compress(start, hc.LinformerConfig(projected_length=8))
    dense, heads, neurons = masked(start, where)
    if where == "in":
        heads = [4, 4, 3]
        layers_of(dense)[2].projection(Role.VALUE).bias.data[8:16] = 0
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed) == (heads, neurons)
    assert_close(slimmed, dense, batches(dense.config, count=1)[0])


def test_whole_heads_by_pattern(model, batches):
    """Blocks of a head's rows in the value projection are heads."""
    start = model("bert", HEAD)
    config = hc.WeightPruningConfig(**{**CHANNELS, "pattern": "8xchannel"}, op_names=(".*value",))
    dense = hc.compress(start, config)
    slimmed = hc.slim(copy.deepcopy(dense))
    assert sizes(slimmed) == ([2] * 3, [64] * 3)
    (batch,) = batches(start.config, count=1)
    assert torch.allclose(logits_of(slimmed, batch)[0], logits_of(dense, batch)[0], atol=1e-5)


def test_refusals(model):
    with pytest.raises(ValueError, match="model must be a transformers PreTrainedModel, got Linear"):
        hc.slim(torch.nn.Linear(2, 2))
    finished = hc.slim(masked(model("bert"), "in")[0])
    step = {name: value for name, value in hc.steps_of(finished)[0].items() if name != "method"}
    with pytest.raises(ValueError, match="heads_per_layer and neurons_per_layer must be None before pruning"):
        hc.compress(model("bert"), hc.WeightPruningConfig(**step))
    with pytest.raises(ValueError, match="must be given together"):
        hc.WeightPruningConfig(heads_per_layer=[1])
    with pytest.raises(ValueError, match=r"neurons_per_layer must hold a size of at least 0.*got \[-1\]"):
        hc.WeightPruningConfig(heads_per_layer=[1], neurons_per_layer=[-1])


def test_trains_on(model, batches):
    """The parameters of smaller layers are ordinary ones, with the flags of those they replace."""
    dense = masked(model("bert", HEAD), "in")[0]
    dense.bert.encoder.layer[0].requires_grad_(False)
    slimmed = hc.slim(dense).train()
    (batch,) = batches(slimmed.config, count=1)
    slimmed(**batch, labels=torch.arange(8) % 2).loss.backward()
    layers = slimmed.bert.encoder.layer
    assert all(p.grad is None for p in layers[0].parameters())
    assert all(p.grad is not None for p in layers[1].parameters())


def test_zeros_that_are_left_stay_in_training(model, batches):
    """Only the channels went; the attention's zeros have to be held in the training that follows."""
    layers = [
        {"op_names": ["intermediate.dense"], "pattern": "1xchannel"},
        {"op_names": ["query"], "pattern": "2:4"},
    ]
    config = hc.WeightPruningConfig(criterion="magnitude", target_sparsity=0.5, local_configs=layers)
    slim = hc.slim(hc.compress(model("bert", "sequence_classification"), config))
    weight = slim.bert.encoder.layer[0].attention.self.query.weight
    zeros, held = weight == 0, hc.HeldZerosCallback()
    assert int(zeros.sum()) == weight.numel() // 2
    held.on_train_begin(None, None, None, model=slim)
    weight.data.add_(1)
    held.on_optimizer_step(None, None, None)
    assert torch.equal(weight == 0, zeros)
