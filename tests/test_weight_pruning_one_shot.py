"""Weight pruning in one call: by magnitude, by gradients, with several patterns at once."""

import copy
import re

import pytest
import torch
from torch import nn

import hf_compress as hc
from tests.pruned_training import HEAD, linears, zero_units


# One-shot.


@pytest.mark.parametrize(
    ("pattern", "target"), [("4x1", 0.9), ("2:4", 0.5), ("1x1", 0.5), ("1xchannel", 0.5), ("3x5", 0.7)]
)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_one_shot_magnitude(model, pattern, target, scope):
    dense = model("bert", HEAD)
    pruned = hc.compress(
        copy.deepcopy(dense),
        hc.WeightPruningConfig(pattern=pattern, target_sparsity=target, scope=scope, criterion="magnitude"),
    )
    counts = [zero_units(pattern, weight) for weight in linears(pruned).values()]
    ceiling = target if ":" in pattern else 1.0
    if scope == "local":
        assert all(gone == int(units * target / ceiling + 1e-9) for gone, units in counts)
    else:
        assert sum(g for g, _ in counts) == int(sum(u for _, u in counts) * target / ceiling + 1e-9)
    for (name, before), after in zip(dense.state_dict().items(), pruned.state_dict().values(), strict=True):
        assert torch.equal(before.where(after != 0, 0), after), name
        assert name.removesuffix(".weight") in linears(dense) or torch.equal(before, after)
    (step,) = hc.steps_of(pruned)
    assert step["method"] == "weight_pruning"
    assert step["achieved_sparsity"] == pytest.approx(target, abs=0.01)
    assert hc.steps_of(hc.to_plain(pruned)) == []


def test_one_shot_with_gradients(model, batches):
    dense = model("bert", HEAD)
    data = [{**batch, "labels": torch.arange(8) % 2} for batch in batches(dense.config, count=2)]
    for parameter in dense.bert.parameters():
        parameter.requires_grad_(False)
    target = "bert.encoder.layer.0.output.dense"
    reference = copy.deepcopy(dense).requires_grad_(True)
    gradients = []
    for batch in data:
        reference.zero_grad()
        reference(**batch).loss.backward()
        gradients.append(reference.get_submodule(target).weight.grad.clone())
    weight = reference.get_submodule(target).weight.detach()
    expected = {
        "gradient": (gradients[0] + gradients[1]).abs(),
        "snip": (weight * (gradients[0] + gradients[1])).abs(),
        "snip_momentum": 0.9 * (weight * gradients[0]).abs() + (weight * gradients[1]).abs(),
    }
    for criterion, scores in expected.items():
        config = hc.WeightPruningConfig(
            pattern="1x1", target_sparsity=0.5, scope="local", criterion=criterion, op_names=[f"^{target}$"]
        )
        pruned = hc.compress(copy.deepcopy(dense), config, data=data)
        lost = set(scores.flatten().argsort()[: scores.numel() // 2].tolist())
        zeros = (pruned.get_submodule(target).weight == 0).flatten().nonzero().flatten().tolist()
        assert set(zeros) == lost
        assert not any(parameter.requires_grad for parameter in pruned.bert.parameters())
        assert all(parameter.grad is None for parameter in pruned.parameters())
    before = copy.deepcopy(dense.state_dict())
    for wrong, message in (
        (None, "data must be given with criterion='snip_momentum'"),
        ([], "at least one batch"),
        (batches(dense.config, count=1), "data must hold labels with criterion='snip_momentum'"),
    ):
        with pytest.raises(ValueError, match=message):
            hc.compress(dense, config, data=wrong)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_mixed_patterns_at_once(model):
    config = hc.WeightPruningConfig(
        criterion="magnitude",
        local_configs=[
            {"op_names": ["output", "intermediate"], "pattern": "2:4", "target_sparsity": 0.5},
            {"op_names": ["query", "key", "value"], "pattern": "1xchannel", "target_sparsity": 0.25, "scope": "local"},
        ],
    )
    pruned = hc.compress(model("bert", HEAD), config)
    for name, weight in linears(pruned).items():
        attention = re.search("query|key|value", name)
        assert zero_units("1xchannel" if attention else "2:4", weight) == (
            (8, 32) if attention else (weight.numel() // 4,) * 2
        )
    (step,) = hc.steps_of(pruned)
    assert step["local_configs"] == list(config.local_configs)


def test_weights_without_gradient_are_named_at_once(model, batches, caplog):
    dense = model("bert", HEAD)
    dense.bert.encoder.layer[1].spare = nn.Linear(8, 8)
    data = [{**batch, "labels": torch.arange(8) % 2} for batch in batches(dense.config, count=1)]
    pruned = hc.compress(dense, hc.WeightPruningConfig(criterion="snip", target_sparsity=0.5), data=data)
    assert "because no gradient reaches them: bert.encoder.layer.1.spare (0.3% of the selected" in caplog.text
    assert pruned.bert.encoder.layer[1].spare.weight.all()
