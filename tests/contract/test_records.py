"""Records that are broken, foreign or newer are refused with one message; records not needed can be dropped."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from tests.contract.conftest import assert_same_outputs


STEP = {"method": "structured_pruning", "heads_per_layer": [2, 2, 2], "neurons_per_layer": [9, 9, 9]}
RECORD = {"quant_method": "hf_compress", "version": 1, "steps": [STEP]}

# What is wrong -> the record, the message.
BROKEN = {
    "newer": ({**RECORD, "version": 2}, "version 2, this hf_compress reads up to 1. Upgrade with"),
    "no version": ({"quant_method": "hf_compress", "version": None, "steps": []}, "version None"),
    "steps": ({**RECORD, "steps": {"a": 1}}, "must hold a list of steps"),
    "unknown method": ({**RECORD, "steps": [{"method": "magic"}]}, "Step 0: method must be one of .*got 'magic'"),
    "no method": ({**RECORD, "steps": [STEP, {}]}, "Step 1: method must be one of .*got None"),
    "not a step": ({**RECORD, "steps": ["prune"]}, "Step 0: method must be one of .*got None"),
    "unknown field": ({**RECORD, "steps": [{**STEP, "rank": 3}]}, "Step 0 .structured_pruning. is broken: .*rank"),
    "wrong type": ({**RECORD, "steps": [{**STEP, "mac_ratio": "x"}]}, "is broken: mac_ratio must be float, got 'x'"),
    "wrong value": ({**RECORD, "steps": [{**STEP, "mac_ratio": 7.0}]}, r"is broken: mac_ratio must be in \(0, 1\]"),
}
UNFIT = {
    "not applied": ({"method": "structured_pruning"}, "must be recorded, got a config that was never applied"),
    "other depth": ({**STEP, "heads_per_layer": [2, 2]}, "must have 3 entries, got 2 and 3"),
    "too many": (
        {**STEP, "heads_per_layer": [2, 5, 2]},
        "Layer 1 must have at most 4 heads and 64 neurons, got 5 and 9",
    ),
    "negative": ({**STEP, "neurons_per_layer": [9, -1, 9]}, "neurons_per_layer must hold a size of at least 0"),
}


@pytest.fixture
def folder(compressed, tmp_path):
    """Writes a compressed model whose config.json holds another record."""

    def write(record):
        compressed("structured_pruning", "bert").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = record
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_record(folder, model, batches, case):
    record, message = BROKEN[case]
    place = folder(record)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(place)
    config = AutoConfig.from_pretrained(place)
    with pytest.raises(ValueError, match=message):
        hc.steps_of(config)
    with pytest.raises(ValueError, match=message):
        hc.rebuild(AutoModel.from_config(config))
    dense = model("bert")
    dense.config.quantization_config = record
    with pytest.raises(ValueError, match=message):
        hc.compress(dense, hc.StructuredPruningConfig(), data=batches(dense.config))
    assert [block.num_neurons for block in layers_of(dense)] == [64, 64, 64]


@pytest.mark.parametrize("case", list(UNFIT))
def test_step_that_does_not_fit(folder, case):
    step, message = UNFIT[case]
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder({**RECORD, "steps": [step]}))


def test_record_of_another_package(model, batches):
    dense = model("bert")
    dense.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    message = "must be empty or of hf_compress, got quant_method='bitsandbytes'"
    for call in (hc.steps_of, hc.rebuild, hc.to_plain):
        with pytest.raises(ValueError, match=message):
            call(dense)
    with pytest.raises(ValueError, match=message):
        hc.compress(dense, hc.StructuredPruningConfig(), data=batches(dense.config))


def test_models_without_a_record():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    dense = BertModel(config)
    modules = list(dense.modules())
    assert hc.steps_of(dense) == hc.steps_of(config) == []
    assert hc.rebuild(dense) is dense
    assert hc.to_plain(dense) is dense
    assert list(dense.modules()) == modules
    assert not hasattr(dense.config, "quantization_config")


def equal_widths(model, data, **keep):
    """Every layer loses 24 neurons, and with `prune_heads` one attention unit."""
    heads = keep.get("prune_heads", True)
    lost = sum(24 * b.macs_per_neuron(18) + heads * b.macs_per_unit(18) for b in layers_of(model))
    config = hc.StructuredPruningConfig(
        mac_ratio=1 - lost / hc.count_cost(model, 18).macs + 1e-9,
        seq_len=18,
        allocation="uniform",
        min_heads=layers_of(model)[0].num_units - heads,
        min_neurons=40,
        **keep,
    )
    hc.compress(model, config, data=data)
    assert {block.num_neurons for block in layers_of(model)} == {40}
    return model


WIDTH = {"distilbert": "hidden_dim", "opt": "ffn_dim", "gpt2": "n_inner"}


def test_plain_model_of_equal_widths(model, batches, batch, architecture, tmp_path):
    pruned = equal_widths(model(architecture), batches(model(architecture).config), prune_heads=False)
    assert hc.to_plain(pruned) is pruned
    assert hc.steps_of(pruned) == []
    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config[WIDTH.get(architecture, "intermediate_size")] == 40
    stock = AutoModel.from_pretrained(tmp_path)
    assert_same_outputs(stock, pruned, batch(pruned))
    # No record was at work: a skeleton straight from the config has these shapes.
    skeleton = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    skeleton.load_state_dict(pruned.state_dict(), strict=True)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "eurobert"])
def test_plain_model_with_fewer_groups(model, batches, batch, architecture, tmp_path):
    pruned = equal_widths(model(architecture), batches(model(architecture).config))
    hc.to_plain(pruned).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["head_dim"]) == (1, 2, 8)
    assert_same_outputs(AutoModel.from_pretrained(tmp_path), pruned, batch(pruned))


@pytest.mark.parametrize("architecture", ["nomic_bert", "gte"])
def test_plain_model_with_fewer_heads(model, batches, batch, architecture, tmp_path):
    pruned = equal_widths(model(architecture), batches(model(architecture).config))
    hc.to_plain(pruned).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["head_dim"]) == (3, 8)
    assert_same_outputs(AutoModel.from_pretrained(tmp_path), pruned, batch(pruned))


def test_heads_that_a_config_class_refuses_have_no_plain_form(batches):
    """Llama's config wants heads that divide the hidden size: what `to_plain` gave here did not open."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(**sizes, vocab_size=99, num_hidden_layers=2, pad_token_id=0)
    pruned = equal_widths(LlamaModel(config), batches(config))
    steps = hc.steps_of(pruned)
    with pytest.raises(ValueError, match=r"3 heads of size 8, with which LlamaConfig does not open: The hidden size"):
        hc.to_plain(pruned)
    assert hc.steps_of(pruned) == steps
    assert pruned.config.num_attention_heads == 4


def test_what_has_no_plain_form_says_which_layer(model, batches, compressed):
    uneven = compressed("structured_pruning", "bert")
    neurons = [block.num_neurons for block in layers_of(uneven)]
    layer = next(i for i, number in enumerate(neurons) if number != neurons[0])
    message = f"Layer {layer} has {neurons[layer]} neurons, layer 0 has {neurons[0]}: no single intermediate_size"
    steps = hc.steps_of(uneven)
    with pytest.raises(ValueError, match=message):
        hc.to_plain(uneven)
    assert hc.steps_of(uneven) == steps
    fewer = equal_widths(model("bert"), batches(model("bert").config))
    assert {block.num_units for block in layers_of(fewer)} == {3}
    with pytest.raises(ValueError, match="Layer 0 has 3 heads of size 8; bert derives the head size"):
        hc.to_plain(fewer)
    assert fewer.config.num_attention_heads == 4
    assert fewer.config.intermediate_size == 64


def test_recorded_tolerance_is_the_largest_loss_that_was_accepted(compressed):
    (step,) = hc.steps_of(compressed("structured_pruning", "bert"))
    assert 0 < step["tolerance"] < 1
    assert math.isfinite(step["seq_len"])
    assert all(type(size) is int for size in step["heads_per_layer"] + step["neurons_per_layer"])


def test_refuses_unsupported_architectures_and_layers(model, batches):
    from_config = AutoModel.from_config(AutoConfig.for_model("fnet", hidden_size=8, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match="model_type must be one of bert, .*got 'fnet'"):
        hc.compress(from_config, hc.StructuredPruningConfig(), data=[])
    wrapped = model("bert")
    wrapped.encoder.layer[1].output.dense = torch.nn.utils.parametrizations.weight_norm(
        wrapped.encoder.layer[1].output.dense
    )
    with pytest.raises(ValueError, match=r"Layer 1 output\.dense must be a plain torch\.nn\.Linear"):
        hc.compress(wrapped, hc.StructuredPruningConfig(), data=batches(wrapped.config))
