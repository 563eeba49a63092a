"""The choice between budgets, against models that were cut by hand."""

import copy

import pytest
import torch

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.methods.structured_pruning.correction import output_projections
from hf_compress.methods.structured_pruning.cut_together import FACTORS, nearest_sizes
from hf_compress.methods.structured_pruning.divergence import Answers
from hf_compress.methods.structured_pruning.measuring import measure_and_rank
from tests.test_dense_target import divergence


def cut_by_hand(dense, measured, sizes):
    """A copy of a model whose output projections read the units that stay, with the correction of least squares."""
    cut = copy.deepcopy(dense)
    for key, out in output_projections(layers_of(cut)).items():
        ranking, gram = measured.rankings[key], measured.moments[key].gram
        size = out.in_features // len(ranking.order)
        columns = [unit * size + place for unit in sorted(ranking.order[: sizes[key]]) for place in range(size)]
        explained = torch.linalg.lstsq(gram[columns][:, columns], gram[columns]).solution if columns else gram[:0]
        with torch.no_grad():
            wide = out.weight.double().clone()
            out.weight.zero_()
            out.weight[:, columns] = (wide @ explained.T).float()
    return cut


@pytest.mark.parametrize(("architecture", "head"), [("bert", "sequence_classification"), ("llama", "causal_lm")])
def test_the_nearest_model_is_taken(model, batches, monkeypatch, architecture, head):
    dense = model(architecture, head)
    data = batches(dense.config)
    layers, before = layers_of(dense), copy.deepcopy(dense.state_dict())
    measured = measure_and_rank(dense, layers, hc.StructuredPruningConfig(), data)
    units = {key: len(ranking.order) for key, ranking in measured.rankings.items()}
    drawn = torch.Generator().manual_seed(0)
    sizes = [
        {key: int(torch.randint(0, number + 1, (), generator=drawn)) for key, number in units.items()} for _ in FACTORS
    ]
    apart = [divergence(cut_by_hand(dense, measured, each), dense, data) for each in sizes]
    ready = dense, layers, measured.rankings, measured.moments, data, measured.mean_length
    assert sorted(apart)[1] > 1.1 * min(apart)
    for turn in range(len(sizes)):
        offered = dict(zip(FACTORS, sizes[turn:] + sizes[:turn], strict=True))
        assert nearest_sizes(*ready, offered.__getitem__) == sizes[apart.index(min(apart))]
    # Within a tenth of the nearest one, the largest factor is taken.
    monkeypatch.setattr("hf_compress.methods.structured_pruning.cut_together._MARGIN", max(apart) / min(apart))
    assert nearest_sizes(*ready, dict(zip(FACTORS, sizes, strict=True)).__getitem__) == sizes[-1]
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_a_budget_that_heads_alone_exceed_is_no_candidate(model, batches):
    """With little enough arithmetic, some heads must go."""
    dense = model("bert", "sequence_classification")
    layers = layers_of(dense)
    units = sum(layer.num_units for layer in layers)
    heads = sum(layer.num_units * layer.macs_per_unit(16) for layer in layers)
    neurons = sum(layer.num_neurons * layer.macs_per_neuron(16) for layer in layers)
    ratio = 0.8 * heads / (heads + neurons)
    config = hc.StructuredPruningConfig(mac_ratio=ratio, allocation="divergence", min_heads=0, min_neurons=0)
    hc.compress(dense, config, data=batches(dense.config))
    assert sum(hc.steps_of(dense)[-1]["heads_per_layer"]) < units


def test_a_budget_that_nothing_meets_is_refused_first(model, batches):
    dense = model("bert", "sequence_classification")
    config = hc.StructuredPruningConfig(mac_ratio=0.02, allocation="divergence")
    with pytest.raises(ValueError, match="mac_ratio must be at least"):
        hc.compress(dense, config, data=batches(dense.config))


def test_every_so_many_tokens_of_a_large_vocabulary_are_asked(model, batches):
    dense = model("llama", "causal_lm")
    (batch,) = batches(dense.config, count=1)
    rows = Answers(dense)(batch)
    assert torch.equal(Answers(dense, 3)(batch), rows[::3])
