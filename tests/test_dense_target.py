"""Pruning that aims at the dense model: elimination, fit and budget, against computations by hand."""

import copy
import itertools
import math
import types

import numpy as np
import pytest
import torch

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.driver import LayerWalk
from hf_compress.core.moments import PairedMoments
from hf_compress.core.projections import Projection, Role
from hf_compress.methods.structured_pruning.allocation import UNIT_KINDS
from hf_compress.methods.structured_pruning.correction import output_projection, output_projections
from hf_compress.methods.structured_pruning.dense_target import DenseSums, Normal, fitted
from hf_compress.methods.structured_pruning.divergence import (
    Answers,
    Distances,
    divergence_priorities,
    falls,
    some_examples,
)
from hf_compress.methods.structured_pruning.elimination import eliminated_last
from hf_compress.methods.structured_pruning.measuring import measure_and_rank
from tests.images_and_sounds import cast
from tests.rounding import assert_equal_to_rounding


def rows_of(number, width, generator, rank=None):
    mixing = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    return torch.randn(number, rank or width, generator=generator, dtype=torch.float64) @ mixing


@pytest.mark.parametrize("size", [1, 3])
def test_elimination_removes_what_raises_the_error_least(size):
    generator = torch.Generator().manual_seed(size)
    inputs = rows_of(60, 12, generator).numpy()
    targets = inputs @ rows_of(12, 5, generator).numpy() + torch.randn(60, 5, generator=generator).double().numpy()
    # The damping, as further rows: the oracle is plain least squares.
    damping = np.sqrt(1e-3 * np.square(inputs).sum(0).mean()) * np.eye(12)
    inputs_, targets_ = np.vstack([inputs, damping]), np.vstack([targets, np.zeros((12, 5))])
    left, removed = list(range(12 // size)), []
    while len(left) > 1:
        errors = {}
        for unit in left:
            columns = [other * size + place for other in left if other != unit for place in range(size)]
            weight = np.linalg.lstsq(inputs_[:, columns], targets_, rcond=None)[0]
            errors[unit] = np.square(inputs_[:, columns] @ weight - targets_).sum()
        removed.append(min(errors, key=errors.get))
        left.remove(removed[-1])
    gram, cross = (torch.from_numpy(inputs.T @ other) for other in (inputs, targets))
    assert eliminated_last(gram, cross, 1, size) == left + removed[::-1]
    assert eliminated_last(gram, cross, 2, size)[:2] == sorted([*left, removed[-1]])
    assert sorted(eliminated_last(gram, cross, 0, size)) == list(range(12 // size))


def test_many_columns_go_together_and_useless_ones_first():
    generator = torch.Generator().manual_seed(0)
    inputs = rows_of(400, 96, generator)
    weight = torch.randn(96, 8, generator=generator, dtype=torch.float64)
    weight[::3] = 0
    order = eliminated_last(inputs.T @ inputs, inputs.T @ (inputs @ weight), 64)
    assert order[:64] == [column for column in range(96) if column % 3]


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        eliminated_last(torch.full((2, 2), torch.nan), torch.zeros(2, 1), 1)


def moments_of(inputs, targets):
    """With a last column for the intercept, as `DenseSums` has it."""
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    moments = PairedMoments(targets.shape[1], inputs.shape[1])
    moments.update(targets, inputs)
    return moments


def both(fit, held):
    """Of sequences that are fitted and held back."""
    return types.SimpleNamespace(fit=fit, held=held)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_fit_is_the_ridge_regression_that_the_held_rows_choose(bias, noise):
    generator = torch.Generator().manual_seed(3)
    out = torch.nn.Linear(8, 4, bias=bias).double()
    inputs = rows_of(60, 8, generator) + 1
    columns = torch.tensor([0, 2, 3, 6])
    own = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    near = own + 0.1 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    targets = inputs[:, columns] @ near.T + 5 + noise * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    parts = [(inputs[:40], targets[:40]), (inputs[40:], targets[40:])]
    projection = alone(out)
    found = fitted(projection, columns, own, both(*(moments_of(*part) for part in parts)))

    def by_hand(pull, rows, wanted):
        kept = rows[:, columns].numpy()
        wanted = wanted.numpy()
        if bias:
            kept, wanted = kept - kept.mean(0), wanted - wanted.mean(0)
        if math.isinf(pull):
            return own.numpy()
        strength = np.sqrt(pull * np.square(kept).sum(0).mean())
        ridge = strength * np.eye(4)
        return np.linalg.lstsq(np.vstack([kept, ridge]), np.vstack([wanted, ridge @ own.numpy().T]), rcond=None)[0].T

    errors = {}
    for pull in (0.0, 0.01, 0.1, 1.0, 10.0, math.inf):
        left = parts[1][1].numpy() - parts[1][0][:, columns].numpy() @ by_hand(pull, *parts[0]).T
        errors[pull] = np.square(left - left.mean(0) if bias else left).sum()
    assert found.pull == min(errors, key=errors.get)
    weight = by_hand(found.pull, inputs, targets)
    np.testing.assert_allclose(found.weight.numpy(), weight, atol=1e-6)
    if bias:
        shift = (targets.numpy() - inputs[:, columns].numpy() @ weight.T).mean(0)
        np.testing.assert_allclose(found.bias.numpy(), shift, atol=1e-6)
    else:
        assert found.bias is None


def alone(module):
    """A projection that stands alone."""
    return Projection(Role.FFN_OUT, "out", module, 0, module.out_features)


def test_without_held_rows_the_own_output_stays_but_for_the_bias():
    generator = torch.Generator().manual_seed(0)
    out, inputs = torch.nn.Linear(4, 2).double(), rows_of(30, 4, generator)
    own = out.weight.detach()
    found = fitted(alone(out), torch.arange(4), own, both(moments_of(inputs, inputs @ own.T + 2), PairedMoments(2, 5)))
    assert math.isinf(found.pull)
    assert torch.equal(found.weight, own)
    torch.testing.assert_close(found.bias, torch.full((2,), 2.0, dtype=torch.float64))


def test_inputs_that_never_change_leave_the_own_output():
    out, inputs = torch.nn.Linear(3, 2).double(), torch.zeros(20, 3, dtype=torch.float64)
    own = out.weight.detach()
    parts = [moments_of(inputs, inputs @ own.T + 2) for _ in range(2)]
    assert torch.equal(fitted(alone(out), torch.arange(3), own, both(*parts)).weight, own)


def test_outputs_that_are_no_numbers_are_far_away():
    distances = Distances(2, torch.device("cpu"))
    dense = torch.log_softmax(torch.tensor([[1.0, 2.0, -torch.inf]]), -1)
    distances.add(0, dense, torch.full_like(dense, torch.nan), classifies=True)
    distances.add(1, dense, dense, classifies=True)
    distances.count([dense], classifies=True)
    assert distances.means()[0] > 1e30
    assert distances.means()[1] == 0


def walked(model, data):
    layers = layers_of(model)
    return LayerWalk(model, [layer.module for layer in layers], data, two_streams=True), layers


def test_an_untouched_layer_is_its_own_target(model, batches, architecture):
    dense = model(architecture).double()
    walk, layers = walked(dense, batches(dense.config))
    pre_norm = layers[0].architecture.normalises_first(dense.config)
    for index in walk:
        sums = DenseSums(walk, layers[index], pre_norm)
        for kind in UNIT_KINDS:
            out = output_projection(layers[index], kind)
            found = sums.moments(kind)
            everything = Normal([found.fit, found.held], out.bias is not None)
            weight = out.weight.detach()
            assert everything.error(torch.arange(out.in_features), weight) < 1e-9 * everything.energy
            if out.bias is not None:
                torch.testing.assert_close(everything.bias(torch.arange(out.in_features), weight), out.bias.detach())


def test_the_target_is_that_of_the_dense_layer(model, batches, architecture):
    """A bias that went wrong is found again: the target is what the dense model adds up to."""
    dense = model(architecture).double()
    data = batches(dense.config)
    walk, layers = walked(dense, data)
    pre_norm = layers[0].architecture.normalises_first(dense.config)
    index = next(iter(walk))
    sums = DenseSums(walk, layers[index], pre_norm)
    out = layers[index].attention_out
    if out.bias is None:
        pytest.skip("no bias to change")
    shift = torch.linspace(-1, 1, out.out_features).to(out.weight)
    out.bias.data += shift
    moments = sums.moments("heads")
    everything = Normal([moments.fit, moments.held], True)
    # The target of the attention has not moved: its own bias is wrong by the shift.
    assert_equal_to_rounding(
        everything.bias(torch.arange(out.in_features), out.weight.detach()), (out.bias - shift).detach()
    )


@pytest.mark.parametrize("width", [1, 4, 20])
def test_every_fifth_sequence_is_held_back_however_they_are_batched(model, batches, width):
    """In one batch of 20 sequences as well as in batches of one, against tokens that are counted by hand."""
    dense = model("bert")
    rows = batches(dense.config, count=20 // width, size=width)
    walk, layers = walked(dense, rows)
    assert next(iter(walk)) == 0
    sums = DenseSums(walk, layers[0], pre_norm=False)
    found = sums.moments("heads")
    wanted = sum(
        int(length)
        for number, batch in enumerate(rows)
        for place, length in enumerate(batch["attention_mask"].sum(1))
        if (number + place) % 5 == 4
    )
    assert found.held.own.num_rows == wanted > 0
    assert (
        found.fit.own.num_rows + wanted
        == found.inputs.num_rows
        == sum(int(batch["attention_mask"].sum()) for batch in rows)
    )


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_tokens_with_huge_hidden_states_count_like_others(model, batches, architecture):
    """Rows are divided by the root mean square of the dense model's sums, which are computed here by hooks."""
    dense = model(architecture)
    data = batches(dense.config, count=2)
    walk, layers = walked(dense, data)
    index = next(iter(walk))
    pre_norm = layers[0].architecture.normalises_first(dense.config)
    sums = DenseSums(walk, layers[index], pre_norm)
    seen = {"in": [], "out": [], "residual": []}
    hooks = [
        layers[0].attention_out.module.register_forward_pre_hook(lambda _, args: seen["in"].append(args[0])),
        layers[0].attention_out.module.register_forward_hook(lambda _, args, out: seen["out"].append(out)),
        layers[0].module.register_forward_pre_hook(
            lambda _, args, more: seen["residual"].append(args[0] if args else more["hidden_states"]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        for batch in data:
            dense(**batch)
    for hook in hooks:
        hook.remove()
    gram = plain = 0
    for batch, inputs, out, residual in zip(data, seen["in"], seen["out"], seen["residual"], strict=True):
        live = batch["attention_mask"].bool()
        scale = (residual + out)[live].double().square().mean(1, keepdim=True) ** -0.5
        rows = torch.cat([inputs[live].double(), torch.ones(int(live.sum()), 1)], 1) * scale
        gram = gram + rows.T @ rows
        plain = plain + inputs[live].double().T @ inputs[live].double()
    found = sums.moments("heads")
    for ours, wanted in ((found.fit.own.gram + found.held.own.gram, gram), (found.inputs.gram, plain)):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_too_few_sequences_are_refused(model, batches):
    dense = model("bert")
    config = hc.StructuredPruningConfig(mac_ratio=0.5, target="dense", order="sequential", ridge=1e-3)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    with pytest.raises(ValueError, match="Give at least 5"):
        hc.compress(dense, config, data=batches(dense.config, count=1, size=4))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("selection", ["interpolative", "magnitude", "random"])
def test_pruned_models_come_nearer_to_the_dense_one(model, batches, selection):
    """On the calibration rows, over several layers; each sublayer alone is tested above."""
    dense = model("llama", "causal_lm")
    data = batches(dense.config, count=20)
    errors = {}
    for target in ("self", "dense"):
        config = hc.StructuredPruningConfig(
            mac_ratio=0.5, selection=selection, target=target, order="sequential", allocation="uniform"
        )
        pruned = hc.compress(copy.deepcopy(dense), config, data=data)
        with torch.no_grad():
            apart = [(pruned(**batch).logits - dense(**batch).logits).square().sum() for batch in data]
        errors[target] = float(sum(apart))
    assert errors["dense"] < errors["self"]


def test_sublayers_may_go_altogether(model, batches, tmp_path):
    dense = model("bert", "sequence_classification")
    data = batches(dense.config)
    config = hc.StructuredPruningConfig(
        mac_ratio=0.08, target="dense", allocation="divergence", min_heads=0, min_neurons=0
    )
    pruned = hc.compress(copy.deepcopy(dense), config, data=data)
    step = hc.steps_of(pruned)[-1]
    assert "tolerance" not in step
    assert min(step["heads_per_layer"] + step["neurons_per_layer"]) == 0
    pruned.save_pretrained(tmp_path)
    reloaded = type(dense).from_pretrained(tmp_path).eval()
    for name, value in pruned.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value)
    with torch.no_grad():
        assert_equal_to_rounding(reloaded(**data[0]).logits, pruned(**data[0]).logits)


def divergence(model, dense, data):
    apart, rows = 0.0, 0
    for batch in data:
        with torch.no_grad():
            ours, theirs = (torch.log_softmax(x(**cast(batch, x)).logits.double(), -1) for x in (model, dense))
        if ours.ndim == 3:
            live = batch["attention_mask"].bool()
            ours, theirs = ours[live], theirs[live]
        apart += float((theirs.exp() * (theirs - ours)).sum())
        rows += len(ours)
    return apart / rows


@pytest.mark.parametrize(("architecture", "head"), [("bert", "sequence_classification"), ("gpt2", "causal_lm")])
def test_priorities_are_divergences_of_models_with_one_cut_sublayer(model, batches, architecture, head):
    dense = model(architecture, head)
    data = batches(dense.config)
    layers, before = layers_of(dense), copy.deepcopy(dense.state_dict())
    measured = measure_and_rank(dense, layers, hc.StructuredPruningConfig(), data)
    found = divergence_priorities(dense, layers, measured.rankings, measured.moments, data, measured.mean_length)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    for key, out in output_projections(layers).items():
        ranking = measured.rankings[key]
        units, size = len(ranking.order), out.in_features // len(ranking.order)
        # All units gone, and half of them: both are sizes that were tried.
        for kept in (0, units // 2):
            cut = copy.deepcopy(dense)
            weight = output_projection(layers_of(cut)[key[0]], key[1]).weight
            columns = [unit * size + place for unit in sorted(ranking.order[:kept]) for place in range(size)]
            gram = measured.moments[key].gram
            explained = torch.linalg.lstsq(gram[columns][:, columns], gram[columns]).solution if kept else gram[:0]
            with torch.no_grad():
                wide = weight.double().clone()
                weight.zero_()
                weight[:, columns] = (wide @ explained.T).float()
            # The hull lies below what was measured, and touches it where all units are gone.
            by_hull, by_hand = sum(found[key][kept:]), divergence(cut, dense, data)
            assert by_hull <= by_hand * (1 + 1e-3) + 1e-9
            assert kept or by_hull == pytest.approx(by_hand, rel=1e-3)


def test_labels_that_hold_at_once_are_rows_of_two_classes(model, batches):
    many = model("bert", "sequence_classification").eval()
    many.config.return_dict, many.config.problem_type = False, "multi_label_classification"
    (batch,) = batches(many.config, count=1)
    answers = Answers(many)
    rows = answers(batch)
    scores = many(**batch, return_dict=True).logits
    assert answers.classifies
    wanted = torch.stack([torch.sigmoid(scores), 1 - torch.sigmoid(scores)], -1).reshape(-1, 2)
    torch.testing.assert_close(rows.exp(), wanted)


def test_a_large_vocabulary_is_asked_about_the_beginnings_of_fewer_texts(model, batches):
    dense = model("llama", "causal_lm")
    padded = batches(dense.config, count=3)
    full = [{name: batch["input_ids"].clone() for name in ("input_ids", "labels")} for batch in padded]
    found = some_examples(dense, full, examples=24, mean_length=24, wanted=32, longest=8)
    # Every sixth text of 24, eight tokens each.
    wanted = torch.cat([batch["input_ids"] for batch in full])[::6, :8]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), wanted)
    assert torch.equal(torch.cat([batch["labels"] for batch in found]), wanted)
    # What a text begins with may be padding: those that have any stay whole.
    found = some_examples(dense, padded, examples=24, mean_length=24, wanted=32, longest=8)
    masks = torch.cat([batch["attention_mask"] for batch in padded])
    assert torch.equal(torch.cat([batch["attention_mask"] for batch in found]), masks[::6])


@pytest.mark.parametrize("width", [1, 2, 8])
def test_examples_are_taken_from_all_over_the_data(model, batches, width):
    """Batches are often sorted by length."""
    dense = model("bert", "sequence_classification")
    data = batches(dense.config, count=40 // width, size=width)
    ids = torch.cat([batch["input_ids"] for batch in data])
    lengths = torch.cat([batch["attention_mask"] for batch in data]).sum(1)
    found = some_examples(dense, data, 40, float(lengths.double().mean()), wanted=100)
    step = round(int(lengths.sum()) / 100)
    assert step > 4
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), ids[::step])
    places = torch.arange(ids.shape[1])[None]
    (part,) = some_examples(dense, [{"input_ids": ids, "position_ids": places}], 40, 20.0, wanted=100)
    assert part["position_ids"] is places


def test_the_hull_is_convex_and_below_every_point():
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = sorted({0, 40, *generator.integers(1, 40, 6).tolist()})
        values = {size: float(generator.random()) for size in sizes} | {40: 0.0}
        slopes = falls(values)
        assert len(slopes) == 40
        assert all(one >= other - 1e-12 for one, other in itertools.pairwise(slopes))
        left = {size: sum(slopes[size:]) for size in sizes}
        assert all(left[size] <= values[size] + 1e-9 for size in sizes)
        assert left[40] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "teacher"}, "target must be one of"),
        ({"target": "dense", "selection": "fisher"}, "target='dense' must go with"),
        ({"target": "dense", "correction": False}, "target='dense' must go with"),
        ({"target": "dense", "center": True}, "target='dense' must go with"),
        ({"allocation": "divergence", "selection": "fisher"}, "allocation must be 'tolerance' or 'uniform'"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        hc.StructuredPruningConfig(**fields)


def test_data_that_can_be_read_once_is_refused_for_divergence(model, batches):
    dense = model("bert")
    with pytest.raises(ValueError, match="read"):
        hc.compress(dense, hc.StructuredPruningConfig(allocation="divergence"), data=iter(batches(dense.config)))
