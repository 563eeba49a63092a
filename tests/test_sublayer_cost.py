"""What sublayers cost beside their units, against a hull by hand and against the budget without that cost."""

import pytest
import torch

import hf_compress as hc
from hf_compress.methods.structured_pruning.allocation import shared_cost


def slopes_of_the_hull(values, macs, fixed):
    """Slopes of the least concave curve over (cost, worth) of every size, nothing included."""
    points = [(0.0, 0.0)]
    for kept in range(1, len(values) + 1):
        points.append((kept * macs + fixed, sum(values[:kept])))
    slopes, place = [], 0
    while place < len(values):
        x, y = points[place]
        steeper = [((points[k][1] - y) / (points[k][0] - x), k) for k in range(place + 1, len(points))]
        slope, end = max(steeper)
        slopes += [slope] * (end - place)
        place = end
    return slopes


@pytest.mark.parametrize("fixed", [0.0, 0.5, 7.0, 1000.0])
def test_units_that_go_together_share_the_cost(fixed):
    drawn = torch.Generator().manual_seed(int(fixed))
    for units in (1, 2, 5, 12):
        values = sorted(torch.rand(units, generator=drawn).tolist(), reverse=True)
        found = shared_cost(values, 3.0, fixed)
        assert found == pytest.approx(slopes_of_the_hull(values, 3.0, fixed))
        assert found == sorted(found, reverse=True)


def test_units_that_are_worth_nothing_stay_worth_nothing():
    assert shared_cost([0.0, 0.0], 1.0, 2.0) == [0.0, 0.0]
    assert shared_cost([], 1.0, 2.0) == []


@pytest.mark.parametrize("settings", [{}, {"target": "dense"}])
def test_small_sublayers_go_as_a_whole_within_the_same_budget(model, batches, settings):
    sizes = {}
    for cost in (0.0, 20.0):
        made = model("bert", "sequence_classification")
        config = hc.StructuredPruningConfig(
            mac_ratio=0.4,
            allocation="divergence",
            min_heads=0,
            min_neurons=0,
            sublayer_cost=cost,
            seq_len=16,
            **settings,
        )
        before = hc.count_cost(made, 16).macs
        hc.compress(made, config, data=batches(made.config))
        assert hc.count_cost(made, 16).macs <= 0.4 * before
        done = hc.steps_of(made)[-1]
        sizes[cost] = [*done["heads_per_layer"], *done["neurons_per_layer"]]
    assert sizes[20.0].count(0) > sizes[0.0].count(0)


@pytest.mark.parametrize(("settings", "message"), [
    ({"sublayer_cost": -1.0}, "sublayer_cost must not be negative, got -1.0"),
    ({"sublayer_cost": float("nan")}, "sublayer_cost must be finite, got nan"),
    ({"sublayer_cost": 1.0, "allocation": "uniform"}, "sublayer_cost must be 0 with allocation='uniform', got 1.0"),
    ({"sublayer_cost": 1.0, "min_neurons": 8}, "sublayer_cost must go with min_heads=0 or min_neurons=0, got 1.0"),
])  # fmt: skip
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        hc.StructuredPruningConfig(**{"allocation": "divergence", **settings})
