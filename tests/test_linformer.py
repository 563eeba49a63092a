"""Linear attention against loops over examples, tokens and heads, in double precision."""

import copy
import itertools
import math

import peft
import pytest
import torch
from torch.func import functional_call
from transformers.masking_utils import create_bidirectional_mask

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from tests.linear_attention import NEAR, SHARES, WIDTH, dense, fill, gap, project, right, run, slow, states_of


@pytest.fixture
def converted(model):
    """`converted(k, **config)`: a tiny model in double precision, and the attention module of its first layer."""

    def make(slots, architecture="bert", head="base", **config):
        linear = hc.compress(model(architecture, head), hc.LinformerConfig(projected_length=slots, **config))
        linear = linear.double().eval()
        return linear, layers_of(linear)[0].attention

    return make


MASKS = {
    "none": None,
    "right": right([12, 5, 9], 12),
    "left": right([12, 5, 9], 12).flip(1),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0] * 2, [0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 12]).bool(),
    "empty rows": right([12, 0, 1], 12),
}


@pytest.mark.parametrize("slots", [4, 20])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("share", SHARES)
def test_equals_the_loop(converted, share, mask, slots):
    for slot_mask, length_scaling in itertools.product((False, True), repeat=2):
        options = {"slot_mask": slot_mask, "length_scaling": length_scaling}
        _, attention = converted(slots, share=share, **options)
        states, live = states_of(3, 12), MASKS[mask]
        seen = run(attention, states, live)
        expected = slow(attention, states, torch.ones(3, 12).bool() if live is None else live, **options)
        assert torch.isfinite(seen).all()
        torch.testing.assert_close(seen, expected, **NEAR)
        assert float(expected.square().mean()) > 1e-3
        torch.testing.assert_close(run(attention, states, live, output_attentions=True), expected, **NEAR)


def test_a_scaled_permutation_is_dense_attention(converted):
    length = 12
    _, attention = converted(length)
    projection, states = attention.attention_core.projection, states_of(2, length)
    expected = dense(attention, states, torch.ones(2, length).bool())
    for order in (torch.arange(length), torch.randperm(length, generator=torch.Generator().manual_seed(1))):
        fill(projection, math.sqrt(length) * torch.eye(length, dtype=torch.float64)[order])
        torch.testing.assert_close(run(attention, states), expected, **NEAR)
    # A rotation is orthogonal too, but softmax does not commute with it.
    rotation = torch.linalg.qr(torch.randn(length, length, generator=torch.Generator().manual_seed(0)).double())[0]
    fill(projection, math.sqrt(length) * rotation)
    assert gap(run(attention, states), expected) > 0.1


def test_unused_slots_count_unless_masked(converted):
    length, slots = 10, 14
    for slot_mask in (False, True):
        _, attention = converted(slots, slot_mask=slot_mask)
        fill(attention.attention_core.projection, math.sqrt(length) * torch.eye(length, dtype=torch.float64))
        states = states_of(2, length)
        error = gap(run(attention, states), dense(attention, states, torch.ones(2, length).bool()))
        assert error < 1e-12 if slot_mask else error > 1e-2
        # One identity serves one length only: a shorter row is off by the ratio of the roots.
        live = right([length, 6], length)
        assert gap(run(attention, states, live)[1], dense(attention, states, live)[1]) > 1e-2


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_pooling_with_enough_slots_is_the_dense_model(model, batches, architecture):
    reference = model(architecture, "sequence_classification").double()
    options = {"slot_mask": True, "length_scaling": False, "initialization": "pooling", "max_tokens": 30}
    linear = hc.compress(copy.deepcopy(reference), hc.LinformerConfig(projected_length=30, **options))
    batch = batches(reference.config, count=1)[0]
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    with torch.no_grad():
        expected, seen = (x(**batch, output_hidden_states=True) for x in (reference, linear))
    torch.testing.assert_close(seen.logits, expected.logits, **NEAR)
    live = batch["attention_mask"].bool()
    for a, b in zip(seen.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[live], b[live], **NEAR)


def test_pooling_averages_neighbours(converted):
    for scaling in (False, True):
        _, attention = converted(8, initialization="pooling", length_scaling=scaling, slot_mask=True)
        stride, projection = 9, attention.attention_core.projection  # 66 positions for 8 slots.
        assert attention.attention_core.slot_stride == stride
        keys, values = projection.keys.tolist(), projection.values.tolist()
        for t, j in itertools.product(range(66), range(8)):
            expected = (math.sqrt(66) if scaling else 1) / stride if t // stride == j else 0.0
            assert keys[t][j] == values[t][j] == pytest.approx(expected)
        # 20 tokens reach three slots of nine tokens; the other slots take no part.
        weights = attention(states_of(1, 20), attention_mask=None, output_attentions=True)[1]
        assert bool((weights[..., :3] > 0).all())
        assert not weights[..., 3:].any()


def test_padding_and_batch_mates_change_nothing(converted):
    _, attention = converted(5)
    states, lengths = states_of(3, 9), [9, 4, 7]
    together = run(attention, states, right(lengths, 9))
    noise, none = 50 * states_of(3, 6, seed=1), torch.zeros(3, 6).bool()
    longer = run(attention, torch.cat([states, noise], 1), right(lengths, 15))
    shifted = run(attention, torch.cat([noise, states], 1), torch.cat([none, right(lengths, 9)], 1))
    for row, length in enumerate(lengths):
        alone = run(attention, states[row : row + 1, :length])
        for seen in (together[row], longer[row], shifted[row, 6:]):
            torch.testing.assert_close(seen[:length], alone[0], **NEAR)


def test_order_of_slots_one_slot_and_no_query(converted):
    _, attention = converted(6)
    projection, states = attention.attention_core.projection, states_of(2, 9)
    before, order = run(attention, states), torch.tensor([3, 1, 5, 0, 2, 4])
    projection.keys.data = projection.keys.data[:, order]
    assert gap(run(attention, states), before) > 1e-2
    projection.values.data = projection.values.data[:, order]
    torch.testing.assert_close(run(attention, states), before, **NEAR)
    # Without queries every slot weighs the same.
    attention.query.weight.data.zero_()
    attention.query.bias.data.zero_()
    value, live = project(attention.value, states), right([9, 4], 9)
    expected = torch.stack([
        sum(projection.values[t, j] * value[b, t] for t in range(count) for j in range(6)) / (6 * math.sqrt(count))
        for b, count in enumerate((9, 4))
    ])  # fmt: skip
    torch.testing.assert_close(run(attention, states, live), expected[:, None].expand(2, 9, WIDTH), **NEAR)


def test_one_slot_ignores_queries_and_keys(converted):
    _, attention = converted(1)
    projection, states = attention.attention_core.projection, states_of(1, 9)
    value = project(attention.value, states)
    expected = sum(projection.values[t, 0] * value[0, t] for t in range(9)) / 3
    torch.testing.assert_close(run(attention, states)[0], expected.expand(9, WIDTH), **NEAR)
    for parameter in (projection.keys, attention.query.weight, attention.key.weight):
        parameter.data.mul_(-3)
    torch.testing.assert_close(run(attention, states)[0], expected.expand(9, WIDTH), **NEAR)


@pytest.mark.parametrize("share", SHARES)
def test_deferred_projection_is_exact_and_chosen_by_cost(converted, share, monkeypatch):
    passes, chosen = 2 if share == "none" else 1, set()
    for slots, length in ((4, 12), (12, 12), (16, 14), (20, 12)):
        _, attention = converted(slots, share=share)
        core, states = attention.attention_core, states_of(3, length)
        plain = 2 * length * WIDTH**2 + 4 * length * slots * WIDTH
        deferred = 2 * slots * WIDTH**2 + passes * length * slots * WIDTH + 2 * length * slots * WIDTH
        assert core.defers(length, WIDTH, WIDTH) == (deferred < plain)
        assert attention.key.is_deferred(length) == (deferred < plain)
        # `key` hands its input through exactly when it is deferred.
        assert (attention.key(states) is states) == (deferred < plain)
        chosen.add(deferred < plain)
        for live in (None, right([length, 3, 7], length), right([length, 3, 7], length).flip(1)):
            results = []
            for defers in (False, True):
                monkeypatch.setattr(core, "defers", lambda *sizes, defers=defers: defers)
                results.append(run(attention, states, live))
            torch.testing.assert_close(*results, **NEAR)
            monkeypatch.undo()
    assert chosen == {False, True}


@pytest.mark.parametrize("slots", [4, 20])
def test_gradients_are_finite_differences(converted, slots):
    _, attention = converted(slots)
    states, live, target = states_of(2, 12), right([10, 7], 12), states_of(2, 12, seed=1)
    names = ["query.weight", "key.weight", "value.weight", "key.bias", "value.bias"]
    names += ["attention_core.projection.keys", "attention_core.projection.values"]
    start = {name: attention.get_parameter(name).detach().clone() for name in names}
    mask = create_bidirectional_mask(attention.config, states, live.long())

    def value(changed):
        return float((functional_call(attention, changed, (states, mask))[0] * target).sum().detach())

    (run(attention, states, live) * target).sum().backward()
    generator = torch.Generator().manual_seed(2)
    for name in names:
        gradient = attention.get_parameter(name).grad
        for _ in range(4):
            direction = torch.randn(start[name].shape, generator=generator, dtype=torch.float64)
            ends = [value({**start, name: start[name] + sign * 1e-5 * direction}) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / 2e-5
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-6), name
        assert float(gradient.abs().max()) > 1e-4
    for name in names[-2:]:
        gradient = attention.get_parameter(name).grad
        assert not gradient[10:].any()
        assert gradient[:10].abs().sum(1).min() > 0


def test_one_matrix_gets_the_sum_of_all_gradients(model, batches):
    tied = hc.compress(model("bert"), hc.LinformerConfig(projected_length=6, share="layer")).double()
    apart = hc.compress(model("bert"), hc.LinformerConfig(projected_length=6)).double()
    projections = [block.attention.attention_core.projection for block in layers_of(apart)]
    for projection in projections:
        fill(projection, tied.linformer_projection.keys.data)
    batch = batches(tied.config, count=1)[0]
    for linear in (tied, apart):
        (linear(**batch)[0] * states_of(8, 24)).sum().backward()
    parts = [matrix.grad for projection in projections for matrix in (projection.keys, projection.values)]
    assert len(parts) == 6
    torch.testing.assert_close(tied.linformer_projection.keys.grad, sum(parts), rtol=1e-12, atol=1e-12)


# peft asks transformers for an attribute that is about to be renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("names", [["key"], ["value"], ["key", "value"], ["query"]])
@pytest.mark.parametrize("share", SHARES)
def test_wrapped_projections_give_the_right_numbers(converted, share, names):
    linear, _ = converted(4, share=share)
    adapted = peft.get_peft_model(linear, peft.LoraConfig(r=2, target_modules=names)).double().eval()
    attention = adapted.get_base_model().encoder.layer[0].attention.self
    states, live = states_of(2, 12), right([12, 5], 12)
    merged = copy.deepcopy(attention)
    for name in names:
        wrapped = getattr(attention, name)
        up, down = wrapped.lora_B["default"].weight, wrapped.lora_A["default"].weight
        up.data.normal_(generator=torch.Generator().manual_seed(0))
        plain = torch.nn.Linear(WIDTH, WIDTH).double()
        plain.weight.data = wrapped.base_layer.weight.data + wrapped.scaling["default"] * up.data @ down.data
        plain.bias.data = wrapped.base_layer.bias.data
        setattr(merged, name, plain)
    torch.testing.assert_close(run(attention, states, live), slow(merged, states, live), **NEAR)
