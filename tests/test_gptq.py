"""The laws of rounding by inputs, and of packing, on matrices."""

import pytest
import torch

from hf_compress.methods.weight_quantization.packing import pack, packed_width, unpack
from hf_compress.methods.weight_quantization.rounding import (
    RoundingOptions,
    prepare_inputs,
    round_by_inputs,
    round_to_nearest,
)


def value_of(rounded):
    return rounded.grid.scale[:, rounded.groups] * (rounded.codes - rounded.grid.zero[:, rounded.groups])


def gptq(weight, hessian, options, **more):
    return round_by_inputs(weight, prepare_inputs(hessian, options), options, **more)


def problem(rows, columns, tokens=None, seed=0):
    """A weight, and correlated inputs of columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens or 3 * columns, columns, generator=generator)
    inputs = inputs @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), inputs * torch.rand(columns, generator=generator).exp()


def by_hand(weight, hessian, bits, group_size, percdamp=0.01, block=128):
    """The published loop, column by column, with grids fitted as its text says."""
    work, top, count = weight.clone(), 2**bits - 1, weight.shape[1]
    factor = hessian + percdamp * hessian.diagonal().mean() * torch.eye(count)
    factor = torch.linalg.cholesky(torch.linalg.inv(factor.double()), upper=True).float()
    before, codes = work.clone(), torch.zeros_like(work)
    for j in range(count):
        if j % block == 0:
            before = work.clone()
        if j == 0 if group_size == -1 else j % group_size == 0:
            part = before[:, j : count if group_size == -1 else j + group_size]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low) / top
            zero = torch.round(-low / scale)
        codes[:, j] = (torch.round(work[:, j] / scale) + zero).clamp(0, top)
        error = (work[:, j] - scale * (codes[:, j] - zero)) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes.to(torch.uint8)


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (3, 64), (2, 48), (8, 100)])
def test_the_published_loop(bits, group_size):
    weight, inputs = problem(24, 300)
    hessian = inputs.T @ inputs
    found = gptq(weight, hessian, RoundingOptions(bits, group_size)).codes
    different = int((found != by_hand(weight, hessian, bits, group_size)).sum())
    # One in ten thousand may lie so near to the middle between two codes that rounding decides.
    assert different <= weight.numel() // 10000
    assert different < int((found != round_to_nearest(weight, RoundingOptions(bits, group_size)).codes).sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group_size", "static"), [(-1, False), (16, False), (16, True), (50, False)])
def test_the_loss_is_the_error_of_the_products(group_size, static, symmetric, act_order):
    weight, inputs = problem(20, 160)
    hessian = inputs.T @ inputs
    options = RoundingOptions(3, group_size, symmetric, act_order, static)
    found = gptq(weight, hessian, options)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    error = (weight - value_of(found)).double()
    assert float(found.loss) == pytest.approx(float((error @ damped * error).sum()) / 2, rel=1e-4)
    nearest = (weight - value_of(round_to_nearest(weight, RoundingOptions(3, group_size, symmetric)))).double()
    assert float(found.loss) < float((nearest @ damped * nearest).sum()) / 2


@pytest.mark.parametrize("options", [
    RoundingOptions(2), RoundingOptions(4, symmetric=True), RoundingOptions(8), RoundingOptions(3, 16),
    RoundingOptions(4, 24, act_order=True, static_groups=True),
])  # fmt: skip
def test_unrelated_inputs_of_one_size_give_the_nearest_values(options):
    weight, _ = problem(16, 80)
    found = gptq(weight, 4 * torch.eye(80), options)
    assert torch.equal(value_of(found), value_of(round_to_nearest(weight, options)))


def test_inputs_that_are_always_zero():
    weight, inputs = problem(12, 40)
    inputs[:, [3, 17]] = 0
    found = gptq(weight, inputs.T @ inputs, RoundingOptions(4, 8))
    value = value_of(found)
    assert not value[:, [3, 17]].any()
    rest = [i for i in range(40) if i not in (3, 17)]
    assert (value[:, rest] - weight[:, rest]).abs().mean() < 0.2
    assert torch.isfinite(value).all()


def test_the_order_of_columns_goes_with_the_inputs():
    weight, inputs = problem(12, 40)
    hessian, order = inputs.T @ inputs, torch.randperm(40, generator=torch.Generator().manual_seed(1))
    options = RoundingOptions(3, act_order=True)
    found, moved = gptq(weight, hessian, options), gptq(weight[:, order], hessian[order][:, order], options)
    assert torch.equal(found.codes[:, order], moved.codes)
    left = gptq(weight, hessian, RoundingOptions(3)).codes
    assert not torch.equal(found.codes, left)
    # Columns that are in this order already are treated from left to right.
    descending = hessian.diagonal().argsort(descending=True)
    plain = gptq(weight[:, descending], hessian[descending][:, descending], RoundingOptions(3))
    assert torch.equal(plain.codes, found.codes[:, descending])


def test_zeros_are_held():
    weight, inputs = problem(24, 64)
    zero = torch.rand(24, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    weight[zero] = 0
    hessian = inputs.T @ inputs
    held, free = (gptq(weight, hessian, RoundingOptions(4, 16), hold_zeros=hold) for hold in (True, False))
    assert not value_of(held)[zero].any()
    assert value_of(free)[zero].any()
    nearest = round_to_nearest(weight, RoundingOptions(4, 16))
    assert not value_of(nearest)[zero].any()
    errors = [((weight - value_of(found)) @ inputs.T).norm() for found in (held, nearest)]
    assert errors[0] < errors[1]


def test_what_is_not_positive_definite():
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(ValueError, match=r"percdamp must be larger for these inputs, got 0.01: .* Raise it"):
        prepare_inputs(hessian, RoundingOptions(4))
    assert prepare_inputs(hessian, RoundingOptions(4, percdamp=10.0)).factor.isfinite().all()


def test_scales_are_rounded_to_their_dtype_before_weights_are():
    weight, inputs = problem(12, 40)
    for dtype in (torch.bfloat16, torch.float16):
        options = RoundingOptions(4, 8, stored_in=dtype)
        for found in (gptq(weight * 1e-3, inputs.T @ inputs, options), round_to_nearest(weight * 1e-3, options)):
            assert torch.equal(found.grid.scale, found.grid.scale.to(dtype).float())
            assert (value_of(found) - weight * 1e-3).abs().max() < 1e-3
    tiny = round_to_nearest(torch.full((1, 4), 1e-12), RoundingOptions(4, stored_in=torch.float16))
    assert torch.isfinite(value_of(tiny)).all()


def test_without_a_difference_the_correction_changes_nothing():
    weight, inputs = problem(16, 150)
    hessian = inputs.T @ inputs
    for options in (RoundingOptions(3), RoundingOptions(3, 16, act_order=True)):
        found = round_by_inputs(weight, prepare_inputs(hessian, options, torch.zeros_like(hessian)), options)
        assert torch.equal(found.codes, gptq(weight, hessian, options).codes)


@pytest.mark.parametrize("options", [RoundingOptions(3), RoundingOptions(4, 32, act_order=True)])
def test_the_correction_comes_nearer_to_the_dense_products(options):
    weight, dense = problem(32, 150, tokens=900)
    inputs = dense + 0.3 * dense @ torch.randn(150, 150, generator=torch.Generator().manual_seed(5)) / 12
    hessian, difference = inputs.T @ inputs, (dense - inputs).T @ inputs
    target = dense @ weight.T
    errors = []
    for share in (0.0, 0.25, 1.0):
        prepared = prepare_inputs(hessian, options, difference, share)
        errors.append(float((inputs @ value_of(round_by_inputs(weight, prepared, options)).T - target).norm()))
    assert errors[2] < 0.97 * errors[1] < 0.97 * errors[0]


def test_the_correction_is_the_formula_of_the_paper():
    """One weight after the other, with the inverse moments of those behind it."""
    weight, dense = problem(4, 12)
    inputs = dense + 0.2 * dense.roll(1, 1)
    options, difference = RoundingOptions(4), (dense - inputs).T @ inputs
    hessian = inputs.T @ inputs
    shift = prepare_inputs(hessian, options, difference, share=1.0).shift
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)).double()
    for q in range(11):
        expected = difference[q, q + 1 :].double() @ torch.linalg.inv(damped[q + 1 :, q + 1 :])
        torch.testing.assert_close(shift[q, q + 1 :].double(), expected, rtol=1e-3, atol=1e-4)
    assert not shift.tril().any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_every_width(bits):
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 2, 5, 7, 8, 9, 24, 31, 41):
        numbers = torch.randint(2**bits, (3, columns), generator=generator, dtype=torch.uint8)
        packed = pack(numbers, bits)
        assert packed.shape == (3, packed_width(columns, bits)) == (3, -(-columns * bits // 8))
        assert packed.dtype == torch.uint8
        for row, found in zip(numbers.tolist(), packed.tolist(), strict=True):
            whole = sum(number << (bits * place) for place, number in enumerate(row))
            assert bytes(found) == whole.to_bytes(len(found), "little")
        assert torch.equal(unpack(packed, bits, columns), numbers)
