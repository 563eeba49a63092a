"""Weight pruning in the hands of a stock Trainer: exact zeros, exact resume, loud failures; patterns spelled out."""

import copy
import itertools
import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.core.schedules import DECAYS, SparsitySchedule, sparsity_at
from hf_compress.methods.weight_pruning.groups import Layer, groups_of
from hf_compress.methods.weight_pruning.modeling import prune_layers
from hf_compress.methods.weight_pruning.selection import select_units
from hf_compress.methods.weight_pruning.timetable import schedule_of


HEAD = "sequence_classification"


# What the patterns mean, spelled out unit by unit.


def units_of(pattern, shape):
    """Index lists (row, column) of each unit of a matrix, for block patterns."""
    rows, columns = (int(size) if size != "channel" else None for size in pattern.split("x"))
    rows, columns = rows or shape[0], columns or shape[1]
    for top, left in itertools.product(range(0, shape[0], rows), range(0, shape[1], columns)):
        yield [
            (r, c) for r in range(top, min(top + rows, shape[0])) for c in range(left, min(left + columns, shape[1]))
        ]


def zero_units(pattern, matrix):
    """(units that are entirely zero, units) of a weight; N:M by groups within rows, filled up with zeros."""
    zero = np.asarray(matrix) == 0
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        zero = np.pad(zero, ((0, 0), (0, -zero.shape[1] % m)), constant_values=True)
        counts = zero.reshape(len(zero), -1, m).sum(2)
        return int((counts >= n).sum()), counts.size
    units = list(units_of(pattern, zero.shape))
    return sum(all(zero[place] for place in unit) for unit in units), len(units)


def linears(model):
    """The layers that a config without names prunes in a BERT classifier."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("bert.encoder")
    }


def prune(config, scores, sparsity=None, pruned=None):
    layers = [Layer(str(i), nn.Parameter(torch.ones(score.shape))) for i, score in enumerate(scores)]
    kept = [config.parsed_pattern.reduce(score, config.criterion_reduce_type) for score in scores]
    sparsity = config.target_sparsity if sparsity is None else sparsity
    return prune_layers(config, layers, kept, pruned or [None] * len(layers), sparsity)


@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (1, 5), (5, 1), (3, 3)])
@pytest.mark.parametrize("pattern", ["1x1", "4x1", "1x4", "2x3", "1xchannel", "channelx1", "2xchannel", "channelx3"])
def test_blocks_against_brute_force(pattern, shape):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    units = list(units_of(pattern, shape))
    means = [np.mean([float(scores[place]) for place in unit]) for unit in units]
    for target in (0.3, 0.5, 0.98):
        config = hc.WeightPruningConfig(pattern=pattern, target_sparsity=target)
        (mask,) = prune(config, [scores])
        count = int(len(units) * target + 1e-9)
        expected = np.zeros(shape, bool)
        for index in np.argsort(means)[:count]:
            for place in units[index]:
                expected[place] = True
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
def test_equal_scores_never_wipe_a_layer(pattern, value):
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
    sizes = [len(layer) for layer in scores]
    flat = np.concatenate([layer.numpy() for layer in scores])
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
        assert sum(int(layer.sum()) for layer in chosen) == count
        assert all(low <= int(c.sum()) <= high for low, c, high in zip(lower, chosen, upper, strict=True))
        total = sum(float(layer[mask].sum()) for layer, mask in zip(scores, chosen, strict=True))
        assert total == pytest.approx(best_within_bounds(scores, count, lower, upper), abs=1e-6)


def test_caps_and_floors_of_layers():
    scores = [torch.rand(10, 10), torch.rand(10, 10) + 1, torch.rand(10, 10) + 2]
    config = hc.WeightPruningConfig(
        pattern="1x1", target_sparsity=0.5, min_sparsity_ratio_per_op=0.2, max_sparsity_ratio_per_op=0.7
    )
    assert [int(mask.sum()) for mask in prune(config, scores)] == [70, 60, 20]
    # Before the last update the floor may wait as long as what is still to come can fill it.
    assert [int(mask.sum()) for mask in prune(config, scores, sparsity=0.2)] == [60, 0, 0]
    assert [int(mask.sum()) for mask in prune(config, scores, sparsity=0.4)] == [70, 40, 10]


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
        # Whatever the length, the three later stages of the last update find room before training or cooldown.
        assert window(steps=steps, progressive=True)[1] == steps - 1 - 3
    assert window(progressive=True, cooldown_epochs=1)[1] == 100 - 10 - 3
    with pytest.raises(ValueError, match="and 3 steps for the stages of the last update"):
        window(steps=97, end_step=96, progressive=True)
    for values in ({"end_step": 120}, {"start_step": 100}, {"warmup_epochs": 6, "cooldown_epochs": 5}):
        with pytest.raises(ValueError, match="must leave room for the schedule"):
            window(**values)
    with pytest.raises(ValueError, match=r"from step 1 to -2005 .* \(2105 an epoch, cooldown_epochs=1\)"):
        window(per_epoch=2105, cooldown_epochs=1)
    with pytest.raises(ValueError, match="start_step must be at least 1 with criterion='snip'"):
        window(start_step=0, sparsity_decay_type="oneshot", criterion="snip")


BAD = [
    ({"pattern": "4:2", "target_sparsity": 0.5}, "pattern must be .*got '4:2'"),
    ({"pattern": "channelxchannel"}, "pattern must be"),
    ({"pattern": "0x1"}, "pattern must be"),
    ({"pattern": "4by1"}, "pattern must be"),
    ({"pattern": "2:4"}, "target_sparsity must be at most 0.5 with pattern='2:4', got 0.9"),
    ({"target_sparsity": 1.0}, r"target_sparsity must be in \[0, 1\), got 1.0"),
    ({"target_sparsity": 0.99}, "target_sparsity must be at most max_sparsity_ratio_per_op=0.98, got 0.99"),
    (
        {"min_sparsity_ratio_per_op": 0.95},
        r"min_sparsity_ratio_per_op must be in \[0, target_sparsity=0.9\], got 0.95",
    ),
    ({"max_sparsity_ratio_per_op": 1.5}, r"max_sparsity_ratio_per_op must be in \[0, 1\), got 1.5"),
    ({"criterion": "taylor"}, "criterion must be one of 'magnitude', 'gradient', 'snip', 'snip_momentum'"),
    ({"sparsity_decay_type": "cubic"}, "sparsity_decay_type must be one of"),
    ({"scope": "layer"}, "scope must be one of 'global', 'local'"),
    ({"pruning_frequency": 0}, "pruning_frequency must be at least 1, got 0"),
    ({"start_step": -1}, "start_step must not be negative, got -1"),
    ({"warmup_epochs": -1}, "warmup_epochs must not be negative"),
    ({"start_step": 5, "end_step": 4}, "end_step must be at least start_step=5, got 4"),
    (
        {"progressive": True, "pruning_frequency": 3},
        "pruning_frequency must be at least 4 with progressive=True, got 3",
    ),
    ({"progressive": True, "pattern": "mha"}, "pattern must be another one than 'mha' with progressive=True"),
    (
        {"reg_type": "group_lasso"},
        "reg_coeff must be positive with a reg_type and 0 without, got 0.0 with group_lasso",
    ),
    (
        {"reg_type": "group_lasso", "reg_coeff": 0.1, "sparsity_decay_type": "oneshot"},
        "sparsity_decay_type must be gradual with reg_type, got 'oneshot'",
    ),
    ({"criterion": "wanda", "progressive": True}, "progressive and reg_type must be left out with criterion='wanda'"),
    ({"reg_coeff": 0.1}, "reg_coeff must be positive with a reg_type and 0 without, got 0.1 with None"),
    ({"reg_type": "lasso", "reg_coeff": 0.1}, "reg_type must be one of 'group_lasso', 'group_lasso_gradient'"),
    (
        {"reg_type": "group_lasso", "reg_coeff": 0.1, "pattern": "2:4", "target_sparsity": 0.5},
        "pattern must be one of blocks or channels with reg_type, got '2:4'",
    ),
    ({"op_names": ["("]}, r"op_names must be regular expressions, got '\('"),
    ({"op_names": "query"}, "op_names must be"),
    ({"pruning_op_types": []}, "pruning_op_types must name at least one class"),
    ({"local_configs": [{"patern": "4x1"}]}, r"local_configs\[0\] must hold keys of pattern, .*got 'patern'"),
    ({"local_configs": [{}, {"pattern": "2:4"}]}, r"local_configs\[1\]: target_sparsity must be at most 0.5"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        hc.WeightPruningConfig(**values)


def test_which_layers_are_pruned(model):
    def names(**values):
        return [
            layer.name
            for group in groups_of(model("bert", HEAD), hc.WeightPruningConfig(**values))
            for layer in group.layers
        ]

    inner = set(linears(model("bert", HEAD)))
    assert set(names()) == inner
    assert len(inner) == 18
    assert set(names(op_names=["query"])) == {name for name in inner if "query" in name}
    assert set(names(excluded_op_names=[])) == inner | {"bert.pooler.dense", "classifier"}
    assert set(names(excluded_op_names=["pooler", "^classifier"])) == inner
    # Mixed patterns: what two dicts select belongs to the first.
    config = hc.WeightPruningConfig(local_configs=[{"op_names": ["query"], "pattern": "1x1"}, {"scope": "local"}])
    first, second = groups_of(model("bert", HEAD), config)
    assert {layer.name for layer in first.layers} == {name for name in inner if "query" in name}
    assert {layer.name for layer in second.layers} == {name for name in inner if "query" not in name}
    assert (first.config.pattern, second.config.pattern) == ("1x1", "4x1")
    assert (first.config.scope, second.config.scope) == ("global", "local")
    with pytest.raises(ValueError, match="op_names must select a layer of Linear"):
        names(op_names=["nothing"])


def tiny_t5(kind=T5ForConditionalGeneration, **changes):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 50}
    return kind(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0, **changes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, T5ForQuestionAnswering])
def test_a_head_beside_its_stacks_is_not_pruned(kind, tied):
    """T5 has no base model inside that could tell the head apart."""
    model = tiny_t5(kind, tie_word_embeddings=tied)
    inner = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(("encoder", "decoder"))}

    def names(**values):
        (group,) = groups_of(model, hc.WeightPruningConfig(**values))
        return {layer.name for layer in group.layers}

    assert names() == inner
    head = "lm_head" if kind is T5ForConditionalGeneration else "qa_outputs"
    assert names(excluded_op_names=[]) == inner | {head}
    # Wherever it stands, a layer that shares its weight with embeddings is not selected.
    model.encoder.shared_twice = nn.Linear(16, 50, bias=False)
    model.encoder.shared_twice.weight = model.shared.weight
    assert names() == inner


def test_seq2seq_trainer(tmp_path):
    model = tiny_t5()
    words = model.shared.weight.detach().clone()
    ids = torch.randint(1, 50, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.flip(0)} for row in ids]
    args = Seq2SeqTrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=1e-2, predict_with_generate=True,
    )  # fmt: skip
    config = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, pruning_frequency=1)
    callback = hc.WeightPruningCallback(config)
    trainer = Seq2SeqTrainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    trainer.train()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert zero_units("2:4", module.weight.detach())[0] == module.weight.numel() // 4, name
    assert model.lm_head.weight is model.shared.weight
    assert model.shared.weight.detach().all()
    assert not torch.equal(model.shared.weight, words)
    assert len(trainer.predict(rows, max_new_tokens=4).predictions) == 16


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
    kept = [config.parsed_pattern.reduce(layer.matrix(layer.weight.detach().abs()), "mean") for layer in group.layers]
    convolution, linear = prune_layers(config, group.layers, kept, [None, None], 0.5)
    strength = net[0].weight.detach().abs().mean((1, 2, 3))
    assert torch.equal(convolution.flatten(1).all(1), convolution.flatten(1).any(1))
    assert set(convolution.flatten(1).all(1).nonzero().flatten().tolist()) == set(strength.argsort()[:4].tolist())
    # Outputs of Conv1D are columns.
    assert set(linear.all(0).nonzero().flatten().tolist()) == set(net[1].weight.abs().mean(0).argsort()[:4].tolist())
    two = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, pruning_op_types=["Conv2d"])
    (group,) = groups_of(net, two)
    (mask,) = prune_layers(two, group.layers, [group.layers[0].matrix(net[0].weight.detach().abs())], [None], 0.5)
    by_position = mask.permute(0, 2, 3, 1).reshape(8, -1)
    assert zero_units("2:4", ~by_position) == (56, 56)


# One-shot.


@pytest.mark.parametrize(
    ("pattern", "target"), [("4x1", 0.9), ("2:4", 0.5), ("1x1", 0.5), ("1xchannel", 0.5), ("3x5", 0.7)]
)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_one_shot_magnitude(model, pattern, target, scope):
    dense = model("bert", HEAD)
    pruned = hc.compress(
        copy.deepcopy(dense),
        hc.WeightPruningConfig(pattern=pattern, target_sparsity=target, scope=scope, criterion="magnitude"),
    )
    counts = [zero_units(pattern, weight) for weight in linears(pruned).values()]
    ceiling = target if ":" in pattern else 1.0
    if scope == "local":
        assert all(gone == int(units * target / ceiling + 1e-9) for gone, units in counts)
    else:
        assert sum(g for g, _ in counts) == int(sum(u for _, u in counts) * target / ceiling + 1e-9)
    for (name, before), after in zip(dense.state_dict().items(), pruned.state_dict().values(), strict=True):
        assert torch.equal(before.where(after != 0, 0), after), name
        assert name.removesuffix(".weight") in linears(dense) or torch.equal(before, after)
    (step,) = hc.steps_of(pruned)
    assert step["method"] == "weight_pruning"
    assert step["achieved_sparsity"] == pytest.approx(target, abs=0.01)
    assert hc.steps_of(hc.to_plain(pruned)) == []


def test_one_shot_with_gradients(model, batches):
    dense = model("bert", HEAD)
    data = [{**batch, "labels": torch.arange(8) % 2} for batch in batches(dense.config, count=2)]
    for parameter in dense.bert.parameters():
        parameter.requires_grad_(False)
    target = "bert.encoder.layer.0.output.dense"
    reference = copy.deepcopy(dense).requires_grad_(True)
    gradients = []
    for batch in data:
        reference.zero_grad()
        reference(**batch).loss.backward()
        gradients.append(reference.get_submodule(target).weight.grad.clone())
    weight = reference.get_submodule(target).weight.detach()
    expected = {
        "gradient": (gradients[0] + gradients[1]).abs(),
        "snip": (weight * (gradients[0] + gradients[1])).abs(),
        "snip_momentum": 0.9 * (weight * gradients[0]).abs() + (weight * gradients[1]).abs(),
    }
    for criterion, scores in expected.items():
        config = hc.WeightPruningConfig(
            pattern="1x1", target_sparsity=0.5, scope="local", criterion=criterion, op_names=[f"^{target}$"]
        )
        pruned = hc.compress(copy.deepcopy(dense), config, data=data)
        lost = set(scores.flatten().argsort()[: scores.numel() // 2].tolist())
        zeros = (pruned.get_submodule(target).weight == 0).flatten().nonzero().flatten().tolist()
        assert set(zeros) == lost
        assert not any(parameter.requires_grad for parameter in pruned.bert.parameters())
        assert all(parameter.grad is None for parameter in pruned.parameters())
    before = copy.deepcopy(dense.state_dict())
    for wrong, message in (
        (None, "data must be given with criterion='snip_momentum'"),
        ([], "at least one batch"),
        (batches(dense.config, count=1), "data must hold labels with criterion='snip_momentum'"),
    ):
        with pytest.raises(ValueError, match=message):
            hc.compress(dense, config, data=wrong)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_mixed_patterns_at_once(model):
    config = hc.WeightPruningConfig(
        criterion="magnitude",
        local_configs=[
            {"op_names": ["output", "intermediate"], "pattern": "2:4", "target_sparsity": 0.5},
            {"op_names": ["query", "key", "value"], "pattern": "1xchannel", "target_sparsity": 0.25, "scope": "local"},
        ],
    )
    pruned = hc.compress(model("bert", HEAD), config)
    for name, weight in linears(pruned).items():
        attention = re.search("query|key|value", name)
        assert zero_units("1xchannel" if attention else "2:4", weight) == (
            (8, 32) if attention else (weight.numel() // 4,) * 2
        )
    (step,) = hc.steps_of(pruned)
    assert step["local_configs"] == list(config.local_configs)


def test_a_step_is_what_json_makes_of_it():
    """Or a resumed training would take its own step for another one."""
    local = ({"op_names": ("query",), "pattern": "1x1"}, {"op_names": ["key"], "excluded_op_names": ()})
    record = hc.WeightPruningConfig(local_configs=local).to_record()
    assert record == json.loads(json.dumps(record))
    assert hc.WeightPruningConfig(**record).to_record() == record


# In training.


def examples(config, batches, number=16):
    ids = batches(config, count=1, size=number, length=12, seed=5)[0]["input_ids"]
    ids = ids.where(ids != config.pad_token_id, 3)
    return [{"input_ids": row, "labels": index % 2} for index, row in enumerate(ids)]


def arguments(folder, **changes):
    quiet = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(
        folder,
        **{**quiet, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 14, **changes},
    )


SMALL = {"pattern": "4x1", "target_sparsity": 0.9, "pruning_frequency": 3, "start_step": 1, "end_step": 10}


class ZerosStay(TrainerCallback):
    """Runs after the pruning callback and after each step compares the weights with its masks."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for layer, mask in self.pruning._pruned.items():
            assert not layer.weight[mask].any()
            assert torch.equal(optimizer.state[layer.weight]["pruned"], mask)
        self.seen.append(self.pruning._sparsity)


def pruning_trainer(model, folder, data, config, kind=Trainer, extra=(), **changes):
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(**config))
    watch = ZerosStay(callback)
    callbacks = [callback, watch, *extra]
    return kind(model, arguments(folder, **changes), train_dataset=data, eval_dataset=data, callbacks=callbacks), watch


@pytest.mark.parametrize("kind", [Trainer, hc.CompressionTrainer])
@pytest.mark.parametrize(
    ("changes", "training"),
    [
        ({}, {"weight_decay": 0.1}),
        ({"pattern": "2:4", "target_sparsity": 0.5}, {"weight_decay": 0.1, "gradient_accumulation_steps": 2}),
        ({"pattern": "1xchannel", "target_sparsity": 0.5, "criterion": "magnitude"}, {"optim": "sgd"}),
        ({"pattern": "3x5", "target_sparsity": 0.7, "criterion": "snip", "scope": "local"}, {"bf16": True}),
        ({"criterion": "gradient", "sparsity_decay_type": "oneshot", "start_step": 3}, {"max_grad_norm": 0.0}),
    ],
)  # fmt: skip
def test_zeros_stay_and_the_target_is_met(model, batches, tmp_path, kind, changes, training):
    dense = model("bert", HEAD)
    config = {**SMALL, **changes}
    trainer, watch = pruning_trainer(dense, tmp_path, examples(dense.config, batches), config, kind, **training)
    trainer.train()
    assert watch.seen == sorted(watch.seen)
    counts = [zero_units(config["pattern"], weight) for weight in linears(trainer.model).values()]
    ceiling = 0.5 if config["pattern"] == "2:4" else 1.0
    if config.get("scope") == "local":
        assert all(gone == int(units * config["target_sparsity"]) for gone, units in counts)
    else:
        units = sum(units for _, units in counts)
        assert sum(gone for gone, _ in counts) == int(units * config["target_sparsity"] / ceiling)
    (step,) = hc.steps_of(trainer.model)
    assert step["achieved_sparsity"] == pytest.approx(config["target_sparsity"], abs=0.02)
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert hc.steps_of(reloaded) == [step]
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), trainer.model.parameters(), strict=True))


def test_momentum_of_pruned_weights_does_not_bring_them_back(model, batches, tmp_path):
    dense = model("bert", HEAD)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(**SMALL))
    trainer = Trainer(
        dense,
        arguments(tmp_path),
        train_dataset=examples(dense.config, batches),
        callbacks=[callback, ZerosStay(callback)],
        optimizers=(optimizer, None),
    )
    trainer.train()
    masks = [state["pruned"] for state in optimizer.state.values() if "pruned" in state]
    momenta = [state["momentum_buffer"] for state in optimizer.state.values() if "pruned" in state]
    assert any(bool(momentum[mask].any()) for momentum, mask in zip(momenta, masks, strict=True))


def test_masks_equal_those_of_a_hand_written_loop(model, batches, tmp_path):
    """AdamW with weight decay, a constant learning rate, clipping off: the callback against twenty plain lines."""
    data = examples(model("bert", HEAD).config, batches)
    settings = {"weight_decay": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3}
    settings["optim"] = "adamw_torch"
    seen = []

    class Batches(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            # `model.forward` sees exactly what Trainer feeds.
            model.register_forward_pre_hook(lambda _, a, kw: seen.append(dict(kw)), with_kwargs=True)

    # Queries and keys would reach the cap of 0.98, which the loop below does not know.
    config = {**SMALL, "target_sparsity": 0.6, "op_names": ["dense"], "excluded_op_names": ["pooler"]}
    trainer, _ = pruning_trainer(model("bert", HEAD), tmp_path, data, config, extra=[Batches()], **settings)
    trainer.train()
    reference = model("bert", HEAD).train()
    decayed = trainer.get_decay_parameter_names(trainer.model)
    named = dict(reference.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    weights = {name: weight for name, weight in linears(reference).items() if name.endswith("dense")}
    scores = {name: torch.zeros(len(weight) // 4, weight.shape[1]) for name, weight in weights.items()}
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}
    for step, inputs in enumerate(seen):
        if step in (4, 7, 10):
            sparsity = 0.6 if step == 10 else 1 - 0.4 ** ((step - 1) / 9)
            pool = torch.cat([value.flatten() for value in scores.values()])
            threshold = pool.sort().values[int(len(pool) * sparsity) - 1]
            masks = {n: (value > threshold).float().repeat_interleave(4, 0) for n, value in scores.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
        optimizer.zero_grad()
        reference(**inputs).loss.backward()
        for name, weight in weights.items():
            gradient = named[f"{name}.weight"].grad
            new = (weight * gradient).abs().reshape(len(weight) // 4, 4, -1).mean(1)
            scores[name] = 0.9 * scores[name] + new
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
    assert len(seen) == 14
    for name, weight in linears(trainer.model).items():
        expected = linears(reference)[name]
        assert torch.equal(weight == 0, expected == 0), name
        assert torch.allclose(weight, expected, atol=1e-5)
        assert bool((weight == 0).any()) == (name in weights)


def test_accumulated_small_batches_equal_one_large(model, batches, tmp_path):
    """16 examples a step in one batch or in four: the same zeros (the loss is a mean over equal parts)."""
    dense = model("bert", HEAD).double()
    data = examples(dense.config, batches)
    results = []
    for size, parts in ((16, 1), (4, 4)):
        trainer, _ = pruning_trainer(
            copy.deepcopy(dense),
            tmp_path,
            data,
            SMALL,
            hc.CompressionTrainer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        results.append(linears(trainer.model))
    for name, weight in results[0].items():
        assert torch.equal(weight == 0, results[1][name] == 0), name
        assert torch.allclose(weight, results[1][name], atol=1e-9)


@pytest.mark.parametrize("kind", [Trainer, hc.CompressionTrainer])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "2:4", "target_sparsity": 0.5},
        {"criterion": "magnitude", "scope": "local"},
        {"criterion": "snip"},
        {"progressive": True, "pruning_frequency": 5, "reg_type": "group_lasso", "reg_coeff": 0.1},
        {"progressive": True, "pruning_frequency": 5, "criterion": "magnitude", "scope": "local"},
        {"progressive": True, "pruning_frequency": 4, "criterion": "snip", "pattern": "2:4", "target_sparsity": 0.5},
        {"reg_type": "group_lasso_gradient", "reg_coeff": 1e-4},
    ],
)
def test_resumed_equals_unbroken(model, batches, tmp_path, kind, changes):
    dense = model("bert", HEAD)
    data, config = examples(dense.config, batches), {**SMALL, **changes}
    saving = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    whole, _ = pruning_trainer(copy.deepcopy(dense), tmp_path / "whole", data, config, kind, **saving)
    whole.train()
    for step in (1, 4, 5, 7, 10, 11, 13):
        start = copy.deepcopy(dense)
        if step % 2:
            start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / f"checkpoint-{step}")
        again, watch = pruning_trainer(start, tmp_path / "again", data, config, kind, weight_decay=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert len(watch.seen) == 14 - step
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), (step, name)
        for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            ours, reference = again.optimizer.state[mine], whole.optimizer.state[theirs]
            assert ours.keys() == reference.keys()
            assert all(torch.equal(ours[key], reference[key]) for key in reference), step
            assert ours.get("pruned", torch.ones(1, dtype=torch.bool)).dtype == torch.bool
        assert hc.steps_of(again.model) == hc.steps_of(whole.model)
        assert len(hc.steps_of(whole.model)) == 1


def test_a_checkpoint_without_optimizer_is_refused(model, batches, tmp_path):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    saving = {"save_strategy": "steps", "save_steps": 6, "save_only_model": True}
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL, **saving)
    trainer.train()
    again, _ = pruning_trainer(copy.deepcopy(dense), tmp_path / "again", data, SMALL)
    with pytest.raises(ValueError, match="resume_from_checkpoint must hold the optimizer's state"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_evaluation_changes_nothing(model, batches, tmp_path):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    quiet, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL)
    quiet.train()

    class Untouched(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.before = copy.deepcopy(model.state_dict())

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            assert all(torch.equal(value, self.before[name]) for name, value in model.state_dict().items())

    noisy, _ = pruning_trainer(
        copy.deepcopy(dense), tmp_path, data, SMALL, extra=[Untouched()], eval_strategy="steps", eval_steps=1
    )
    noisy.train()
    for a, b in zip(quiet.model.parameters(), noisy.model.parameters(), strict=True):
        assert torch.equal(a, b)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Regrow(TrainerCallback):
    """Something else that touches the weights in the last step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            model.bert.encoder.layer[0].output.dense.weight.data.add_(1)


class GiveUpAt(TrainerCallback):
    """What Trainer does when Optuna prunes a trial."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.is_hyper_param_search = True

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            self.trainer.callback_handler.on_train_end(args, state, control)
            raise InterruptedError


def test_a_trial_that_a_search_gives_up(model, batches, tmp_path, caplog):
    dense, search = model("bert", HEAD), GiveUpAt()
    search.trainer, _ = pruning_trainer(dense, tmp_path, examples(dense.config, batches), SMALL, extra=[search])
    with pytest.raises(InterruptedError):
        search.trainer.train()
    assert "ended after 7 steps, before the last pruning update at step 10" in caplog.text
    # A trial that a callback ends, or that ends by itself, is judged like any other training.
    trainer, _ = pruning_trainer(dense, tmp_path, examples(dense.config, batches), SMALL, extra=[StopAt(6), search])
    with pytest.raises(ValueError, match="ended after 6 steps"):
        trainer.train()


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_without_length(model, batches, tmp_path):
    """An epoch is the whole training then, as for `Trainer` itself."""
    dense = model("bert", HEAD)
    data = Stream(examples(dense.config, batches))
    config = {"pattern": "2:4", "target_sparsity": 0.5, "pruning_frequency": 2, "cooldown_epochs": 0.5}
    trainer, watch = pruning_trainer(dense, tmp_path, data, config)
    trainer.train()
    assert watch.seen[5] < 0.5
    assert watch.seen[6:] == [0.5] * 8


def test_no_silent_success(model, batches, tmp_path):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL, extra=[StopAt(7)])
    with pytest.raises(ValueError, match="ended after 7 steps, before the last pruning update at step 10"):
        trainer.train()
    assert hc.steps_of(trainer.model) == []
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL, extra=[Regrow()])
    with pytest.raises(ValueError, match=r"target_sparsity=0.9 was not kept: \d+ of \d+ units of pattern 4x1"):
        trainer.train()
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, {**SMALL, "end_step": 14})
    trainer.train()  # The last update, at step 13, still fits.
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, {**SMALL, "end_step": 16})
    with pytest.raises(ValueError, match="must leave room for the schedule"):
        trainer.train()
    frozen = copy.deepcopy(dense)
    frozen.bert.requires_grad_(False)
    trainer, _ = pruning_trainer(frozen, tmp_path, data, SMALL)
    with pytest.raises(ValueError, match="op_names must select weights that are trained"):
        trainer.train()
    foreign = copy.deepcopy(dense)
    foreign.config.quantization_config = {"quant_method": "bitsandbytes"}
    trainer, _ = pruning_trainer(copy.deepcopy(dense), tmp_path, data, SMALL)
    trainer.model.config = foreign.config
    with pytest.raises(ValueError, match="quantization_config must be empty or of hf_compress"):
        trainer.train()
    with pytest.raises(ValueError, match="config must be a WeightPruningConfig, got StructuredPruningConfig"):
        hc.WeightPruningCallback(hc.StructuredPruningConfig())


def test_layers_without_gradient_are_left_alone(model, batches, tmp_path, caplog):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    dense.bert.encoder.layer[0].output.dense.requires_grad_(False)
    # The last layer's output counts at position 0 only, yet all its weights get gradients; a side branch gets none.
    dense.bert.encoder.layer[1].spare = nn.Linear(8, 8)
    before = copy.deepcopy(dense.state_dict())
    trainer, _ = pruning_trainer(dense, tmp_path, data, SMALL)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "because not trained: bert.encoder.layer.0.output.dense (8.3% of the selected weights)" in caplog.text
    assert "because no gradient reaches them: bert.encoder.layer.1.spare (0.3% of the selected" in caplog.text
    # What is told is the share of all weights that were to be pruned.
    (step,) = hc.steps_of(trainer.model)
    assert step["achieved_sparsity"] == pytest.approx(0.9 * (1 - 2112 / 24640), abs=0.002)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.spare.weight"):
        assert torch.equal(trainer.model.state_dict()[name], before[name])


def test_layers_without_gradient_are_named_at_once(model, batches, caplog):
    dense = model("bert", HEAD)
    dense.bert.encoder.layer[1].spare = nn.Linear(8, 8)
    data = [{**batch, "labels": torch.arange(8) % 2} for batch in batches(dense.config, count=1)]
    pruned = hc.compress(dense, hc.WeightPruningConfig(criterion="snip", target_sparsity=0.5), data=data)
    assert "because no gradient reaches them: bert.encoder.layer.1.spare (0.3% of the selected" in caplog.text
    assert pruned.bert.encoder.layer[1].spare.weight.all()


class Wake(TrainerCallback):
    """A layer that takes part from step 8 on."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model, self.awake = model, False
        model.classifier.register_forward_pre_hook(self.run)

    def on_step_begin(self, args, state, control, **kwargs):
        self.awake = state.global_step >= 8

    def run(self, module, inputs):
        return (inputs[0] + self.model.bert.encoder.layer[1].spare(inputs[0]),) if self.awake else None


def test_a_layer_that_is_reached_late(model, batches, tmp_path):
    """By magnitude it is pruned long before the optimizer has a state of it, also after a resume in between."""
    dense = model("bert", HEAD)
    dense.bert.encoder.layer[1].spare = nn.Linear(32, 32)
    data, config = examples(dense.config, batches), {**SMALL, "criterion": "magnitude", "end_step": 4}

    def train(folder, resume=None):
        callbacks = [hc.WeightPruningCallback(hc.WeightPruningConfig(**config)), Wake()]
        args = arguments(folder, save_strategy="steps", save_steps=6, optim="adamw_torch")
        trainer = Trainer(copy.deepcopy(dense), args, train_dataset=data, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path)
    weight = whole.model.bert.encoder.layer[1].spare.weight
    before = dense.bert.encoder.layer[1].spare.weight
    assert 0 < int((weight == 0).sum()) < weight.numel()
    assert not torch.equal(weight[weight != 0], before[weight != 0])
    again = train(tmp_path / "again", str(tmp_path / "checkpoint-6"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", [Trainer, hc.CompressionTrainer])
def test_sparsity_is_logged(model, batches, tmp_path, kind):
    dense = model("bert", HEAD)
    logged = {"logging_strategy": "steps", "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 7}
    trainer, _ = pruning_trainer(dense, tmp_path, examples(dense.config, batches), SMALL, kind, **logged)
    trainer.train()
    history = [entry["prune/sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    assert history == pytest.approx([0.0, 1 - 0.1 ** (1 / 3), 1 - 0.1 ** (2 / 3), 0.9], abs=1e-3)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert not any("prune/sparsity" in entry for entry in evaluations)


def test_the_best_checkpoint_is_a_pruned_one(model, batches, tmp_path):
    """A metric that is best at the start, when nothing is pruned."""
    dense = model("bert", HEAD)
    trainer, _ = pruning_trainer(
        dense,
        tmp_path,
        examples(dense.config, batches),
        {**SMALL, "end_step": 4},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="early",
        greater_is_better=True,
    )
    trainer.compute_metrics = lambda prediction: {"early": -trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_global_step == 6
    counts = [zero_units("4x1", weight) for weight in linears(trainer.model).values()]
    assert sum(gone for gone, _ in counts) == int(sum(units for _, units in counts) * 0.9)


def test_mixed_patterns_with_their_own_schedules(model, batches, tmp_path):
    config = {
        "pruning_frequency": 2,
        "local_configs": [
            {"op_names": ["output", "intermediate"], "pattern": "2:4", "target_sparsity": 0.5, "end_step": 4},
            {
                "op_names": ["query", "key"],
                "pattern": "1x1",
                "criterion": "magnitude",
                "start_step": 6,
                "end_step": 12,
            },
        ],
    }
    dense = model("bert", HEAD)
    trainer, _ = pruning_trainer(dense, tmp_path, examples(dense.config, batches), config)
    trainer.train()
    pruned = {name: zero_units("1x1", weight) for name, weight in linears(trainer.model).items()}
    assert all(gone * 2 == units for name, (gone, units) in pruned.items() if re.search("output|intermediate", name))
    assert all(gone == 0 for name, (gone, _) in pruned.items() if "value" in name)
    attention = [counts for name, counts in pruned.items() if re.search("query|key", name)]
    assert sum(g for g, _ in attention) == int(sum(u for _, u in attention) * 0.9)
    (step,) = hc.steps_of(trainer.model)
    assert step["achieved_sparsity"] < 0.9


def test_a_model_can_be_pruned_again_and_two_callbacks_do_not_meet(model, batches, tmp_path):
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    hc.compress(dense, hc.WeightPruningConfig(target_sparsity=0.5, criterion="magnitude"))
    half = {name: weight == 0 for name, weight in linears(dense).items()}
    trainer, _ = pruning_trainer(dense, tmp_path, data, {**SMALL, "criterion": "magnitude"})
    trainer.train()
    assert [step["target_sparsity"] for step in hc.steps_of(dense)] == [0.5, 0.9]
    assert sum(int(mask.sum()) for mask in half.values()) > 0
    assert hc.WeightPruningConfig().target_sparsity == 0.9
    assert hc.WeightPruningConfig().local_configs == ()


class ScaledTrainer(Trainer):
    """Mixed precision on the CPU but for the precision: losses are scaled, steps with infinite gradients skipped.

    Args:
        overflows: Steps in which a gradient becomes infinite.
    """

    overflows = ()

    def create_optimizer(self, model=None):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return super().create_optimizer(model)

    def training_step(self, model, *args, **kwargs):
        self.accelerator.native_amp = True  # Not earlier, or the model would run in bfloat16.
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step in self.overflows:
            model.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = torch.inf
        return loss


@pytest.mark.parametrize("kind", [Trainer, hc.CompressionTrainer])
def test_zeros_of_an_earlier_step_stay(model, batches, tmp_path, kind):
    """Where the callback does not choose; where it does, it decides anew."""
    dense = model("bert", HEAD)
    data = examples(dense.config, batches)
    earlier = {"pattern": "2:4", "target_sparsity": 0.5, "criterion": "magnitude"}
    hc.compress(dense, hc.WeightPruningConfig(**earlier, op_names=["dense", "query"], excluded_op_names=["pooler"]))
    before = {name: weight.clone() for name, weight in linears(dense).items()}
    config = {**SMALL, "op_names": ["query", "key", "value"]}
    trainer, _ = pruning_trainer(dense, tmp_path, data, config, kind)
    trainer.train()
    for name, weight in linears(trainer.model).items():
        if name.endswith("dense"):
            assert torch.equal(weight == 0, before[name] == 0), name
            assert not torch.equal(weight, before[name])
        elif name.endswith("query"):
            assert not torch.equal(weight == 0, before[name] == 0), name


@pytest.fixture
def mixed_precision(monkeypatch):
    # What makes `clip_grad_norm_` unscale; a real one is refused on the CPU.
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")


def test_scores_are_of_unscaled_gradients(model, batches, tmp_path, mixed_precision):
    """`Trainer` undoes the scale whether it clips or not."""
    data = examples(model("bert", HEAD).config, batches)
    for norm in (0.0, 1e9):
        results = []
        for kind in (Trainer, ScaledTrainer):
            settings = {"max_grad_norm": norm, "optim": "sgd", "learning_rate": 0.0}
            trainer, _ = pruning_trainer(model("bert", HEAD), tmp_path, data, SMALL, kind, **settings)
            trainer.train()
            weight = trainer.model.bert.encoder.layer[1].output.dense.weight
            results.append(trainer.optimizer.state[weight]["prune_score"])
        assert trainer.accelerator.scaler.get_scale() == 1024
        assert torch.allclose(*results, rtol=1e-5)


@pytest.mark.parametrize(("criterion", "optim"), [("snip", "adamw_torch_fused"), ("snip_momentum", "adamw_torch")])
def test_an_update_waits_while_steps_are_skipped(model, batches, tmp_path, mixed_precision, criterion, optim, caplog):
    dense = model("bert", HEAD)
    config = {"sparsity_decay_type": "oneshot", "start_step": 2, "criterion": criterion, "target_sparsity": 0.5}
    data = examples(dense.config, batches)
    for overflows, reached in (((0, 1, 2), 0.5), (range(14), 0.0)):
        trainer, watch = pruning_trainer(copy.deepcopy(dense), tmp_path, data, config, ScaledTrainer, optim=optim)
        trainer.overflows = overflows
        if reached:
            trainer.train()
            assert hc.steps_of(trainer.model)[0]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
        else:
            with pytest.raises(ValueError, match="ended after 14 steps, before the last pruning update at step 2"):
                trainer.train()
        assert "mixed precision skipped the last one" in caplog.text
        assert watch.seen == pytest.approx([0.0] * 4 + [reached] * 10, abs=0.01)


class Scaled:
    """An optimizer in mixed precision, which skips steps with infinite gradients and then halves the scale."""

    def __init__(self, optimizer):
        self.param_groups, self.state, self.scale = optimizer.param_groups, optimizer.state, 1024.0
        self.scaler = SimpleNamespace(get_scale=lambda: self.scale)


def test_skipped_steps_leave_no_scores():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    weight, gradient = net[0].weight, torch.rand(8, 8)
    args, state = SimpleNamespace(), SimpleNamespace(global_step=0, max_steps=9, num_train_epochs=1)
    optimizer = Scaled(torch.optim.SGD(net.parameters(), lr=0.0))
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(pattern="1x1", pruning_frequency=2))
    callback.on_train_begin(args, state, None, model=net, optimizer=optimizer)
    weight.grad = gradient
    callback.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    assert "prune_score" not in optimizer.state[weight]  # Never before the optimizer's own first entry.
    callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    expected = (weight.detach() * gradient).abs()
    assert torch.allclose(optimizer.state[weight]["prune_score"], expected)
    weight.grad = torch.full_like(weight, float("inf"))
    callback.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    optimizer.scale = 512.0
    callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    assert torch.allclose(optimizer.state[weight]["prune_score"], expected)
