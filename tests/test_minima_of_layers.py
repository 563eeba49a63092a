"""What `min_sparsity_ratio_per_op` demands while sparsity grows, against the original's own loop."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import hf_compress as hc
from hf_compress.core.schedules import DECAYS, sparsity_at
from hf_compress.methods.weight_pruning.prunable import PrunableWeight
from hf_compress.methods.weight_pruning.ranking import zero_masks
from hf_compress.methods.weight_pruning.selection import select_units


WIDTH = 20


def originals_update(scores, before, ratio, low, high, final):
    """One update of Neural Compressor 2.6 as specs/inc_pruning.md 2.2 and 2.6 describe it, in exact arithmetic.

    Capped flags begin empty, as the original clears them at every step for `snip_momentum`.

    Args:
        scores: For each matrix [U].
        before: For each matrix [U] bool, True for what the last update pruned.
        ratio, low, high, final: Fractions of units: due now, at least and at most of each matrix, due in the end.

    Returns:
        For each matrix [U] bool, and the matrices that lost fewer units because others are below their minimum.
    """
    sizes, gone = [len(matrix) for matrix in scores], [matrix.copy() for matrix in before]
    left, live, capped, lowered = int(sum(sizes) * ratio), None, set(), []
    while left >= 1:
        now = [i for i in range(len(scores)) if i not in capped]
        if now == live or not now:
            break
        live = now
        threshold = np.sort(np.concatenate([scores[i] for i in live]))[left - 1]
        for i in live:
            mask, size, changed = scores[i] <= threshold, sizes[i], False
            zeros = [int(matrix.sum()) for matrix in gone]
            passed = any(Fraction(z, n) > final for z, n in zip(zeros, sizes, strict=True))
            zeros[i] = int(mask.sum())
            share = Fraction(zeros[i], size)
            if share > high:
                share, zeros[i], changed = high, int(size * high), True
            if share >= low and (passed or share > final):
                shares = [Fraction(z, n) for z, n in zip(zeros, sizes, strict=True)]
                shares[i] = share
                below = [j for j, value in enumerate(shares) if value < low]
                gap = int(sum(sizes[j] for j in below) * low) - sum(zeros[j] for j in below)
                remaining = int(sum(sizes) * final) - sum(zeros)
                if remaining < gap:
                    share, changed = Fraction(zeros[i] - (gap - remaining), size), True
                    lowered.append(i)
            if changed:
                capped.add(i)
                own = int(share * size)
                mask = scores[i] <= np.sort(scores[i])[own - 1] if own >= 1 else np.zeros(size, dtype=bool)
                left -= int(mask.sum())
            gone[i] = mask
    return gone, lowered


def our_update(config, scores, before, sparsity):
    """For each matrix [U] bool, through the function that training uses."""
    weights = [PrunableWeight(str(i), nn.Parameter(torch.zeros(len(s) // WIDTH, WIDTH))) for i, s in enumerate(scores)]
    kept = [torch.tensor(s, dtype=torch.float32).view(-1, WIDTH) for s in scores]
    pruned = [torch.tensor(b).view(-1, WIDTH) for b in before]
    return [mask.numpy().ravel() for mask in zero_masks(config, weights, kept, pruned, float(sparsity))]


def counts(masks):
    return [int(mask.sum()) for mask in masks]


def cost(scores, masks):
    return sum(float(matrix[mask].sum()) for matrix, mask in zip(scores, masks, strict=True))


def a_case(generator, decay):
    """Layers, bounds and a schedule; the numbers of units are whole, so that nothing depends on rounding."""
    sizes = [WIDTH * int(n) for n in generator.integers(1, 8, generator.integers(2, 7))]
    final = int(generator.integers(4, 19))
    low, high = int(generator.integers(0, final + 1)), int(generator.integers(final, 20))
    scores = [generator.random(n) * generator.choice([0.2, 1, 3]) + generator.choice([0, 0.5, 2, 4]) for n in sizes]
    updates = int(generator.integers(1, 8))
    shares = [sparsity_at(decay, t, updates, final / WIDTH) for t in range(1, updates + 1)]
    shares = [Fraction(int(1000 * share), 1000) for share in shares[:-1]] + [Fraction(final, WIDTH)]
    return [s.astype(np.float32) for s in scores], *(Fraction(n, WIDTH) for n in (low, high, final)), shares


@pytest.mark.slow
def test_schedules_against_the_original_loop():
    """Equal masks, unless several matrices are above their minimum and together leave too little for the others.

    The original takes the excess from the one matrix that it is looking at when the excess shows, and counts matrices
    that it has not looked at yet by their masks of the last update. Ours takes it from the most important units of all
    matrices above their minimum: the same number of units, the same bounds, a lower total score, whatever their order.
    """
    seen = dict.fromkeys(("equal", "equal although minima were demanded", "cheaper"), 0)
    for seed in range(480):
        generator = np.random.default_rng(seed)
        scores, low, high, final, shares = a_case(generator, list(DECAYS)[seed % len(DECAYS)])
        config = hc.WeightPruningConfig(
            pattern="1x1", target_sparsity=float(final), min_sparsity_ratio_per_op=float(low),
            max_sparsity_ratio_per_op=float(high),
        )  # fmt: skip
        sizes = [len(matrix) for matrix in scores]
        theirs = ours = [np.zeros(n, dtype=bool) for n in sizes]
        for share in shares:
            theirs, lowered = originals_update(scores, theirs, share, low, high, final)
            ours = our_update(config, scores, ours, share)
            assert sum(counts(ours)) == sum(counts(theirs)) == int(sum(sizes) * share)
            for masks in (ours, theirs):
                missing = sum(max(0, int(n * low) - z) for z, n in zip(counts(masks), sizes, strict=True))
                assert missing <= int(sum(sizes) * final) - sum(counts(masks))
                assert all(z <= n * high for z, n in zip(counts(masks), sizes, strict=True))
            if all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
                seen["equal although minima were demanded" if lowered else "equal"] += 1
            else:
                # Never where the original demanded nothing, nor where one matrix alone can give.
                pairs = zip(counts(ours), counts(theirs), sizes, strict=True)
                above = [max(pair) > n * low for *pair, n in pairs]
                assert lowered
                assert sum(above) >= 2
                assert cost(scores, ours) < cost(scores, theirs)
                seen["cheaper"] += 1
                break
            scores = [(s * generator.uniform(0.9, 1.1, len(s))).astype(np.float32) for s in scores]
    assert seen["equal"] > 1000
    assert seen["equal although minima were demanded"] > 250
    assert 20 < seen["cheaper"] < 150


def test_a_matrix_waits_while_later_updates_can_fill_it():
    """Two matrices of 32 units, 44 to go in the end and 16 of each at least; as the original has it."""
    scores = [torch.arange(32.0), torch.arange(32.0) + 100]
    config = hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.7, min_sparsity_ratio_per_op=0.5)
    weights = [PrunableWeight(name, nn.Parameter(torch.zeros(4, 8))) for name in "ab"]
    found = []
    for units in (21, 28, 29, 44):
        masks = zero_masks(config, weights, [s.view(4, 8) for s in scores], [None, None], (units + 0.5) / 64)
        found.append([int(mask.sum()) for mask in masks])
    assert found == [[21, 0], [28, 0], [28, 1], [28, 16]]


@pytest.mark.parametrize("pattern", ["1x1", "2:4", "4x1"])
def test_every_pattern_reaches_its_minima_at_the_end_and_not_before(pattern):
    torch.manual_seed(0)
    config = hc.WeightPruningConfig(pattern=pattern, target_sparsity=0.4, min_sparsity_ratio_per_op=0.3)
    scores = [torch.rand(16, 16), torch.rand(16, 16) + 10]
    weights = [PrunableWeight(name, nn.Parameter(torch.zeros(16, 16))) for name in "ab"]
    kept = [config.parsed_pattern.reduce(s, "mean") for s in scores]
    for sparsity, expected in ((0.2, (0.4, 0.0)), (0.25, (0.5, 0.0)), (0.3, (0.5, 0.1)), (0.4, (0.5, 0.3))):
        masks = zero_masks(config, weights, kept, [None, None], sparsity)
        assert [float(mask.float().mean()) for mask in masks] == pytest.approx(expected, abs=4 / 256)


def least(scores, count, final, lower, upper):
    """Least total score of `count` units that can grow to `final` within the bounds, by trying them all."""
    sizes = [len(matrix) for matrix in scores]
    flat, owner = np.concatenate([matrix.numpy() for matrix in scores]), np.repeat(np.arange(len(sizes)), sizes)
    best = np.inf
    for choice in itertools.combinations(range(len(flat)), count):
        taken = np.bincount(owner[list(choice)], minlength=len(sizes))
        if (taken <= upper).all() and np.maximum(taken, lower).sum() <= final:
            best = min(best, flat[list(choice)].sum())
    return best


def test_what_goes_now_is_the_cheapest_choice_that_leaves_the_bounds_in_reach():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        sizes = [3, 4, 4]
        scores = [torch.rand(size, generator=generator) + i / 2 for i, size in enumerate(sizes)]
        upper = [int(torch.randint(1, size + 1, (1,), generator=generator)) for size in sizes]
        lower = [int(torch.randint(0, high + 1, (1,), generator=generator)) for high in upper]
        final = int(torch.randint(sum(lower), sum(upper) + 1, (1,), generator=generator))
        for count in range(final + 1):
            none = [torch.zeros(size, dtype=torch.bool) for size in sizes]
            chosen = select_units(scores, none, count, lower, upper, final)
            assert sum(counts(chosen)) == count
            total = sum(float(matrix[mask].sum()) for matrix, mask in zip(scores, chosen, strict=True))
            assert total == pytest.approx(least(scores, count, final, lower, upper), abs=1e-6)
