"""Distances between teacher and student against formulas written out, at the edges of the number range."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, kl_divergence

from hf_compress.training.losses import (
    hidden_distance,
    layer_distance,
    multilabel_divergence,
    output_divergence,
    position_divergence,
    regression_distance,
)


TEMPERATURES = (0.05, 1.0, 20.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def explicit_kl(teacher, student, temperature):
    """[...] KL of each row from probabilities, in double precision."""
    p, q = (torch.softmax(t.double() / temperature, -1) for t in (teacher, student))
    return (p * (p.log() - q.log())).sum(-1)


def with_gradient(loss, teacher, student, *args):
    student = student.detach().requires_grad_()
    value = loss(teacher, student, *args)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_output_divergence_is_the_sum_over_probabilities(temperature):
    teacher, student = normal(6, 5), normal(6, 5, seed=1)
    expected = temperature**2 * explicit_kl(teacher, student, temperature).mean()
    torch.testing.assert_close(
        output_divergence(teacher, student, temperature).double(), expected, rtol=1e-5, atol=1e-7
    )


def test_the_divergence_is_from_the_teachers_side():
    teacher, student = normal(4, 3), normal(4, 3, seed=1)
    there, back = output_divergence(teacher, student, 1.0), output_divergence(student, teacher, 1.0)
    assert abs(float(there) - float(explicit_kl(teacher, student, 1.0).mean())) < 1e-6
    assert abs(float(there - back)) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("loss", [output_divergence, position_divergence, multilabel_divergence])
def test_values_and_gradients_are_finite(loss, scale, temperature, dtype):
    # Up to 1e4, the two as far apart as they can be.
    teacher = torch.tensor([[scale, -scale, 0.0], [scale, scale, -scale]], dtype=dtype)
    value, gradient = with_gradient(loss, teacher, -teacher, temperature)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    # Logarithms that are nearly equal cancel: what rounding leaves of a KL near 0 may have either sign.
    assert value >= -(temperature**2) * 1e-7
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("loss", [output_divergence, position_divergence, multilabel_divergence])
def test_equal_logits_are_no_distance_and_give_no_gradient(loss, scale, temperature, dtype):
    logits = normal(4, 5, scale=scale).clamp(-scale, scale).to(dtype)
    value, gradient = with_gradient(loss, logits, logits, temperature)
    assert float(value) == 0
    # d KL / d student = T (q - p) / B. Rounding of the softmax is all that may be left of q - p.
    assert float(gradient.abs().max()) <= temperature * 1e-6


def test_temperature_squared_keeps_the_gradients_scale():
    teacher, student = normal(8, 4, scale=0.1), normal(8, 4, seed=1, scale=0.1)
    # For high T: T^2 KL -> (variance over classes of the difference of logits) / 2, its gradient free of T.
    warm, hot = (with_gradient(output_divergence, teacher, student, t)[1] for t in (20.0, 200.0))
    torch.testing.assert_close(warm, hot, rtol=0.02, atol=1e-5)
    difference = student - teacher
    expected = (difference - difference.mean(-1, keepdim=True)) / (4 * 8)
    torch.testing.assert_close(hot, expected, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("temperature", [4.0, 9.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_divergences_are_right_at_every_temperature(temperature, classes):
    """Against the power series in the difference of logits, in double precision."""
    teacher, student = 5 + normal(8, classes, scale=3.0), normal(8, classes, seed=1, scale=3.0)
    p = torch.softmax(teacher.double() / temperature, -1)
    x = (student.double() - teacher.double()) / temperature
    x = x - (p * x).sum(-1, keepdim=True)
    moments = [(p * x**n).sum(-1) / float(math.factorial(n)) for n in range(2, 60)]
    expected = temperature**2 * torch.stack(moments).sum(0).log1p().mean()
    found = output_divergence(teacher, student, temperature)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    exact = output_divergence(teacher.double(), student.double(), temperature)
    assert float(exact) == pytest.approx(float(expected), rel=1e-11)
    padded = (torch.cat([t, normal(8, 3, seed=2)], -1) for t in (teacher, student))
    mask = (torch.arange(classes + 3) < classes).expand(8, -1)
    assert float(position_divergence(*padded, temperature, mask)) == pytest.approx(float(expected), rel=1e-5)
    if classes == 2:
        decision, guess = (t[:, :1] - t[:, 1:] for t in (teacher, student))
        assert float(multilabel_divergence(decision, guess, temperature)) == pytest.approx(float(expected), rel=1e-5)


def test_gradient_is_the_difference_of_probabilities():
    teacher, student, temperature = normal(5, 4), normal(5, 4, seed=1), 3.0
    _, gradient = with_gradient(output_divergence, teacher, student, temperature)
    expected = temperature * (torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1)) / 5
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


def hidden_case():
    return normal(3, 4, 6), normal(3, 4, 6, seed=1), MASK


def position_case():
    return normal(3, 4), normal(3, 4, seed=1), MASK


CASES = {
    "output": (lambda t, s, m: output_divergence(t, s, 2.0, m), hidden_case),
    "position": (lambda t, s, m: position_divergence(t, s, 2.0, m), position_case),
    "hidden": (lambda t, s, m: hidden_distance(t, s, m), hidden_case),
    "normalized": (lambda t, s, m: hidden_distance(t, s, m, normalize=True), hidden_case),
    "layers": (lambda t, s, m: layer_distance([t, s], [s, t], [m, m]), hidden_case),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_masked_counts_for_nothing(case):
    loss, make = CASES[case]
    teacher, student, mask = make()
    expected, gradient = with_gradient(loss, teacher, student, mask)
    padding = mask == 0
    assert float(gradient[padding].abs().max()) == 0
    noisy = [t.clone() for t in (teacher, student)]
    noisy[0][padding], noisy[1][padding] = 1e4, -3e3
    value, noisy_gradient = with_gradient(loss, *noisy, mask)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(noisy_gradient, gradient)


@pytest.mark.parametrize("case", CASES)
def test_more_padding_changes_nothing(case):
    loss, make = CASES[case]
    teacher, student, mask = make()
    expected, _ = with_gradient(loss, teacher, student, mask)
    longer = [torch.cat([t, 7 * torch.ones_like(t)], 1) for t in (teacher, student)]
    value, _ = with_gradient(loss, *longer, torch.cat([mask, torch.zeros_like(mask)], 1))
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_mask_of_ones_is_no_mask(case):
    loss, make = CASES[case]
    teacher, student, mask = make()
    torch.testing.assert_close(loss(teacher, student, torch.ones_like(mask)), loss(teacher, student, None))
    torch.testing.assert_close(loss(teacher, student, mask.bool()), loss(teacher, student, mask))


@pytest.mark.parametrize("case", CASES)
def test_eight_batches_of_one_are_one_batch_of_eight(case):
    loss, _ = CASES[case]
    shape = (8, 5) if case == "position" else (8, 5, 6)
    teacher, student = normal(*shape), normal(*shape, seed=1)
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5, 1, 2])[:, None]).long()
    value, gradient = with_gradient(loss, teacher, student, mask)
    parts = [with_gradient(loss, teacher[i : i + 1], student[i : i + 1], mask[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(torch.stack([part for part, _ in parts]).mean(), value)
    torch.testing.assert_close(torch.cat([part for _, part in parts]) / 8, gradient)


def test_eight_unmasked_batches_of_one_are_one_batch_of_eight():
    teacher, student = normal(8, 5), normal(8, 5, seed=1)
    for loss in (output_divergence, multilabel_divergence):
        value, gradient = with_gradient(loss, teacher, student, 2.0)
        parts = [with_gradient(loss, teacher[i : i + 1], student[i : i + 1], 2.0) for i in range(8)]
        torch.testing.assert_close(torch.stack([part for part, _ in parts]).mean(), value)
        torch.testing.assert_close(torch.cat([part for _, part in parts]) / 8, gradient)


def test_a_row_without_live_tokens_counts_as_no_distance():
    teacher, student = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    value, gradient = with_gradient(lambda t, s: hidden_distance(t, s, mask), teacher, student)
    torch.testing.assert_close(value, (student[1] - teacher[1]).square().mean() / 2)
    assert float(gradient[0].abs().max()) == 0
    assert torch.isfinite(output_divergence(teacher, student, 1.0, mask))


def test_token_divergence_is_a_mean_of_means():
    teacher, student, mask = hidden_case()
    each = 4.0 * explicit_kl(teacher, student, 2.0)
    expected = torch.stack([each[i, : int(mask[i].sum())].mean() for i in range(3)]).mean()
    torch.testing.assert_close(output_divergence(teacher, student, 2.0, mask).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_position_divergence_is_over_the_live_positions(temperature, dtype):
    teacher, student, mask = position_case()
    teacher, student = teacher.to(dtype), student.to(dtype)
    value, gradient = with_gradient(position_divergence, teacher, student, temperature, mask)
    live = [int(row.sum()) for row in mask]
    each = [explicit_kl(teacher[i, :n], student[i, :n], temperature) for i, n in enumerate(live)]
    expected = temperature**2 * torch.stack(each).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(gradient).all()


def test_one_live_position_leaves_nothing_to_choose():
    value, gradient = with_gradient(
        position_divergence, normal(1, 3), normal(1, 3, seed=1), 1.0, torch.tensor([[1, 0, 0]])
    )
    assert float(value) == 0
    assert float(gradient.abs().max()) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_multilabel_divergence_is_that_of_bernoullis(temperature):
    teacher, student = normal(6, 5), normal(6, 5, seed=1)
    p, q = (Bernoulli(logits=t.double() / temperature) for t in (teacher, student))
    expected = temperature**2 * kl_divergence(p, q).sum(-1).mean()
    torch.testing.assert_close(
        multilabel_divergence(teacher, student, temperature).double(), expected, rtol=1e-5, atol=1e-7
    )


def test_regression_distance_is_the_mean_square():
    teacher, student = normal(6, 1), normal(6, 1, seed=1).to(torch.bfloat16)
    expected = sum((float(s) - float(t)) ** 2 for t, s in zip(teacher, student, strict=True)) / 6
    assert float(regression_distance(teacher, student)) == pytest.approx(expected, rel=1e-5)
    assert regression_distance(teacher, student).dtype == torch.float32


def looped_distance(teacher, student, mask):
    rows = []
    for t_row, s_row, m_row in zip(teacher.double(), student.double(), mask, strict=True):
        tokens = [((s - t) ** 2).sum() / len(s) for t, s, m in zip(t_row, s_row, m_row, strict=True) if m]
        rows.append(sum(tokens) / len(tokens))
    return sum(rows) / len(rows)


def test_hidden_distance_is_a_loop_over_live_tokens():
    teacher, student, mask = hidden_case()
    found = hidden_distance(teacher, student, mask).double()
    torch.testing.assert_close(found, looped_distance(teacher, student, mask), rtol=1e-5, atol=1e-7)
    everything = hidden_distance(teacher, student).double()
    torch.testing.assert_close(everything, (student - teacher).double().square().mean(), rtol=1e-5, atol=1e-7)


def test_normalizing_compares_directions_within_tokens():
    teacher, student, mask = hidden_case()
    found = hidden_distance(teacher, student, mask, normalize=True).double()
    # A LayerNorm without parameters: mean 0 and (biased) variance 1 over D, with eps 1e-5.
    plain = [
        (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for t in (teacher.double(), student.double())
    ]
    torch.testing.assert_close(found, looped_distance(*plain, mask), rtol=1e-5, atol=1e-7)
    # Scale and shift of a state make no difference any more.
    assert float(hidden_distance(teacher, 5 * teacher + 3, mask, normalize=True)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_distances_of_half_precision_states_do_not_overflow(dtype):
    # The square of 1000 is beyond float16.
    teacher = torch.full((1, 2, 4), 1000.0, dtype=dtype)
    value, gradient = with_gradient(hidden_distance, teacher, -teacher)
    assert float(value) == pytest.approx(4e6, rel=1e-2)
    assert torch.isfinite(gradient).all()


def test_layers_are_averaged_or_summed():
    pairs = [(normal(2, 3, 4, seed=i), normal(2, 3, 4, seed=9 + i)) for i in range(3)]
    teachers, students = zip(*pairs, strict=True)
    each = torch.stack([hidden_distance(t, s) for t, s in pairs])
    torch.testing.assert_close(layer_distance(list(teachers), list(students)), each.mean())
    torch.testing.assert_close(layer_distance(list(teachers), list(students), reduction="sum"), each.sum())
    with pytest.raises(ValueError, match="shorter|longer"):
        layer_distance(list(teachers), list(students[:2]))


@pytest.mark.parametrize("case", [*CASES, "plain", "multilabel", "regression"])
def test_gradients_are_those_of_finite_differences(case):
    losses = {
        "plain": lambda t, s, m: output_divergence(t, s, 2.0),
        "multilabel": lambda t, s, m: multilabel_divergence(t, s, 2.0),
        "regression": lambda t, s, m: regression_distance(t, s),
    }
    if case in CASES:
        loss, make = CASES[case]
        teacher, student, mask = make()
    else:
        loss, teacher, student, mask = losses[case], normal(3, 4), normal(3, 4, seed=1), None
    _, gradient = with_gradient(loss, teacher, student, mask)
    # The losses work in single precision: one direction, a central difference, a step that its rounding allows.
    direction = normal(*student.shape, seed=5)
    step = 1e-2
    ahead, behind = (loss(teacher, student + sign * step * direction, mask).double() for sign in (1, -1))
    numeric = float(ahead - behind) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=5e-3, abs=2e-4)


def test_no_gradient_reaches_the_teacher_through_a_detached_copy():
    teacher = normal(2, 3).requires_grad_()
    student = normal(2, 3, seed=1).requires_grad_()
    output_divergence(teacher.detach(), student, 1.0).backward()
    assert teacher.grad is None
    assert float(student.grad.abs().sum()) > 0


def test_divergence_of_certain_teachers_is_cross_entropy():
    labels = torch.tensor([0, 2, 1])
    teacher, student = 1e4 * F.one_hot(labels, 3).float(), normal(3, 3)
    torch.testing.assert_close(output_divergence(teacher, student, 1.0), F.cross_entropy(student, labels))
