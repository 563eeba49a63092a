"""How much structured pruning keeps: budgets, minima, rounding, and refusals that change nothing."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModel, BertConfig

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.methods.structured_pruning.allocation import Sublayer, allocate


# Table of specs/stat.md 4.2: tokens, MACs of a head in M, of a neuron in k, of BERT-base in G, attention's share in %.
BERT_BASE = {
    "SST-2": (25.16, 5.0277, 38.65, 2.1486, 33.70),
    "QQP": (30.55, 6.1258, 46.92, 2.6120, 33.77),
    "STS-B": (31.47, 6.3140, 48.34, 2.6911, 33.79),
    "MNLI": (39.05, 7.8727, 59.98, 3.3448, 33.89),
    "QNLI": (50.97, 10.3536, 78.29, 4.3770, 34.06),
    "MRPC": (53.24, 10.8302, 81.78, 4.5742, 34.09),
    "SQuAD": (170, 37.1226, 261.12, 14.9716, 35.71),
}


def sizes(model):
    blocks = layers_of(model)
    return [block.num_units for block in blocks], [block.num_neurons for block in blocks]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def bert_base():
    with torch.device("meta"):
        return AutoModel.from_config(BertConfig())


@pytest.mark.parametrize("task", list(BERT_BASE))
def test_published_macs_of_bert_base(bert_base, task):
    tokens, head, neuron, total, share = BERT_BASE[task]
    blocks = layers_of(bert_base)
    assert len(blocks) == 12
    for block in blocks:
        assert block.macs_per_unit(tokens) / 1e6 == pytest.approx(head, abs=5.1e-5)
        assert block.macs_per_neuron(tokens) / 1e3 == pytest.approx(neuron, abs=5.1e-3)
    attention = sum(block.num_units * block.macs_per_unit(tokens) for block in blocks)
    full = attention + sum(block.num_neurons * block.macs_per_neuron(tokens) for block in blocks)
    assert full / 1e9 == pytest.approx(total, abs=5.1e-5)
    assert 100 * attention / full == pytest.approx(share, abs=5.1e-3)


def test_half_of_bert_base(bert_base):
    generator = torch.Generator().manual_seed(0)
    sublayers = []
    for block in layers_of(bert_base):
        for kind, number, macs in (
            ("heads", block.num_units, block.macs_per_unit(30.55)),
            ("neurons", block.num_neurons, block.macs_per_neuron(30.55)),
        ):
            priorities = torch.rand(number, generator=generator).sort(descending=True).values.tolist()
            sublayers.append(Sublayer(block.index, kind, priorities, macs, 1))
    full = sum(len(s.priorities) * s.macs for s in sublayers)
    kept, threshold = allocate(sublayers, 0.5 * full)
    used = sum(k * s.macs for k, s in zip(kept, sublayers, strict=True))
    assert used <= 1.3060e9
    assert 0 <= 0.5 * full - used < sublayers[1].macs
    # One threshold explains all sizes; only the unit at the threshold itself may have lost to the budget.
    above = [max(1, sum(p > threshold for p in s.priorities)) for s in sublayers]
    assert sum(abs(a - k) for a, k in zip(above, kept, strict=True)) <= 1


def test_units_are_kept_by_priority_minima_first():
    heads = Sublayer(0, "heads", [1.0, 0.9, 0.2], 10.0, 1)
    neurons = Sublayer(0, "neurons", [1.0, 0.5, 0.4, 0.1], 2.0, 2)
    # Minima cost 14; then come the head at 0.9, the neuron at 0.4; the head at 0.2 is too dear, not the last neuron.
    assert allocate([heads, neurons], 28.0) == ([2, 4], 0.2)
    assert allocate([heads, neurons], 23.9) == ([1, 4], 0.9)
    assert allocate([heads, neurons], 38.0) == ([3, 4], 0.0)
    by_three = Sublayer(0, "neurons", [1.0] * 8, 1.0, 2, bundle=3)
    assert [allocate([by_three], budget)[0] for budget in (3.0, 5.9, 6.0, 8.0)] == [[3], [3], [6], [8]]
    with pytest.raises(ValueError, match=r"mac_ratio must be at least 0\.3685 here"):
        allocate([heads, neurons], 13.0)


@pytest.mark.parametrize("selection", ["interpolative", "magnitude", "random"])
def test_budget_is_used_up_to_less_than_a_neuron(model, batches, architecture, selection):
    dense = model(architecture)
    full = hc.count_cost(dense, seq_len=20).macs
    config = hc.StructuredPruningConfig(mac_ratio=0.55, selection=selection, seq_len=20)
    pruned = hc.compress(model(architecture), config, data=batches(dense.config))
    left = 0.55 * full - hc.count_cost(pruned, seq_len=20).macs
    assert 0 <= left < layers_of(dense)[0].macs_per_neuron(20)
    step = hc.steps_of(pruned)[0]
    assert (step["heads_per_layer"], step["neurons_per_layer"]) == sizes(pruned)


def test_more_budget_never_keeps_less(model, batches):
    before = [0] * 6
    for ratio in (0.3, 0.45, 0.6, 0.75, 0.9, 0.99):
        pruned = model("bert")
        hc.compress(pruned, hc.StructuredPruningConfig(mac_ratio=ratio), data=batches(pruned.config))
        kept = sum(sizes(pruned), [])
        assert all(now >= then for now, then in zip(kept, before, strict=True))
        before = kept
    assert before < sum(sizes(model("bert")), [])


def test_length_defaults_to_live_tokens(model, batches):
    pruned = model("bert")
    data = batches(pruned.config)
    hc.compress(pruned, hc.StructuredPruningConfig(mac_ratio=0.6), data=data)
    lengths = [int(row.sum()) for batch in data for row in batch["attention_mask"]]
    assert hc.steps_of(pruned)[0]["seq_len"] == sum(lengths) / len(lengths)


@pytest.mark.parametrize(("other", "ratio"), [("prune_heads", 0.8), ("prune_neurons", 0.7)])
def test_only_heads_or_only_neurons(model, batches, other, ratio):
    dense = model("bert")
    data = batches(dense.config)
    config = hc.StructuredPruningConfig(mac_ratio=ratio, seq_len=18, **{other: False})
    pruned = hc.compress(model("bert"), config, data=data)
    heads, neurons = sizes(pruned)
    block = layers_of(dense)[0]
    if other == "prune_heads":
        assert heads == [4, 4, 4]
        price = block.macs_per_neuron(18)
        fixed, floor = 12 * block.macs_per_unit(18), 3 * 8 * price
    else:
        assert neurons == [64, 64, 64]
        price = block.macs_per_unit(18)
        fixed, floor = 3 * 64 * block.macs_per_neuron(18), 3 * price
    full = hc.count_cost(dense, seq_len=18).macs
    assert 0 <= ratio * full - hc.count_cost(pruned, seq_len=18).macs < price
    least = math.ceil(1e4 * (fixed + floor) / full) / 1e4
    hc.compress(model("bert"), dataclasses.replace(config, mac_ratio=least), data=data)
    for length, said in ((18, f"{least:.4f} here"), (None, "")):
        config = hc.StructuredPruningConfig(mac_ratio=0.9 * least, seq_len=length, **{other: False})
        untouched = model("bert")
        with pytest.raises(ValueError, match=f"mac_ratio must be at least {said}"):
            hc.compress(untouched, config, data=data)
        assert sizes(untouched) == sizes(dense)


def test_minima(model, batches):
    config = hc.StructuredPruningConfig(mac_ratio=0.6, min_heads=3, min_neurons=20)
    pruned = hc.compress(model("bert"), config, data=batches(model("bert").config))
    heads, neurons = sizes(pruned)
    assert min(heads) >= 3
    assert min(neurons) >= 20
    for impossible in ({"min_heads": 5}, {"min_neurons": 65}):
        with pytest.raises(ValueError, match="at most 4 and 64, the sizes of layer 0"):
            hc.compress(model("bert"), hc.StructuredPruningConfig(**impossible), data=[])


@pytest.mark.parametrize("allocation", ["tolerance", "uniform"])
def test_round_to(model, batches, allocation):
    config = hc.StructuredPruningConfig(mac_ratio=0.6, round_to=16, min_neurons=1, allocation=allocation, seq_len=18)
    pruned = hc.compress(model("bert"), config, data=batches(model("bert").config))
    assert all(size % 16 == 0 for size in sizes(pruned)[1])
    left = 0.6 * hc.count_cost(model("bert"), 18).macs - hc.count_cost(pruned, 18).macs
    assert 0 <= left < 16 * layers_of(pruned)[0].macs_per_neuron(18)


def test_uniform_keeps_the_same_fraction_everywhere(model, batches):
    config = hc.StructuredPruningConfig(mac_ratio=0.5, allocation="uniform")
    heads, neurons = sizes(hc.compress(model("bert"), config, data=batches(model("bert").config)))
    assert max(heads) - min(heads) <= 1
    assert max(neurons) - min(neurons) <= 1
    assert abs(sum(heads) / 12 - sum(neurons) / 192) < 1 / 12 + 1e-9


def nothing(config, batches):
    return None


# What is wrong with the call -> architecture, settings, data, message.
REFUSED = {
    "no data": ("bert", {}, nothing, "data must be given"),
    "empty data": ("bert", {}, lambda config, batches: [], "at least one batch"),
    "too few tokens": ("bert", {}, lambda config, batches: batches(config, count=1, size=2), "at least 128 tokens"),
    "no ids": ("bert", {}, lambda config, batches: [{"labels": torch.ones(2)}], "dicts with input_ids"),
    "centring without bias": ("llama", {"center": True}, lambda c, b: b(c), "center must be False for llama"),
    "budget, by data": ("bert", {"mac_ratio": 0.01}, lambda c, b: b(c), "mac_ratio must be at least"),
    "budget, sequential": ("bert", {"mac_ratio": 0.01, "order": "sequential"}, lambda c, b: b(c), "must be at least"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refusal_leaves_the_model_alone(model, batches, case):
    architecture, settings, data, message = REFUSED[case]
    untouched = model(architecture).train()
    before = state_of(untouched)
    with pytest.raises(ValueError, match=message):
        hc.compress(untouched, hc.StructuredPruningConfig(**settings), data=data(untouched.config, batches))
    after = untouched.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hc.steps_of(untouched) == []
    assert untouched.training
    assert not any(module._forward_pre_hooks for module in untouched.modules())


def test_refuses_broken_weights_and_foreign_objects(model, batches):
    broken = model("bert")
    broken.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in encoder\.layer\.1\.output\.dense\.weight"):
        hc.compress(broken, hc.StructuredPruningConfig(), data=batches(broken.config))
    huge = model("bert")
    huge.encoder.layer[0].attention.self.value.bias.data.fill_(3e38)
    huge.encoder.layer[0].attention.self.value.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=r"NaN or infinity at \(0, 'heads'\)"):
        hc.compress(huge, hc.StructuredPruningConfig(), data=batches(huge.config))
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Linear"):
        hc.compress(torch.nn.Linear(2, 2), hc.StructuredPruningConfig())
    with pytest.raises(ValueError, match="configs must name at least one step"):
        hc.compress(model("bert"))
    config, data = hc.StructuredPruningConfig(mac_ratio=0.8), batches(broken.config)
    untouched = model("bert")
    with pytest.raises(ValueError, match="readable 2 times.*one-shot"):
        hc.compress(untouched, config, config, data=iter(data))
    assert hc.steps_of(untouched) == []
    with pytest.raises(ValueError, match="configs must be one of .*StructuredPruningConfig"):
        hc.compress(model("bert"), {"mac_ratio": 0.5})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mac_ratio": 0.0}, r"mac_ratio must be in \(0, 1\], got 0\.0"),
        ({"mac_ratio": "half"}, "mac_ratio must be float, got 'half'"),
        ({"selection": "best"}, "selection must be one of 'interpolative', .*got 'best'"),
        ({"min_heads": -1}, "min_heads must be at least 0, got -1"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"round_to": 2.5}, "round_to must be int, got 2.5"),
        ({"seq_len": -1.0}, "seq_len must be positive"),
        ({"ridge": -1e-3}, "ridge must not be negative"),
        ({"prune_heads": False, "prune_neurons": False}, "prune_heads or prune_neurons must be true"),
        ({"selection": "fisher", "center": True}, "selection='fisher' must go with"),
        ({"heads_per_layer": [2, -1]}, "heads_per_layer must hold a size of at least 0"),
    ],
)
def test_config_values(values, message):
    with pytest.raises(ValueError, match=message):
        hc.StructuredPruningConfig(**values)


def test_records_may_name_settings_that_are_gone(model):
    """Records of older releases hold the route by which activations were summarised."""
    step = {"method": "structured_pruning", "route": "gram", "sketch_rows": 8192, "mac_ratio": 0.7}
    step |= {"heads_per_layer": [2, 3, 4], "neurons_per_layer": [40, 50, 60]}
    skeleton = model("bert")
    skeleton.config.quantization_config = {"quant_method": "hf_compress", "version": 1, "steps": [step]}
    assert sizes(hc.rebuild(skeleton)) == ([2, 3, 4], [40, 50, 60])
    with pytest.raises(TypeError, match="route"):
        hc.StructuredPruningConfig(route="gram")
