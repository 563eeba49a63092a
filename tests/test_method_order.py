"""Which methods may follow which: in one call and in two, on every architecture, and in records from files."""

import itertools
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

import hf_compress as hc
from tests.contract.conftest import METHOD_CONFIGS, REFUSED, assert_same_outputs
from tests.rounding import assert_compressed_alike


PAIRS = list(itertools.product(METHOD_CONFIGS, repeat=2))
# Why a pair is impossible on every architecture that knows both methods.
IMPOSSIBLE = {
    ("linformer", "linformer"): "Steps must not repeat linformer",
    ("token_pruning", "token_pruning"): "Steps must not repeat token_pruning",
    ("linformer", "token_pruning"): "token_pruning cannot follow linformer: it needs softmax attention",
    ("token_pruning", "linformer"): "linformer cannot follow token_pruning: it needs ordinary layers",
    ("layer_selection", "layer_selection"): "Steps must not repeat layer_selection",
    ("vocabulary_pruning", "vocabulary_pruning"): "Steps must not repeat vocabulary_pruning",
} | {
    (first, "layer_selection"): f"layer_selection cannot follow {first}: it must be the first step"
    for first in METHOD_CONFIGS
    if first != "layer_selection"
}
IMPOSSIBLE |= {
    ("weight_quantization", second): f"{second} cannot follow weight_quantization: its weights are packed"
    for second in METHOD_CONFIGS
}
IMPOSSIBLE["weight_quantization", "weight_quantization"] = "Steps must not repeat weight_quantization"
# The second one reads data, whose ids mean other tokens after the first one: not in one call.
APART = {("vocabulary_pruning", "structured_pruning"), ("vocabulary_pruning", "weight_quantization")}


def outcome(model, calls, batches):
    """The compressed model and None, or None and the message of the refusal that left it as it was."""
    parameters = dict(model.named_parameters())
    values = {name: value.clone() for name, value in parameters.items()}
    config = model.config.to_dict()
    done = 0
    for configs in calls:
        try:
            hc.compress(model, *configs, data=batches(model.config, count=3))
            done += 1
        except ValueError as error:
            if not done:
                assert dict(model.named_parameters()).keys() == parameters.keys()
                assert all(value is parameters[name] for name, value in model.named_parameters())
                assert all(torch.equal(value, values[name]) for name, value in model.named_parameters())
                assert model.config.to_dict() == config
            return None, str(error)
    return model, None


def test_every_pair(model, batches, architecture, tmp_path):
    refused = []
    for first, second in PAIRS:
        together, apart = model(architecture), model(architecture)
        steps = [METHOD_CONFIGS[first](), METHOD_CONFIGS[second]()]
        two, other = outcome(apart, [[step] for step in steps], batches)
        if (first, second) in APART and other is None:
            with pytest.raises(ValueError, match=f"{second} must come before {first}, or in a call of its own"):
                hc.compress(together, *steps, data=batches(together.config))
            one, message = two, other
        else:
            one, message = outcome(together, [steps], batches)
        assert message == other
        if message is not None:
            assert "\n" not in message
            refused.append((first, second))
            continue
        assert [step["method"] for step in hc.steps_of(one)] == [first, second]
        assert_compressed_alike(one, two)
        one.save_pretrained(tmp_path / f"{first}-{second}")
        again = AutoModel.from_pretrained(tmp_path / f"{first}-{second}")
        assert hc.steps_of(again) == hc.steps_of(one)
        kept, read = one.state_dict(), again.state_dict()
        assert kept.keys() == read.keys()
        assert all(torch.equal(read[name], value) for name, value in kept.items())
        assert_same_outputs(again, one, batches(one.config, count=1)[0])
    unknown = {method for method, kind in REFUSED if kind == architecture}
    assert set(refused) == {pair for pair in PAIRS if pair in IMPOSSIBLE or unknown & set(pair)}


@pytest.mark.parametrize("pair", list(IMPOSSIBLE))
def test_impossible_pairs_say_why(model, batches, pair):
    first, second = (METHOD_CONFIGS[name]() for name in pair)
    dense = model("bert")
    with pytest.raises(ValueError, match=IMPOSSIBLE[pair]):
        hc.compress(dense, first, second, data=batches(dense.config))


@pytest.mark.parametrize("pair", list(IMPOSSIBLE))
def test_impossible_records_do_not_open(model, batches, pair, tmp_path):
    first, other = (
        hc.compress(model("bert"), METHOD_CONFIGS[name](), data=batches(model("bert").config)) for name in pair
    )
    first.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update({name: getattr(other.config, name) for name in hc.METHODS[pair[1]].config_class.flat})
    config["quantization_config"]["steps"] += other.config.quantization_config.to_dict()["steps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for opening in (AutoModel.from_pretrained, lambda folder: hc.steps_of(AutoConfig.from_pretrained(folder))):
        with pytest.raises(ValueError, match=f"Step 1 .{pair[1]}. is broken: {IMPOSSIBLE[pair]}"):
            opening(tmp_path)


def test_a_field_written_by_hand_cannot_follow_linear_attention(model, tmp_path):
    linear = hc.compress(model("bert", "sequence_classification"), hc.LinformerConfig(projected_length=4))
    linear.config.prune_mode = "absolute_threshold"
    with pytest.raises(ValueError, match="token_pruning cannot follow linformer"):
        hc.CompressionTrainer(model=linear)
