"""Models with packed weights: what is chosen, saved, refused, and what other methods and trainers do with them."""

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.calibration import call_order
from hf_compress.methods.weight_quantization.packed import PackedModule
from hf_compress.methods.weight_quantization.selection import shared_inputs
from tests.contract.conftest import assert_same_outputs
from tests.pruned_training import arguments, examples
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding
from tests.test_empty_sublayers import emptied


HEAD = "sequence_classification"


def packed_in(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def quantised(model, batches, architecture="bert", head=HEAD, **settings):
    dense = model(architecture, head)
    return hc.compress(dense, hc.WeightQuantizationConfig(**settings), data=batches(dense.config))


def test_modules_that_share_an_input_read_one_tensor(model, batches, architecture):
    """What the roles say is what a forward pass shows."""
    dense = model(architecture)
    layer = layers_of(dense)[0]
    groups = shared_inputs(layer, list(layer.modules))
    numbers = {}
    for path, number in call_order(dense, layer.modules, batches(dense.config, count=1)[0]):
        numbers.setdefault(path, set()).add(number)
    assert sorted(path for paths in groups for path in paths) == sorted(layer.modules)
    for paths in groups:
        assert all(numbers[path] == numbers[paths[0]] for path in paths)
        assert len(paths) == 1 or len(numbers[paths[0]]) == 1


def test_only_projections_of_layers_are_packed(model, batches):
    found = packed_in(quantised(model, batches))
    assert len(found) == 3 * 6
    assert all("encoder.layer." in name for name in found)
    some = quantised(model, batches, op_names=[r"^bert\.encoder\.layer\.[01]"], excluded_op_names=["attention"])
    assert {name.removeprefix("bert.encoder.layer.") for name in packed_in(some)} == {
        "0.intermediate.dense", "0.output.dense", "1.intermediate.dense", "1.output.dense",
    }  # fmt: skip


@pytest.mark.parametrize(("architecture", "act_order"), [("bert", False), ("gpt2", False), ("opt", False),
                                                         ("modernbert", False), ("llama", True)])  # fmt: skip
def test_gated_decoders_take_large_inputs_first(model, batches, architecture, act_order):
    changed = quantised(model, batches, architecture, "base", group_size=16)
    assert hc.steps_of(changed)[0]["act_order"] is act_order
    assert all((module.groups is not None) is act_order for module in packed_in(changed).values())


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_on_disk(model, batches, bits, symmetric, tmp_path):
    changed = quantised(model, batches, bits=bits, group_size=12, symmetric=symmetric)
    changed.save_pretrained(tmp_path)
    expected = 0
    for module in packed_in(changed).values():
        rows, columns, groups = module.out_features, module.in_features, -(-module.in_features // 12)
        expected += rows * (-(-columns * bits // 8) + 4 * groups + (0 if symmetric else -(-groups * bits // 8)))
    kinds, found, others = set(), 0, 0
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        for name in saved.keys():  # noqa: SIM118  (not a dict)
            tensor, (place, _, kind) = saved.get_tensor(name), name.rpartition(".")
            size = tensor.numel() * tensor.element_size()
            if place in packed_in(changed) and kind != "bias":
                kinds.add((kind, tensor.dtype))
                found += size
            else:
                others += size
    zeros = set() if symmetric else {("zeros", torch.uint8)}
    assert kinds == {("codes", torch.uint8), ("scales", torch.float32)} | zeros
    assert found == expected
    cost, dense = hc.count_cost(changed), hc.count_cost(model("bert", HEAD))
    assert cost.bytes == found + others
    assert (cost.params, cost.macs) == (dense.params, dense.macs)
    assert cost.bytes < dense.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opened_weights_are_those_that_were_saved(model, batches, dtype, tmp_path):
    dense = model("llama", HEAD).to(dtype)
    changed = hc.compress(dense, hc.WeightQuantizationConfig(group_size=16), data=batches(dense.config))
    changed.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    twins = {"opened": again, "copied": copy.deepcopy(changed), "pickled": pickle.loads(pickle.dumps(changed))}
    for twin in twins.values():
        for name, module in packed_in(changed).items():
            theirs = twin.get_submodule(name)
            assert type(theirs) is type(module)
            assert theirs.weight.dtype == dtype
            assert torch.equal(theirs.weight, module.weight)
    assert not any(name.endswith("proj.weight") for name in changed.state_dict())


def test_another_dtype_is_the_same_live_and_opened(model, batches, tmp_path):
    changed = quantised(model, batches, group_size=16)
    changed.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        opened = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
        cast = copy.deepcopy(changed).to(dtype)
        for name, module in packed_in(cast).items():
            assert torch.equal(module.weight, opened.get_submodule(name).weight)
            assert module.codes.dtype == torch.uint8


def test_a_skeleton_on_no_device_takes_the_state(model, batches, batch):
    changed = quantised(model, batches, "gpt2", "base", bits=3, group_size=16, act_order=True)
    with torch.device("meta"):
        empty = hc.rebuild(AutoModel.from_config(copy.deepcopy(changed.config)))
    empty.to_empty(device="cpu").load_state_dict(changed.state_dict())
    for name, module in packed_in(changed).items():
        assert torch.equal(empty.get_submodule(name).weight, module.weight)


@pytest.fixture
def batch(batches):
    return lambda config: batches(config, count=1, seed=7)[0]


def test_padding_does_not_count(model, batches):
    dense = model("bert")
    short = [{k: v[:, :12] for k, v in b.items()} for b in batches(dense.config)]
    assert all(b["attention_mask"].all() for b in short)
    padded = [{k: torch.nn.functional.pad(v, (0, 9)) for k, v in b.items()} for b in short]
    found = []
    for data in (short, padded):
        changed = hc.compress(model("bert"), hc.WeightQuantizationConfig(bits=3, group_size=16), data=data)
        found.append(torch.cat([module.codes.flatten() for module in packed_in(changed).values()]))
    # Kernels add the rows of longer batches in another order.
    assert (found[0] != found[1]).float().mean() < 1e-3


@pytest.mark.parametrize("settings", [{}, {"true_sequential": True}, {"correction": "dense"}])
def test_inputs_make_up_for_rounding(model, batches, batch, settings):
    dense = model("bert")
    nearest = quantised(model, batches, head="base", bits=3, algorithm="rtn")
    changed = quantised(model, batches, head="base", bits=3, **settings)
    errors = [
        sum(float((m(**b)[0] - dense(**b)[0]).detach().pow(2).mean()) for b in batches(dense.config, count=2, seed=9))
        for m in (nearest, changed)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_the_first_layer_has_no_difference_to_correct(model, batches):
    first = {"op_names": [r"layer\.0\.attention\.self"]}
    plain, corrected = (quantised(model, batches, **first, correction=kind) for kind in ("none", "dense"))
    for name, module in packed_in(plain).items():
        assert torch.equal(module.codes, corrected.get_submodule(name).codes)


def test_pruned_recovered_and_quantised_is_one_record(model, batches, batch, tmp_path):
    data = batches(model("bert").config)
    steps = [
        hc.StructuredPruningConfig(mac_ratio=0.6),
        hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude"),
        hc.WeightQuantizationConfig(group_size=16),
    ]
    changed = hc.compress(model("bert", HEAD), *steps, data=data)
    assert [step["method"] for step in hc.steps_of(changed)] == [
        "structured_pruning", "weight_pruning", "weight_quantization",
    ]  # fmt: skip
    for name, module in packed_in(changed).items():
        if "pooler" not in name:
            assert float((module.weight == 0).float().mean()) >= 0.45
    changed.save_pretrained(tmp_path)
    assert_same_outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path), changed, batch(changed.config))


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_sublayers_without_units_are_left_out(model, batches, batch, architecture, tmp_path):
    bare = emptied(model(architecture, HEAD))
    changed = hc.compress(bare, hc.WeightQuantizationConfig(bits=8), data=batches(bare.config))
    first, last = layers_of(changed, packed=True)[0], layers_of(changed, packed=True)[-1]
    assert first.num_units == 0
    assert not isinstance(first.attention_out.module, PackedModule)
    assert isinstance(last.attention_out.module, PackedModule)
    changed.save_pretrained(tmp_path)
    assert_same_outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path), changed, batch(changed.config))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_to_plain_gives_ordinary_weights(model, batches, batch, architecture, tmp_path):
    changed = quantised(model, batches, architecture)
    expected = {name: module.weight.clone() for name, module in packed_in(changed).items()}
    twin = copy.deepcopy(changed)
    assert hc.to_plain(changed) is changed
    assert hc.steps_of(changed) == []
    assert not packed_in(changed)
    assert {type(changed.get_submodule(name)) for name in expected} == {
        type(layers_of(model(architecture))[0].attention_out.module)
    }
    assert all(torch.equal(changed.get_submodule(name).weight, weight) for name, weight in expected.items())
    assert_same_outputs(changed, twin, batch(changed.config))
    changed.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    hc.compress(changed, hc.StructuredPruningConfig(mac_ratio=0.7), data=batches(changed.config))


@pytest.mark.parametrize("opened", [False, True])
def test_dequantised_weights_keep_their_shapes_and_can_be_trained(model, batches, batch, opened, tmp_path):
    """Layers of unequal widths, which no ordinary config describes."""
    pruning = hc.StructuredPruningConfig(mac_ratio=0.6)
    pruned = hc.compress(model("bert", "sequence_classification"), pruning, data=batches(model("bert").config))
    changed = hc.compress(pruned, hc.WeightQuantizationConfig(bits=4), data=batches(pruned.config))
    with pytest.raises(ValueError, match="layer"):
        hc.to_plain(copy.deepcopy(changed))
    if opened:
        changed.save_pretrained(tmp_path / "m")
        changed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    twin = copy.deepcopy(changed)
    assert hc.dequantize(changed) is changed
    assert not packed_in(changed)
    assert [step["method"] for step in hc.steps_of(changed)] == ["structured_pruning"]
    assert_same_outputs(changed, twin, batch(changed.config))
    changed.save_pretrained(tmp_path / "ordinary")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ordinary")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in changed.state_dict().items())
    Trainer(again, arguments(tmp_path / "t", max_steps=1), train_dataset=examples(again.config, batches)).train()
    hc.compress(changed, hc.WeightQuantizationConfig(bits=8), data=batches(changed.config))
    with pytest.raises(ValueError, match="must have packed weights"):
        hc.dequantize(again)


@pytest.mark.parametrize("kind", [Trainer, hc.CompressionTrainer])
@pytest.mark.parametrize("opened", [False, True])
def test_packed_weights_are_not_trained(model, batches, kind, opened, tmp_path):
    changed = quantised(model, batches)
    if opened:
        changed.save_pretrained(tmp_path / "m")
        changed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    before = {name: value.clone() for name, value in changed.state_dict().items()}
    trainer = kind(changed, arguments(tmp_path / "t", max_steps=1), train_dataset=examples(changed.config, batches))
    with pytest.raises(ValueError, match=r"packed weights cannot be trained.*hc\.dequantize\(model\).*adapters"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in changed.state_dict().items())


# PEFT asks for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [Trainer, hc.CompressionTrainer])
def test_adapters_are_trained_on_top(model, batches, batch, kind, tmp_path):
    quantised(model, batches).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    before = copy.deepcopy(base)
    student = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    data = examples(base.config, batches)
    kind(student, arguments(tmp_path / "t", max_steps=2, learning_rate=1e-2), train_dataset=data).train()
    seen = batch(base.config)
    student.eval()
    with torch.no_grad():
        assert differ_beyond_rounding(student(**seen).logits, before(**seen).logits)
        student.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
        assert_equal_to_rounding(again(**seen).logits, student(**seen).logits)
    merged = student.merge_and_unload()
    with pytest.raises(ValueError, match=r"query\.weight must be what its packed integers say"):
        merged.save_pretrained(tmp_path / "merged")


def test_nothing_may_follow(model, batches):
    changed = quantised(model, batches)
    steps, data = hc.steps_of(changed), batches(changed.config)
    for config in (hc.StructuredPruningConfig(), hc.TokenPruningConfig(), hc.LinformerConfig()):
        with pytest.raises(ValueError, match=r"cannot follow weight_quantization: its weights are packed.*dequantize"):
            hc.compress(changed, config, data=data)
    with pytest.raises(ValueError, match="must not repeat weight_quantization"):
        hc.compress(changed, hc.WeightQuantizationConfig(), data=data)
    with pytest.raises(ValueError, match=r"Layer 0 attention.* must have an ordinary weight, got packed integers"):
        layers_of(changed)
    assert hc.steps_of(changed) == steps


BAD = {
    "bits must be in 2..8, got 1": {"bits": 1},
    "bits must be in 2..8, got 9": {"bits": 9},
    "group_size must be -1 .* or at least 1, got 0": {"group_size": 0},
    "percdamp must be positive, got 0": {"percdamp": 0},
    "static_groups must go with a group_size": {"static_groups": True},
    "correction must be left out with algorithm='rtn'": {"algorithm": "rtn", "correction": "dense"},
    "act_order must be left out with algorithm='rtn'": {"algorithm": "rtn", "act_order": True},
    "true_sequential must be left out with algorithm='rtn'": {"algorithm": "rtn", "true_sequential": True},
    "op_names must be regular expressions": {"op_names": ["("]},
    "algorithm must be one of": {"algorithm": "awq"},
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_settings(message):
    with pytest.raises(ValueError, match=message) as caught:
        hc.WeightQuantizationConfig(**BAD[message])
    assert "\n" not in str(caught.value)


def test_impossible_models_and_data(model, batches):
    config, dense = hc.WeightQuantizationConfig, model("bert")
    data = batches(dense.config)
    with pytest.raises(ValueError, match="data must be given with algorithm='gptq'"):
        hc.compress(dense, config())
    with pytest.raises(ValueError, match=r"op_names=\['nothing'\] .* must select a projection of a layer"):
        hc.compress(dense, config(op_names=["nothing"]), data=data)
    # Every module left out by its name.
    with pytest.raises(ValueError, match=r"excluded_op_names=\['layer'\] must select"):
        hc.compress(dense, config(excluded_op_names=["layer"]), data=data)
    other = AutoModel.from_config(type(dense.config)(num_hidden_layers=1, hidden_size=12))
    other.config.model_type = "mixtral"
    with pytest.raises(ValueError, match="model_type must be one of .*got 'mixtral'"):
        hc.compress(other, config(), data=data)
    tokens = hc.compress(model("bert"), hc.TokenPruningConfig())
    with pytest.raises(ValueError, match="correction must be 'none' for a model that drops tokens"):
        hc.compress(tokens, config(correction="dense"), data=data)
    with pytest.raises(ValueError, match="correction must be 'none' for deberta-v2"):
        hc.compress(model("deberta-v2"), config(correction="dense"), data=data)
    broken = model("bert")
    broken.encoder.layer[1].output.dense.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="Weights must be finite"):
        hc.compress(broken, config(), data=data)
    broken.encoder.layer[1].output.dense.bias.data[0] = 3e38
    broken.encoder.layer[1].output.LayerNorm.eps = torch.nan
    with pytest.raises(ValueError, match="Activations must be finite, got NaN or infinity at"):
        hc.compress(broken, config(), data=data)
    assert not packed_in(broken)
