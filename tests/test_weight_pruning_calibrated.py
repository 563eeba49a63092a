"""Wanda and SparseGPT: scores and reconstructions against loops written by the book, exact counts, padding, files."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2Model,
    Trainer,
    TrainingArguments,
)

import hf_compress as hc
from hf_compress.core.calibration import call_order
from hf_compress.methods.weight_pruning.groups import groups_of
from hf_compress.methods.weight_pruning.patterns import parse_pattern
from hf_compress.methods.weight_pruning.reconstruction import DAMPING, inverse_factor, prune_and_reconstruct
from tests.rounding import assert_equal_to_rounding


HEAD = "sequence_classification"
CALIBRATED = ["wanda", "sparsegpt"]


def config_of(criterion, pattern="1x1", target=0.5, scope="local", **values):
    return hc.WeightPruningConfig(criterion=criterion, pattern=pattern, target_sparsity=target, scope=scope, **values)


def layers_of(model, **values):
    (group,) = groups_of(model, config_of("magnitude", **values))
    return {prunable.name: prunable for prunable in group.weights}


def matrices_of(model, **values):
    """Name -> [outputs, inputs] of the layers that are pruned by default."""
    return {name: layer.matrix(layer.weight.detach()) for name, layer in layers_of(model, **values).items()}


def recorded_inputs(model, names, data):
    """Name -> [N, C] float64 inputs of live tokens, in whole forward passes."""
    seen, live = {name: [] for name in names}, []

    def hook(name):
        return lambda module, inputs: seen[name].append(inputs[0][live[-1]].double())

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in data:
            live.append(batch["attention_mask"].bool())
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_positions": 66, "n_embd": 32, "n_layer": 2, "n_head": 4}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    return GPT2Model(GPT2Config(**sizes, **quiet, pad_token_id=0)).eval()


# Wanda.


@pytest.mark.parametrize("scope", ["local", "global"])
def test_wanda_against_a_loop(model, batches, scope):
    dense = model("bert", HEAD)
    data = batches(dense.config, count=2, size=4, length=12)
    before = {name: matrix.clone() for name, matrix in matrices_of(dense).items()}
    inputs = recorded_inputs(dense, before, data)
    ranked = []
    for name, weight in before.items():
        norms = [sum(value**2 for value in column) ** 0.5 for column in inputs[name].T.tolist()]
        for r, row in enumerate(weight.tolist()):
            ranked += [(abs(value) * norm, name, r, c) for c, (value, norm) in enumerate(zip(row, norms, strict=True))]
    expected = set()
    for part in [list(before)] if scope == "global" else [[name] for name in before]:
        here = sorted(entry for entry in ranked if entry[1] in part)
        expected |= {entry[1:] for entry in here[: len(here) * 3 // 10]}
    # `max_sparsity_ratio_per_op` would move units between layers.
    hc.compress(dense, config_of("wanda", target=0.3, scope=scope), data=iter(data))
    zeros = set()
    for name, weight in matrices_of(dense).items():
        zeros |= {(name, r, c) for r, c in (weight == 0).nonzero().tolist()}
        assert torch.equal(weight[weight != 0], before[name][weight != 0])
    assert zeros == expected


def test_wanda_in_patterns(model, batches):
    dense = model("bert", HEAD)
    data = batches(dense.config, count=2)
    before = {name: matrix.clone() for name, matrix in matrices_of(dense).items()}
    norms = {name: rows.norm(dim=0).float() for name, rows in recorded_inputs(dense, before, data).items()}
    for pattern in ("2:4", "16:32"):
        pruned = hc.compress(copy.deepcopy(dense), config_of("wanda", pattern), data=data)
        n, m = map(int, pattern.split(":"))
        for name, weight in matrices_of(pruned).items():
            scores = (before[name].abs() * norms[name]).view(len(weight), -1, m)
            lost = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.argsort(2)[..., :n], True)
            assert torch.equal(weight == 0, lost.view_as(weight))
    pruned = hc.compress(copy.deepcopy(dense), config_of("wanda", "4x1"), data=data)
    for name, weight in matrices_of(pruned).items():
        scores = (before[name].abs() * norms[name]).view(-1, 4, weight.shape[1]).mean(1)
        gone = (weight == 0).view(-1, 4, weight.shape[1])
        assert torch.equal(gone.any(1), gone.all(1))
        lost = scores.flatten().argsort()[: scores.numel() // 2]
        assert set(gone.all(1).flatten().nonzero().flatten().tolist()) == set(lost.tolist())


# SparseGPT, the matrix.


def by_the_book(weight, gram, pattern, count, columns=128):
    """Optimal brain surgeon in float64: every step inverts what is left of the matrix anew."""
    weight = weight.astype(np.float64).copy()
    hessian = gram + DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    inverses = [np.linalg.inv(hessian[c:, c:]) for c in range(len(hessian))]
    rows, width = weight.shape
    gone = np.zeros(weight.shape, bool)
    tall = int(pattern.split("x")[0]) if "x" in pattern else None
    n, m = map(int, pattern.split(":")) if tall is None else (None, 1)

    def cost(r, c):
        return weight[r, c] ** 2 / inverses[c][0, 0]

    units = [(r, c) for c in range(0, width, m) for r in range(0, rows, tall or 1)]
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        inside = [unit for unit in units if start <= unit[1] < stop]
        before, upto = (sum(unit[1] < bound for unit in units) for bound in (start, stop))
        share = count * upto // len(units) - count * before // len(units)
        if tall is None:
            total = {(r, c): sum(sorted(cost(r, k) for k in range(c, c + m))[:n]) for r, c in inside}
        else:
            total = {(r, c): np.mean([cost(k, c) for k in range(r, min(r + tall, rows))]) for r, c in inside}
        chosen = sorted(inside, key=total.get)[:share]
        for c in range(start, stop):
            if tall is None and c % m == 0:
                for r, _ in [unit for unit in chosen if unit[1] == c]:
                    for k in sorted(range(c, c + m), key=lambda k, r=r: cost(r, k))[:n]:
                        gone[r, k] = True
            if tall is not None:
                for r, _ in [unit for unit in chosen if unit[1] == c]:
                    gone[r : r + tall, c] = True
            for r in range(rows):
                if gone[r, c]:
                    weight[r, c:] -= weight[r, c] / inverses[c][0, 0] * inverses[c][0]
                    weight[r, c] = 0
    return weight


def correlated(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixture


CASES = [("1x1", 0.5), ("1x1", 0.7), ("2:4", 0.5), ("2:4", 0.2), ("4x1", 0.5), ("3x1", 0.6)]


@pytest.mark.parametrize("columns", [8, 128])
@pytest.mark.parametrize(("pattern", "target"), CASES)
def test_reconstruction_by_the_book(pattern, target, columns):
    inputs = correlated(100, 20)
    weight = torch.randn(10, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = inputs.T @ inputs
    parsed = parse_pattern(pattern)
    units = len(parsed.pruned_units(torch.zeros(10, 20, dtype=torch.bool)))
    count = int(units * target / parsed.ceiling)
    ours = prune_and_reconstruct(weight, inverse_factor(gram), parsed, count, columns=columns)
    theirs = by_the_book(weight.numpy(), gram.numpy(), pattern, count, columns)
    assert int(parsed.pruned_units(ours == 0).sum()) == count
    assert np.array_equal(ours.numpy() == 0, theirs == 0)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-9)
    single = prune_and_reconstruct(weight.float(), inverse_factor(gram), parsed, count, columns=columns)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("pattern", "target"), CASES)
def test_reconstruction_beats_magnitude(pattern, target):
    # A few directions carry most of what layers are fed; that is what the other weights can make use of.
    inputs = correlated(200, 24)[:, :8] @ correlated(8, 24, seed=2) + 5 * correlated(200, 24, seed=3)
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parsed = parse_pattern(pattern)
    nothing = torch.zeros_like(weight, dtype=torch.bool)
    kept = parsed.reduce(weight.abs(), "mean")
    scores = parsed.unit_scores(kept, nothing, "mean")
    count = int(len(scores) * target / parsed.ceiling)
    units = torch.zeros(len(scores), dtype=torch.bool)
    units[scores.argsort()[:count]] = True
    cut = weight.masked_fill(parsed.spread(units, kept, nothing), 0)
    ours = prune_and_reconstruct(weight, inverse_factor(inputs.T @ inputs), parsed, count)
    lost, repaired = (float((inputs @ (weight - other).T).norm()) for other in (cut, ours))
    assert repaired < 0.8 * lost


def test_shapes_that_do_not_divide_and_silent_inputs():
    inputs = correlated(60, 19)
    inputs[:, [3, 11]] = 0
    weight = torch.randn(7, 19, generator=torch.Generator().manual_seed(1))
    factor = inverse_factor(inputs.T @ inputs)
    for pattern, units in (("2:4", 35), ("4x1", 38), ("channelx1", 19)):
        parsed = parse_pattern(pattern)
        pruned = prune_and_reconstruct(weight, factor, parsed, units // 2, columns=8)
        assert pruned.isfinite().all()
        assert int(parsed.pruned_units(pruned == 0).sum()) == units // 2
        assert pruned[0].count_nonzero() > 0
    # Weights of inputs that are never there go early, and what is left of them is left alone.
    pruned = prune_and_reconstruct(weight, factor, parse_pattern("1x1"), 33)[:, [3, 11]]
    assert (pruned == 0).float().mean() > 2 * 33 / weight.numel()
    assert torch.equal(pruned[pruned != 0], weight[:, [3, 11]][pruned != 0])
    # Without any input, what is left is magnitude.
    factor = inverse_factor(torch.zeros(19, 19, dtype=torch.float64))
    pruned = prune_and_reconstruct(weight, factor, parse_pattern("1x1"), 66)
    assert set((pruned == 0).flatten().nonzero().flatten().tolist()) == set(
        weight.abs().flatten().argsort()[:66].tolist()
    )


# SparseGPT, the model.


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["1x1", "2:4"])
def test_layers_see_pruned_inputs(model, batches, architecture, pattern):
    kinds = {"pruning_op_types": ("Conv1D",)} if architecture == "gpt2" else {}
    dense = gpt2() if architecture == "gpt2" else model(architecture)
    data = batches(dense.config, count=3)
    pruned = hc.compress(copy.deepcopy(dense), config_of("sparsegpt", pattern, **kinds), data=data)
    inputs = recorded_inputs(pruned, matrices_of(pruned, **kinds), data)
    before, parsed = matrices_of(dense, **kinds), parse_pattern(pattern)
    for name, weight in matrices_of(pruned, **kinds).items():
        units = len(parsed.pruned_units(weight == 0))
        count = int(units * 0.5 / parsed.ceiling)
        factor = inverse_factor(inputs[name].T @ inputs[name])
        expected = prune_and_reconstruct(before[name], factor, parsed, count)
        assert torch.equal(weight == 0, expected == 0)
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)
        assert int((weight == 0).sum()) == weight.numel() // 2


def test_layers_with_one_input_share_its_statistics(model, batches):
    dense = model("bert")
    modules = {name: dense.get_submodule(name) for name in layers_of(dense)}
    calls = call_order(dense, modules, batches(dense.config, count=1)[0])
    assert [number for _, number in calls[:6]] == [0, 0, 0, 1, 2, 3]
    assert [name.rpartition("layer.")[2] for name, _ in calls[:4]] == [
        "0.attention.self.query",
        "0.attention.self.key",
        "0.attention.self.value",
        "0.attention.output.dense",
    ]
    passes = []
    handle = dense.embeddings.register_forward_hook(lambda *_: passes.append(1))
    hc.compress(dense, config_of("sparsegpt"), data=batches(dense.config, count=2))
    handle.remove()
    # One batch to see the order, then all to see what layers are called with: the rest happens layer by layer.
    assert len(passes) == 1 + 2


def test_layers_that_run_repeatedly(batches):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    dense = AlbertModel(AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=3, initializer_range=0.2)).eval()
    data = batches(dense.config, count=2)
    (name,) = [name for name in layers_of(dense) if name.endswith("ffn")]
    inputs = recorded_inputs(dense, [name], [data[0]])[name]
    assert len(inputs) == 3 * int(data[0]["attention_mask"].sum())
    only = {"op_names": [f"{re.escape(name)}$"]}
    weight = dense.get_submodule(name).weight.detach().clone()
    pruned = hc.compress(copy.deepcopy(dense), config_of("wanda", **only), data=data[:1])
    scores = (weight.abs() * inputs.norm(dim=0).float()).flatten()
    zeros = (pruned.get_submodule(name).weight == 0).flatten().nonzero().flatten()
    assert set(zeros.tolist()) == set(scores.argsort()[: len(scores) // 2].tolist())
    pruned = hc.compress(copy.deepcopy(dense), config_of("sparsegpt", **only), data=data[:1])
    expected = prune_and_reconstruct(
        weight, inverse_factor(inputs.T @ inputs), parse_pattern("1x1"), weight.numel() // 2
    )
    torch.testing.assert_close(pruned.get_submodule(name).weight.detach(), expected, rtol=1e-3, atol=1e-4)


# Both.


@pytest.mark.parametrize("criterion", CALIBRATED)
@pytest.mark.parametrize(("pattern", "target"), [("1x1", 0.37), ("2:4", 0.5), ("2:4", 0.3), ("4x1", 0.9)])
def test_exact_counts_of_every_layer(model, batches, criterion, pattern, target):
    dense = model("bert", HEAD)
    others = {name: value.clone() for name, value in dense.state_dict().items()}
    pruned = hc.compress(dense, config_of(criterion, pattern, target), data=batches(dense.config, count=2))
    parsed = parse_pattern(pattern)
    for name, weight in matrices_of(pruned).items():
        gone = parsed.pruned_units(weight == 0)
        assert int(gone.sum()) == int(len(gone) * target / parsed.ceiling + 1e-6)
        others.pop(f"{name}.weight")
    state = pruned.state_dict()
    assert all(torch.equal(state[name], value) for name, value in others.items())
    (step,) = hc.steps_of(pruned)
    assert step["criterion"] == criterion
    assert step["achieved_sparsity"] == pytest.approx(target, abs=1e-2)


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_padding_does_not_matter(model, batches, criterion):
    dense = model("bert", HEAD)
    data = batches(dense.config, count=2, size=4)
    noisy = [{**b, "input_ids": b["input_ids"].where(b["attention_mask"].bool(), torch.tensor(50))} for b in data]
    alone = [
        {name: value[i : i + 1, : int(b["attention_mask"][i].sum())] for name, value in b.items()}
        for b in data
        for i in range(4)
    ]
    results = [hc.compress(copy.deepcopy(dense), config_of(criterion), data=d) for d in (data, noisy, alone)]
    first, *rest = (matrices_of(model) for model in results)
    for other in rest:
        for name, weight in first.items():
            assert torch.equal(weight == 0, other[name] == 0)
            torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", CALIBRATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_reloaded_by_stock_classes(model, batches, tmp_path, criterion, dtype):
    dense = model("bert", HEAD).to(dtype)
    data = batches(dense.config, count=2)
    pruned = hc.compress(dense, config_of(criterion, "2:4"), data=data)
    pruned.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    ours, theirs = pruned.state_dict(), reloaded.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert_equal_to_rounding(reloaded(**data[0]).logits, pruned(**data[0]).logits)
    assert hc.steps_of(reloaded) == hc.steps_of(pruned)
    assert all(((w.view(len(w), -1, 4) == 0).sum(2) == 2).all() for w in matrices_of(reloaded).values())


def test_mixed_criteria(model, batches):
    dense = model("bert", HEAD)
    data = [{**batch, "labels": torch.arange(8) % 2} for batch in batches(dense.config, count=2)]
    parts = {"query": "magnitude", "key": "wanda", "value": "snip", "intermediate": "sparsegpt"}
    local = [
        {"op_names": [name], "criterion": criterion, "scope": "local", "pattern": "1x1", "target_sparsity": 0.5}
        for name, criterion in parts.items()
    ]
    before = {name: matrix.clone() for name, matrix in matrices_of(dense).items()}
    pruned = hc.compress(dense, hc.WeightPruningConfig(local_configs=local), data=data)
    for name, weight in matrices_of(pruned).items():
        part = next((part for part in parts if part in name), None)
        assert int((weight == 0).sum()) == (weight.numel() // 2 if part else 0)
        assert torch.equal(weight[weight != 0], before[name][weight != 0]) == (part != "intermediate")


def test_masks_stay_in_training_that_follows(model, batches, tmp_path):
    """The callback by magnitude, at once, finds the zeros and keeps them."""
    dense = model("bert", HEAD)
    data = batches(dense.config, count=2)
    pruned = hc.compress(dense, config_of("sparsegpt", "2:4"), data=data)
    zeros = {name: matrix == 0 for name, matrix in matrices_of(pruned).items()}
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": i % 2}
        for batch in data
        for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True))
    ]
    args = TrainingArguments(
        tmp_path,
        max_steps=3,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    keep = hc.WeightPruningCallback(config_of("magnitude", "2:4", sparsity_decay_type="oneshot"))
    before = {name: matrix.clone() for name, matrix in matrices_of(pruned).items()}
    Trainer(pruned, args, train_dataset=rows, callbacks=[keep]).train()
    for name, weight in matrices_of(pruned).items():
        assert torch.equal(weight == 0, zeros[name])
        assert not torch.equal(weight, before[name])


# Refusals.

BAD = [
    ({"criterion": "sparsegpt", "pattern": "1x4", "scope": "local"}, "pattern must be 'N:M' or 'Nx1' .*got '1x4'"),
    ({"criterion": "sparsegpt", "pattern": "1xchannel", "scope": "local"}, "pattern must be .*got '1xchannel'"),
    ({"criterion": "sparsegpt", "pattern": "4x1"}, "scope must be 'local' with criterion='sparsegpt'.*got 'global'"),
    ({"local_configs": [{"criterion": "sparsegpt"}]}, r"local_configs\[0\]: scope must be 'local'"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        hc.WeightPruningConfig(**values)


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_training_refuses_them(criterion):
    config = config_of(criterion)
    with pytest.raises(ValueError, match=f"in training, got '{criterion}': it needs calibration data"):
        hc.WeightPruningCallback(config)
    mixed = hc.WeightPruningConfig(local_configs=[{"criterion": criterion, "scope": "local"}])
    with pytest.raises(ValueError, match="in training"):
        hc.WeightPruningCallback(mixed)


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_what_cannot_be_calibrated_is_refused_before_anything_changes(model, batches, criterion):
    dense = model("bert", HEAD)
    before = copy.deepcopy(dense.state_dict())
    data = batches(dense.config, count=2)
    for values, wrong, message in (
        ({}, None, f"data must be given with criterion='{criterion}'"),
        ({}, [], "data must hold at least one batch"),
        ({}, [{"attention_mask": data[0]["attention_mask"]}], "data must hold dicts with input_ids"),
        ({"op_names": ["classifier"]}, data, "op_names must select layers that the base model runs.*got classifier"),
        ({"excluded_op_names": ["classifier"]}, data, "one row a token, got 8 rows for 192 tokens at bert.pooler"),
        ({"pruning_op_types": ["Embedding"]}, data, "pruning_op_types must be linear layers.*got Embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            hc.compress(dense, config_of(criterion, **values), data=wrong)
    if criterion == "sparsegpt":
        with pytest.raises(ValueError, match="data must be readable 2 times"):
            hc.compress(dense, config_of(criterion), data=iter(data))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert hc.steps_of(dense) == []
    convolution = nn.Conv1d(32, 32, 1)
    dense.bert.encoder.layer[0].extra = convolution
    with pytest.raises(ValueError, match="got Conv1d at bert.encoder.layer.0.extra"):
        hc.compress(dense, config_of(criterion, pruning_op_types=["Conv1d"]), data=data)
