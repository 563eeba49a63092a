"""Interpolative decompositions against pivoted QR of scipy, least squares, and Schur complements written out."""

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.linalg.interpolative import interp_decomp

from hf_compress.core.moments import SecondMoments, add_gram_, add_gram_in_parts_
from hf_compress.methods.structured_pruning.decomposition import (
    CountSketch,
    interpolation_matrix,
    interpolative_decomposition,
)
from hf_compress.methods.structured_pruning.pivoting import (
    pivoted_by_panels,
    pivoted_cholesky,
    pivoted_units,
    residual_along,
)
from tests.rounding import assert_equal_to_rounding


# LAPACK, which the CPU takes, and what an accelerator takes.
ROUTES = [pivoted_cholesky, pivoted_by_panels]


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def graded(rows, columns, condition, seed=0):
    """A matrix with singular values from 1 down to 1 / condition, evenly spaced on a logarithmic axis."""
    left, _ = torch.linalg.qr(gaussian(rows, columns, seed))
    right, _ = torch.linalg.qr(gaussian(columns, columns, seed + 1))
    return left * torch.logspace(0, -np.log10(condition), columns, dtype=torch.float64) @ right.T


def pivoted_qr(a):
    """R and the pivots of column-pivoted QR (LAPACK geqp3)."""
    r, pivots = scipy.linalg.qr(a.numpy(), mode="r", pivoting=True)
    return torch.from_numpy(r[: a.shape[1]].copy()), torch.from_numpy(pivots.astype(np.int64))


def coefficients_by_qr(a, k):
    r, pivots = pivoted_qr(a)
    t = torch.zeros(k, a.shape[1], dtype=torch.float64)
    t[:, pivots[:k]] = torch.eye(k, dtype=torch.float64)
    t[:, pivots[k:]] = torch.linalg.solve_triangular(r[:k, :k], r[:k, k:], upper=True)
    return t


def relative(difference, reference):
    return float(torch.linalg.norm(difference) / torch.linalg.norm(reference))


def unexplained(a, columns):
    """A minus its projection on some of its columns."""
    if len(columns) == 0:
        return a
    basis = torch.from_numpy(scipy.linalg.orth(a[:, columns].numpy(), rcond=1e-11))
    return a - basis @ (basis.T @ a)


# 200 columns need several panels, and dropping of taken columns between them.
@pytest.mark.parametrize(("rows", "columns", "k"), [(500, 60, 30), (500, 200, 150)])
def test_pivots_and_coefficients_of_pivoted_qr(rows, columns, k):
    a = gaussian(rows, columns)
    _, by_qr = pivoted_qr(a)
    for route in ROUTES:
        assert route(a.T @ a).order.tolist() == by_qr.tolist()
    index, projection = interp_decomp(a.numpy(), k, rand=False)
    keep, t, _ = interpolative_decomposition(a, k)
    assert keep.tolist() == by_qr[:k].tolist() == index[:k].tolist()
    assert relative(t - coefficients_by_qr(a, k), t) < 1e-10
    assert relative(t[:, torch.from_numpy(index[k:])] - torch.from_numpy(projection), t) < 1e-10
    assert torch.equal(t[:, keep], torch.eye(k, dtype=torch.float64))


@pytest.mark.parametrize("columns", [60, 150])
def test_error_is_what_pivoted_qr_leaves(columns):
    a = gaussian(400, columns)
    r, _ = pivoted_qr(a)
    for k in (1, columns // 3, columns - 1):
        keep, t, _ = interpolative_decomposition(a, k)
        error, left = a - a[:, keep] @ t, r[k:, k:]
        for order in ("fro", 2):
            gap = abs(torch.linalg.matrix_norm(error, order) - torch.linalg.matrix_norm(left, order))
            assert gap <= 1e-10 * torch.linalg.matrix_norm(a, order)
    profile = torch.stack([r[k:, k:].square().sum() for k in range(columns + 1)])
    for route in ROUTES:
        pivoted = route(a.T @ a)
        assert torch.allclose(pivoted.residual, profile, rtol=1e-9, atol=1e-9 * float(profile[0]))
        assert torch.allclose(pivoted.pivots, r.diagonal().abs(), rtol=1e-9)
        assert (pivoted.residual.diff() <= 0).all()


@pytest.mark.parametrize("route", ROUTES)
def test_stopping_early_changes_nothing_before_the_stop(route):
    gram = gaussian(300, 90).T @ gaussian(300, 90)
    full, short = route(gram), route(gram, 70)
    assert short.order[:70].tolist() == full.order[:70].tolist()
    assert sorted(short.order.tolist()) == list(range(90))
    assert torch.allclose(short.residual[:71], full.residual[:71], rtol=1e-12)


def test_factor_gives_the_coefficients_of_the_least_squares():
    for condition in (1e2, 1e4):
        a = graded(500, 60, condition)
        keep, t, _ = interpolative_decomposition(a, 58)
        assert relative(t - interpolation_matrix(a.T @ a, keep), t) < 1e-9


def test_rank_deficient():
    a = gaussian(600, 40) @ gaussian(40, 120, 1)
    for route in ROUTES:
        pivoted = route(a.T @ a)
        assert pivoted.rank == 40
        assert not pivoted.residual[40:].any()
        assert not pivoted.pivots[40:].any()
    keep, t, columns = interpolative_decomposition(a, 40)
    assert relative(a - a[:, keep] @ t, a) < 1e-12
    assert sorted(columns.order.tolist()) == list(range(120))
    with pytest.raises(ValueError, match=r"independent columns \(40\), got 41"):
        interpolative_decomposition(a, 41)


@pytest.mark.parametrize("route", ROUTES)
def test_columns_beyond_the_rank_are_those_that_rounding_made(route):
    a = graded(500, 60, 1e10)
    gram = a.T @ a
    pivoted = route(gram)
    floor = 60 * torch.finfo(torch.float64).eps * float(gram.diagonal().max())
    assert 40 < pivoted.rank < 60
    assert (pivoted.pivots[: pivoted.rank].square() > floor).all()


def test_what_changes_the_selection_and_what_does_not():
    a = gaussian(256, 48)
    keep, t, _ = interpolative_decomposition(a, 20)
    mixing, _ = torch.linalg.qr(gaussian(256, 256, 2))
    shuffled = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    by_blocks = torch.cat([a[128:], a[:128]])
    for same in (a[shuffled], mixing @ a, by_blocks, 7.5 * a):
        keep_same, t_same, _ = interpolative_decomposition(same, 20)
        assert keep_same.tolist() == keep.tolist()
        assert relative(t_same - t, t) < 1e-10
    columns = torch.randperm(48, generator=torch.Generator().manual_seed(4))
    keep_moved, t_moved, _ = interpolative_decomposition(a[:, columns], 20)
    assert columns[keep_moved].tolist() == keep.tolist()
    assert relative(t_moved - t[:, columns], t) < 1e-10
    scaled = a.clone()
    loser = int(next(i for i in range(48) if i not in keep.tolist()))
    scaled[:, loser] *= 100
    assert int(interpolative_decomposition(scaled, 20)[0][0]) == loser


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moments_do_not_depend_on_the_batches(dtype):
    # More rows than one chunk.
    a = (gaussian(1100, 450) + 0.5).to(dtype)
    whole, parts = SecondMoments(450), SecondMoments(450)
    whole.update(a)
    for part in a.split(37):
        parts.update(part)
    wide = a.double()
    covariance = torch.from_numpy(np.cov(wide.numpy(), rowvar=False, bias=True)) * 1100
    for moments in (whole, parts):
        assert relative(moments.gram - wide.T @ wide, wide.T @ wide) < 1e-13
        assert torch.allclose(moments.mean, wide.mean(0), atol=1e-6)
        assert torch.allclose(moments.centred_gram(), covariance, atol=2e-4)
        assert moments.num_rows == 1100


def test_symmetric_product_is_that_of_general_ones():
    # 450 columns: more than one block of the general product.
    a, half = gaussian(300, 450), torch.ones(450, 450, dtype=torch.float64)
    blocks = half.clone()
    add_gram_(half, a)
    add_gram_in_parts_(blocks, a)
    for gram in (half, blocks):
        assert relative((gram - 1 - a.T @ a).triu(), a.T @ a) < 1e-14


def test_moments_leave_the_rows_alone():
    a = gaussian(30, 5).requires_grad_()
    before = a.detach().clone()
    moments = SecondMoments(5)
    moments.update(a)
    moments.update(a[:0])
    assert torch.equal(a, before)
    assert not moments.gram.requires_grad
    assert moments.num_rows == 30


def test_single_precision_input():
    a = graded(500, 60, 1e2)
    keep, t, _ = interpolative_decomposition(a, 30)
    keep_single, t_single, _ = interpolative_decomposition(a.float(), 30)
    assert keep_single.tolist() == keep.tolist()
    assert float((t_single - t).abs().max()) < 1e-4


def test_warns_when_pivots_are_below_what_moments_can_rank(caplog):
    interpolative_decomposition(graded(500, 60, 1e2), 60)
    assert not caplog.records
    interpolative_decomposition(graded(500, 60, 1e10), 44)
    assert "their order is arbitrary" in caplog.text


def test_warns_about_large_coefficients(caplog):
    # Kept columns e1 and e1 + 0.01 e2: e2 needs the coefficients -100 and 100.
    a = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.01, 1.0]], dtype=torch.float64)
    t = interpolation_matrix(a.T @ a, torch.tensor([0, 1]))
    assert torch.allclose(t[:, 2], torch.tensor([-100.0, 100.0], dtype=torch.float64))
    assert "reach 100.0" in caplog.text


def test_coefficients_are_the_least_squares_refit_of_the_next_layer():
    a, weight = gaussian(500, 60), gaussian(25, 60, 5)
    keep, t, _ = interpolative_decomposition(a, 24)
    refit = np.linalg.lstsq(a[:, keep].numpy(), (a @ weight.T).numpy(), rcond=None)[0]
    assert relative(t @ weight.T - torch.from_numpy(refit), t @ weight.T) < 1e-8
    # Squared error of that layer's output, from the Schur complement.
    gram, others = a.T @ a, [i for i in range(60) if i not in keep.tolist()]
    schur = gram[others][:, others] - gram[others][:, keep] @ torch.linalg.solve(
        gram[keep][:, keep], gram[keep][:, others]
    )
    error = (a @ weight.T - a[:, keep] @ t @ weight.T).square().sum()
    assert torch.allclose(error, torch.trace(weight[:, others] @ schur @ weight[:, others].T), rtol=1e-9)


def test_ridge_and_cross_products():
    a = gaussian(80, 20)
    gram, keep = a.T @ a, torch.tensor([3, 1, 17])
    inner = gram[keep][:, keep] + 0.1 * gram[keep, keep].mean() * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(interpolation_matrix(gram, keep, 0.1), torch.linalg.inv(inner) @ gram[keep], atol=1e-12)
    exact = interpolation_matrix(gram, keep)
    assert_equal_to_rounding(interpolation_matrix(gram[keep], keep, cross=a[:, keep].T @ a), exact)


def test_dead_and_repeated_columns():
    a = gaussian(200, 12)
    a[:, 4] = 0
    a[:, 9] = a[:, 2]
    for route in ROUTES:
        pivoted = route(a.T @ a)
        assert pivoted.rank == 10
        assert 4 in pivoted.order[10:].tolist()
    keep = torch.tensor([i for i in range(12) if i not in (4, 5, 6)])
    t = interpolation_matrix(a.T @ a, keep)
    assert (t[:, 4] == 0).all()
    # Columns 2 and 9 are one direction: coefficients exist all the same, and fit as well as any.
    refit = np.linalg.lstsq(a[:, keep].numpy(), a[:, 5].numpy(), rcond=None)[0]
    assert torch.allclose(a[:, keep] @ t[:, 5], a[:, keep] @ torch.from_numpy(refit), atol=1e-9)
    for route in ROUTES:
        zero = route(torch.zeros(3, 3, dtype=torch.float64))
        assert (zero.rank, zero.order.tolist(), zero.residual.tolist()) == (0, [0, 1, 2], [0.0] * 4)


def test_sketched_pivots_with_exact_coefficients():
    a, k = graded(3000, 128, 1e3), 40
    keep, t, _ = interpolative_decomposition(a, k)
    sketched, t_sketched, _ = interpolative_decomposition(a, k, sketch_rows=4 * k)
    assert relative(a - a[:, sketched] @ t_sketched, a) <= 1.05 * relative(a - a[:, keep] @ t, a)
    # No other coefficients on these columns are better: they were not taken from the sketch.
    refit = np.linalg.lstsq(a[:, sketched].numpy(), a.numpy(), rcond=None)[0]
    assert relative(t_sketched - torch.from_numpy(refit), t_sketched) < 1e-8
    unsketched, t_unsketched, _ = interpolative_decomposition(a, k, sketch_rows=len(a))
    assert unsketched.tolist() == keep.tolist()
    assert_equal_to_rounding(t_unsketched, t)


def test_sketch_keeps_moments_on_average():
    a = gaussian(50, 4)
    grams = []
    for seed in range(400):
        sketch = CountSketch(4, 10, seed)
        for part in a.split(20):
            sketch.update(part)
        grams.append(sketch.rows.T @ sketch.rows)
    assert relative(torch.stack(grams).mean(0) - a.T @ a, a.T @ a) < 0.05
    assert relative(grams[0] - a.T @ a, a.T @ a) > 0.05


@pytest.mark.parametrize("correlated", [False, True])
def test_block_order_is_greedy_on_what_is_unexplained(correlated):
    a = gaussian(300, 32)
    if correlated:
        a = a @ gaussian(32, 32, 1) + 0.1 * gaussian(300, 32, 2)
    order, residual = pivoted_units(a.T @ a, 4)
    kept = []
    for rank in range(8):
        energy = unexplained(a, [c for b in kept for c in range(4 * b, 4 * b + 4)]).square().reshape(300, 8, 4)
        energy = energy.sum((0, 2))
        assert torch.allclose(residual[rank], energy.sum(), rtol=1e-8)
        assert order[rank] == int(energy.argmax())
        kept.append(order[rank])
    assert float(residual[8]) <= 1e-9 * float(residual[0])


def test_blocks_that_are_images_of_others_come_last():
    a = gaussian(500, 8 * 6).reshape(500, 8, 6)
    for image, sources in ((2, (0,)), (5, (1, 3)), (6, (7,))):
        a[:, image] = 0.2 * sum(a[:, s] @ gaussian(6, 6, 10 + image + s) for s in sources)
    a = a.reshape(500, 48)
    order, residual = pivoted_units(a.T @ a, 6)
    assert float(residual[5] / residual[0]) < 1e-14
    columns = torch.tensor([c for block in order[:5] for c in range(6 * block, 6 * block + 6)])
    weight = gaussian(10, 48, 99)
    output = a @ weight.T
    assert relative(a[:, columns] @ (interpolation_matrix(a.T @ a, columns) @ weight.T) - output, output) < 1e-10
    # Kept blocks in any order give the same layer.
    shuffled = columns.reshape(5, 6).flip(0).flatten()
    again = a[:, shuffled] @ (interpolation_matrix(a.T @ a, shuffled) @ weight.T)
    assert relative(again - output, output) < 1e-9
    moved = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    b = a.reshape(500, 8, 6)[:, moved].reshape(500, 48)
    order_moved, residual_moved = pivoted_units(b.T @ b, 6)
    assert moved[order_moved[:5]].tolist() == order[:5]
    assert torch.allclose(residual_moved / residual_moved[0], residual / residual[0], atol=1e-14)


def test_profile_along_a_given_order():
    a = gaussian(200, 12)
    groups = [torch.tensor([7, 2]), torch.tensor([0]), torch.tensor([1, 3, 4, 5, 6]), torch.tensor([8, 9, 10, 11])]
    profile = residual_along(a.T @ a, groups)
    for number in range(len(groups) + 1):
        kept = [int(c) for group in groups[:number] for c in group]
        expected = unexplained(a, kept).square().sum()
        assert abs(float(profile[number] - expected)) < 1e-7 * float(a.square().sum())


def test_refuses_impossible_input():
    with pytest.raises(ValueError, match=r"square matrix, got shape \(2, 3\)"):
        pivoted_cholesky(torch.zeros(2, 3, dtype=torch.float64))
    for broken in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="gram must be finite"):
            pivoted_cholesky(torch.full((2, 2), broken, dtype=torch.float64))
        with pytest.raises(ValueError, match="gram must be finite"):
            pivoted_units(torch.full((2, 2), broken, dtype=torch.float64), 1)
    for k in (0, 7):
        with pytest.raises(ValueError, match=rf"k must be in 1..6, got {k}"):
            interpolative_decomposition(gaussian(20, 6), k)


@pytest.mark.slow
def test_wide_layer():
    # GELU features with the condition of a real feed-forward layer.
    a = torch.nn.functional.gelu(gaussian(4096, 384) @ gaussian(384, 768, 1) / 384**0.5)
    _, by_qr = pivoted_qr(a)
    keep, t, _ = interpolative_decomposition(a, 384)
    assert keep.tolist() == by_qr[:384].tolist()
    assert relative(t - coefficients_by_qr(a, 384), t) < 1e-9
