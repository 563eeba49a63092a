"""Retraining-free pruning (Kwon et al. 2022) against the original's outputs and against formulas written out."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertModel

import hf_compress as hc
from hf_compress.core.architectures import ARCHITECTURES, TransformerLayer, layers_of
from hf_compress.methods.structured_pruning.fisher import (
    collect_gradients,
    fisher_information,
    fisher_selection,
    rearrange_mask,
    search_masks,
)
from tests.fisher_models import batches, tiny


class OneLinearLayer(nn.Module):
    """`loss = mean(W_o x + W_2 z - label)`: its derivatives by masks on x and z can be written down."""

    dtype, device = torch.float64, torch.device("cpu")
    base_model = property(lambda self: self)

    def __init__(self):
        super().__init__()
        self.layer = nn.Module()
        self.layer.attention = nn.Module()
        self.layer.attention.attention_head_size = 2
        self.layer.attention.out_lin = nn.Linear(6, 5).double()
        self.layer.ffn = nn.Module()
        self.layer.ffn.lin2 = nn.Linear(7, 5).double()

    def forward(self, x, z, labels):
        outputs = self.layer.attention.out_lin(x) + self.layer.ffn.lin2(z) - labels
        return type("Outputs", (), {"loss": outputs.mean()})()


def test_fisher_of_a_linear_model_is_the_analytic_one():
    torch.manual_seed(0)
    model = OneLinearLayer()
    data = [
        {"x": torch.randn(n, 6).double(), "z": torch.randn(n, 7).double(), "labels": torch.randn(n, 5).double()}
        for n in (3, 8)
    ]
    block = TransformerLayer(0, model.layer, ARCHITECTURES["distilbert"])
    units, neurons = collect_gradients(model, [block], data)
    by_column = torch.stack([b["x"].mean(0) * model.layer.attention.out_lin.weight.mean(0) for b in data])
    by_neuron = torch.stack([b["z"].mean(0) * model.layer.ffn.lin2.weight.mean(0) for b in data])
    by_unit = by_column.view(2, 3, 2).sum(-1)
    torch.testing.assert_close(units[0], by_unit, rtol=1e-12, atol=0)
    torch.testing.assert_close(fisher_information(neurons)[0], (by_neuron**2).sum(0), rtol=1e-12, atol=0)


def test_gradients_leave_the_model_as_it_was():
    model = tiny().train()
    model.classifier.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    collect_gradients(model, layers_of(model), batches(1))
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["classifier.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


def test_missing_labels():
    data = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches(1)]
    model = tiny()
    with pytest.raises(ValueError, match="data must hold labels .* BertForSequenceClassification"):
        collect_gradients(model, layers_of(model), data)
    assert all(p.requires_grad for p in model.parameters())
    base = BertModel(model.config)
    with pytest.raises(ValueError, match="data must hold labels .* BertModel"):
        collect_gradients(base, layers_of(base), batches(1))


def test_no_data_and_data_that_can_be_read_once():
    model = tiny()
    with pytest.raises(ValueError, match="at least one batch"):
        collect_gradients(model, layers_of(model), [])
    with pytest.raises(ValueError, match="one-shot"):
        hc.compress(model, hc.StructuredPruningConfig(selection="fisher"), data=iter(batches(1)))


def test_gradients_that_are_not_finite():
    model = tiny()
    with torch.no_grad():
        model.classifier.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="finite gradients"):
        collect_gradients(model, layers_of(model), batches(1))


def best_by_enumeration(units, neurons, unit_mac, neuron_mac, budget):
    units, neurons = (torch.cat(f).sort(descending=True).values for f in (units, neurons))
    scores = {}
    for heads in range(1, len(units) + 1):
        if heads * unit_mac <= budget:
            count = min(int((budget - heads * unit_mac) / neuron_mac), len(neurons))
            scores[heads, count] = float(units[:heads].sum() + neurons[:count].sum())
    return max(scores, key=scores.get)


@pytest.mark.parametrize("ratio", [0.15, 0.31, 0.52, 0.77])
def test_search_is_the_best_prefix_within_the_budget(ratio):
    torch.manual_seed(int(ratio * 100))
    units, neurons = [torch.rand(4) for _ in range(3)], [torch.rand(10) / 9 for _ in range(3)]
    found = search_masks(units, neurons, [9.7] * 3, [1.3] * 3, ratio)
    heads, count = (sum(int(m.sum()) for m in masks) for masks in (found.units, found.neurons))
    assert (heads, count) == best_by_enumeration(units, neurons, 9.7, 1.3, ratio * (12 * 9.7 + 30 * 1.3))


def test_search_keeps_everything_at_one_and_never_exceeds_the_budget():
    units, neurons = [torch.rand(3), torch.rand(5)], [torch.rand(11), torch.rand(7)]
    found = search_masks(units, neurons, [0.1, 0.1], [0.07, 0.07], 1.0)
    assert all(m.all() for m in found.units + found.neurons)
    # Heads so informative that the original would score more of them than fit.
    found = search_masks([u + 100 for u in units], neurons, [0.1, 0.2], [0.07, 0.03], 0.4)
    cost = sum(float(m.sum()) * c for m, c in zip(found.units + found.neurons, (0.1, 0.2, 0.07, 0.03), strict=True))
    assert cost <= 0.4 * (0.3 + 1.0 + 0.77 + 0.21)
    assert found.units[0].all()


def test_search_keeps_the_minima_of_every_layer():
    units, neurons = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.3, 0.2])], [torch.arange(6.0)] * 2
    neurons = [neurons[0] + 50, neurons[1]]
    found = search_masks(units, neurons, [1.0, 1.0], [1.0, 1.0], 0.5, min_units=1, min_neurons=2)
    assert found.units[1].tolist() == [False, True, False]
    assert found.neurons[1].tolist() == [False] * 4 + [True] * 2
    with pytest.raises(ValueError, match=r"mac_ratio must be at least 0\.5556 .* got 0\.5\. Lower the minima"):
        search_masks(units, neurons, [1.0, 1.0], [1.0, 1.0], 0.5, min_units=3, min_neurons=2)


def test_rearrangement_never_has_a_larger_block_fisher():
    torch.manual_seed(0)
    smaller = 0
    for trial in range(20):
        grads = torch.randn(7, 15, dtype=torch.float64) + torch.randn(7, 1)
        keep = grads.square().sum(0).argsort(descending=True).argsort() < 3 + trial % 10
        before = keep.clone()
        after = rearrange_mask(grads, keep)
        assert torch.equal(keep, before)
        assert after.sum() == keep.sum()
        loss = [float(grads[:, ~m].sum(1).square().sum()) for m in (keep, after)]
        assert loss[1] <= loss[0] * (1 + 1e-12)
        smaller += loss[1] < loss[0]
    assert smaller > 15


def test_rearrangement_finds_units_that_cancel():
    grads = torch.tensor([[1.0, 2.0, -2.1]], dtype=torch.float64)
    assert rearrange_mask(grads, torch.tensor([False, True, False])).tolist() == [True, False, False]
    for same in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert torch.equal(rearrange_mask(grads, same), same)


def test_padding_does_not_matter():
    model = tiny()
    blocks, data = layers_of(model), batches()
    wider = []
    for batch in data:
        pad = nn.functional.pad
        wider.append({k: v if k == "labels" else pad(v, (0, 5)) for k, v in batch.items()})
    found = [fisher_selection(model, blocks, d, 8.0, 0.5, 1, 8, True, True, tune=True) for d in (data, wider)]
    for narrow, wide in zip(*found, strict=True):
        assert narrow.units == wide.units
        assert torch.equal(narrow.neurons, wide.neurons)
        torch.testing.assert_close(narrow.unit_scales, wide.unit_scales, rtol=0, atol=1e-6)
        torch.testing.assert_close(narrow.neuron_scales, wide.neuron_scales, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("heads", "neurons"), [(True, False), (False, True)])
def test_only_what_may_be_pruned_is(heads, neurons):
    model = tiny("llama").float()
    layers = fisher_selection(model, layers_of(model), batches(2), 8.0, 0.8, 1, 8, heads, neurons, tune=False)
    assert all(layer.units == [0, 1] for layer in layers) != heads
    assert all(len(layer.neurons) == 48 for layer in layers) != neurons
    assert all((layer.neuron_scales == 1).all() and layer.neuron_scales.dtype == torch.float64 for layer in layers)
    with pytest.raises(ValueError, match="mac_ratio must be at least"):
        fisher_selection(model, layers_of(model), batches(1), 8.0, 0.05, 1, 8, heads, neurons, tune=False)


def test_models_that_were_already_pruned():
    model = tiny()
    blocks = layers_of(model)
    # Layers of different widths, made by hand: the first layer with half of its neurons.
    layer = blocks[0].module
    layer.intermediate.dense, layer.output.dense = nn.Linear(32, 24).double(), nn.Linear(24, 32).double()
    blocks = layers_of(model)
    layers = fisher_selection(model, blocks, batches(2), 8.0, 0.5, 1, 8, True, True, tune=True)
    assert 8 <= len(layers[0].neurons) <= 24
    macs = sum(
        len(kept.units) * block.macs_per_unit(8.0) + len(kept.neurons) * block.macs_per_neuron(8.0)
        for kept, block in zip(layers, blocks, strict=True)
    )
    full = sum(
        block.num_units * block.macs_per_unit(8.0) + block.num_neurons * block.macs_per_neuron(8.0) for block in blocks
    )
    assert 0.4 * full < macs <= 0.5 * full
