"""What weight pruning selects: patterns and bounds against brute force, schedules, modules that are no Linear."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.core.schedules import DECAYS, SparsitySchedule, sparsity_at
from hf_compress.methods.weight_pruning.groups import groups_of
from hf_compress.methods.weight_pruning.prunable import PrunableWeight
from hf_compress.methods.weight_pruning.ranking import zero_masks
from hf_compress.methods.weight_pruning.selection import select_units
from hf_compress.methods.weight_pruning.timetable import schedule_of
from tests.pruned_training import units_of, zero_units


def prune(config, scores, sparsity=None, pruned=None):
    weights = [PrunableWeight(str(i), nn.Parameter(torch.ones(score.shape))) for i, score in enumerate(scores)]
    kept = [config.parsed_pattern.reduce(score, config.criterion_reduce_type) for score in scores]
    sparsity = config.target_sparsity if sparsity is None else sparsity
    return zero_masks(config, weights, kept, pruned or [None] * len(weights), sparsity)


@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (1, 5), (5, 1), (3, 3)])
@pytest.mark.parametrize("pattern", ["1x1", "4x1", "1x4", "2x3", "1xchannel", "channelx1", "2xchannel", "channelx3"])
def test_blocks_against_brute_force(pattern, shape):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    units = list(units_of(pattern, shape))
    means = [np.mean([float(scores[element]) for element in unit]) for unit in units]
    for target in (0.3, 0.5, 0.98):
        config = hc.WeightPruningConfig(pattern=pattern, target_sparsity=target)
        (mask,) = prune(config, [scores])
        count = int(len(units) * target + 1e-9)
        expected = np.zeros(shape, bool)
        for index in np.argsort(means)[:count]:
            for element in units[index]:
                expected[element] = True
        assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("columns", [8, 9, 10, 11])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_n_of_m_is_exact(n, m, columns):
    scores = torch.rand(6, columns, generator=torch.Generator().manual_seed(0))
    config = hc.WeightPruningConfig(pattern=f"{n}:{m}", target_sparsity=n / m)
    for values in (scores, torch.zeros_like(scores), torch.ones_like(scores)):
        (mask,) = prune(config, [values])
        for row in range(6):
            for left in range(0, columns, m):
                width = min(m, columns - left)
                group = mask[row, left : left + width]
                assert int(group.sum()) == max(0, n - (m - width))
    (mask,) = prune(config, [scores])
    whole = columns // m * m
    order = scores[:, :whole].reshape(6, -1, m).argsort(2)[..., :n]
    expected = torch.zeros(6, whole // m, m, dtype=torch.bool).scatter_(2, order, True)
    assert torch.equal(mask[:, :whole].reshape(expected.shape), expected)


def test_gradual_two_of_four_prunes_whole_groups_first():
    row = torch.tensor([[5.0, 1, 4, 2, 3, 3.5, 0.5, 6]])
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5)
    (mask,) = prune(config, [row], sparsity=0.25)
    assert mask.tolist() == [[False, True, False, True] + [False] * 4]
    (mask,) = prune(config, [row], sparsity=0.5)
    assert mask.tolist() == [[False, True, False, True, True, False, True, False]]


def test_reduction_of_a_block():
    columns = torch.tensor([[1.0, 0], [2, 4], [3, 4], [6, 0]])
    for how, expected in (("mean", [3, 2]), ("sum", [12, 8]), ("max", [6, 4])):
        config = hc.WeightPruningConfig(criterion_reduce_type=how)
        assert config.parsed_pattern.reduce(columns, how).flatten().tolist() == expected
        (mask,) = prune(config, [columns], sparsity=0.5)
        assert mask.tolist() == [[False, True]] * 4


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("pattern", ["1x1", "4x1", "1xchannel"])
def test_equal_scores_never_wipe_out_a_matrix(pattern, value):
    shapes = [(16, 8), (32, 16), (8, 8)]
    scores = [torch.full(shape, value) for shape in shapes]
    config = hc.WeightPruningConfig(pattern=pattern, target_sparsity=0.5)
    masks = prune(config, scores)
    shares = [zero_units(pattern, ~mask) for mask in masks]
    assert sum(gone for gone, _ in shares) == sum(units for _, units in shares) // 2
    assert all(abs(gone / units - 0.5) < 0.1 for gone, units in shares)


def test_ties_keep_what_is_pruned():
    scores, gone = torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool)
    gone[3], gone[1, 2] = True, True
    for pattern in ("1x1", "2:4"):
        config = hc.WeightPruningConfig(pattern=pattern, target_sparsity=0.5)
        (mask,) = prune(config, [scores], pruned=[gone])
        assert mask[1, 2]
        assert int(mask[3].sum()) == (4 if pattern == "1x1" else 2)


def best_within_bounds(scores, count, lower, upper):
    """Least total score over all choices, by trying them all."""
    sizes = [len(values) for values in scores]
    flat = np.concatenate([values.numpy() for values in scores])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    best = None
    for choice in itertools.combinations(range(len(flat)), count):
        counts = np.bincount(owner[list(choice)], minlength=len(sizes))
        if all(lower <= counts) and all(counts <= upper):
            total = flat[list(choice)].sum()
            best = total if best is None else min(best, total)
    return best


def test_bounds_give_the_least_total_score():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        sizes = [3, 4, 5]
        scores = [torch.rand(size, generator=generator) for size in sizes]
        upper = [int(torch.randint(1, size + 1, (1,), generator=generator)) for size in sizes]
        lower = [int(torch.randint(0, high + 1, (1,), generator=generator)) for high in upper]
        count = int(torch.randint(sum(lower), sum(upper) + 1, (1,), generator=generator))
        chosen = select_units(scores, [torch.zeros(s, dtype=torch.bool) for s in sizes], count, lower, upper)
        assert sum(int(units.sum()) for units in chosen) == count
        assert all(low <= int(c.sum()) <= high for low, c, high in zip(lower, chosen, upper, strict=True))
        total = sum(float(values[mask].sum()) for values, mask in zip(scores, chosen, strict=True))
        assert total == pytest.approx(best_within_bounds(scores, count, lower, upper), abs=1e-6)


def test_caps_and_floors_of_matrices():
    scores = [torch.rand(10, 10), torch.rand(10, 10) + 1, torch.rand(10, 10) + 2]
    config = hc.WeightPruningConfig(
        pattern="1x1", target_sparsity=0.5, min_sparsity_ratio_per_op=0.2, max_sparsity_ratio_per_op=0.7
    )
    assert [int(mask.sum()) for mask in prune(config, scores)] == [70, 60, 20]
    # Before the last update the floor may wait as long as what is still to come can fill it.
    assert [int(mask.sum()) for mask in prune(config, scores, sparsity=0.2)] == [60, 0, 0]
    assert [int(mask.sum()) for mask in prune(config, scores, sparsity=0.4)] == [70, 50, 0]


@pytest.mark.parametrize("decay", list(DECAYS))
def test_schedules_end_on_the_target_and_never_fall(decay):
    for updates in range(1, 401):
        values = [sparsity_at(decay, t, updates, 0.9) for t in range(updates + 1)]
        assert values[-1] == 0.9
        assert values == sorted(values)
        assert int(786432 * sparsity_at(decay, updates, updates, 0.5) / 0.5) == 786432


def test_due_and_in_force_agree():
    schedule, now = SparsitySchedule("cube", 0.8, start=3, end=20, frequency=4), 0.0
    for step in range(30):
        assert schedule.in_force(step) == now
        due = schedule.due(step)
        now = now if due is None else due
    assert now == 0.8
    assert schedule.last == 19


def test_windows_follow_the_training():
    def window(steps=100, per_epoch=10, **values):
        schedule = schedule_of(hc.WeightPruningConfig(pruning_frequency=5, **values), steps, per_epoch)
        return schedule.start, schedule.end, schedule.last

    assert window() == (0, 99, 95)
    assert window(warmup_epochs=1, cooldown_epochs=5) == (10, 50, 50)
    assert window(start_step=7, end_step=30) == (7, 30, 27)
    assert window(sparsity_decay_type="oneshot") == (1, 99, 1)
    assert window(sparsity_decay_type="oneshot", criterion="magnitude") == (0, 99, 0)
    assert window(steps=4) == (1, 3, 1)
    for steps in range(60, 120):
        # Whatever the length, three increments of the last pruning update find room before training or cooldown ends.
        assert window(steps=steps, progressive=True)[1] == steps - 1 - 3
    assert window(progressive=True, cooldown_epochs=1)[1] == 100 - 10 - 3
    with pytest.raises(ValueError, match="and 3 steps for the increments of the last pruning update"):
        window(steps=97, end_step=96, progressive=True)
    for values in ({"end_step": 120}, {"start_step": 100}, {"warmup_epochs": 6, "cooldown_epochs": 5}):
        with pytest.raises(ValueError, match="must leave room for the schedule"):
            window(**values)
    with pytest.raises(ValueError, match=r"from step 1 to -2005 .* \(2105 an epoch, cooldown_epochs=1\)"):
        window(per_epoch=2105, cooldown_epochs=1)
    with pytest.raises(ValueError, match="start_step must be at least 1 with criterion='snip'"):
        window(start_step=0, sparsity_decay_type="oneshot", criterion="snip")


def test_convolutions_and_transposed_linears():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Conv1D(8, 6))
    config = hc.WeightPruningConfig(
        pattern="1xchannel",
        target_sparsity=0.5,
        scope="local",
        criterion="magnitude",
        pruning_op_types=["Conv2d", "Conv1D"],
    )
    (group,) = groups_of(net, config)
    kept = [config.parsed_pattern.reduce(w.matrix(w.weight.detach().abs()), "mean") for w in group.weights]
    convolution, linear = zero_masks(config, group.weights, kept, [None, None], 0.5)
    strength = net[0].weight.detach().abs().mean((1, 2, 3))
    assert torch.equal(convolution.flatten(1).all(1), convolution.flatten(1).any(1))
    assert set(convolution.flatten(1).all(1).nonzero().flatten().tolist()) == set(strength.argsort()[:4].tolist())
    # Outputs of Conv1D are columns.
    assert set(linear.all(0).nonzero().flatten().tolist()) == set(net[1].weight.abs().mean(0).argsort()[:4].tolist())
    two = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, pruning_op_types=["Conv2d"])
    (group,) = groups_of(net, two)
    (mask,) = zero_masks(two, group.weights, [group.weights[0].matrix(net[0].weight.detach().abs())], [None], 0.5)
    by_position = mask.permute(0, 2, 3, 1).reshape(8, -1)
    assert zero_units("2:4", ~by_position) == (56, 56)
