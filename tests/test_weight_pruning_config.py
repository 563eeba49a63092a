"""Configs of weight pruning: which values are refused, which layers are meant, what is recorded."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, T5ForQuestionAnswering

import hf_compress as hc
from hf_compress.methods.weight_pruning.groups import groups_of
from tests.pruned_training import HEAD, linears


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
    ({"progressive": True, "pattern": "mha"}, "pattern must not be 'mha' with progressive=True"),
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
            prunable.name
            for group in groups_of(model("bert", HEAD), hc.WeightPruningConfig(**values))
            for prunable in group.weights
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
    assert {prunable.name for prunable in first.weights} == {name for name in inner if "query" in name}
    assert {prunable.name for prunable in second.weights} == {name for name in inner if "query" not in name}
    assert (first.config.pattern, second.config.pattern) == ("1x1", "4x1")
    assert (first.config.scope, second.config.scope) == ("global", "local")
    with pytest.raises(ValueError, match="must select a layer of Linear"):
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
        return {prunable.name for prunable in group.weights}

    assert names() == inner
    head = "lm_head" if kind is T5ForConditionalGeneration else "qa_outputs"
    assert names(excluded_op_names=[]) == inner | {head}
    # Wherever it stands, a layer that shares its weight with embeddings is not selected.
    model.encoder.shared_twice = nn.Linear(16, 50, bias=False)
    model.encoder.shared_twice.weight = model.shared.weight
    assert names() == inner


def test_a_step_is_what_json_makes_of_it():
    """Or a resumed training would take its own step for another one."""
    local = ({"op_names": ("query",), "pattern": "1x1"}, {"op_names": ["key"], "excluded_op_names": ()})
    record = hc.WeightPruningConfig(local_configs=local).to_record()
    assert record == json.loads(json.dumps(record))
    assert hc.WeightPruningConfig(**record).to_record() == record


def test_a_record_says_what_the_model_is_and_not_how_training_got_there():
    schedule = {
        "sparsity_decay_type": "cube", "start_step": 3, "end_step": 9, "pruning_frequency": 4, "warmup_epochs": 1,
        "cooldown_epochs": 2, "progressive": True, "reg_type": "group_lasso", "reg_coeff": 0.1,
    }  # fmt: skip
    what = {"pattern": "8x1", "target_sparsity": 0.5, "scope": "local"}
    plain = hc.WeightPruningConfig(**what, local_configs=[{"op_names": ["query"]}, {}])
    timed = hc.WeightPruningConfig(
        **what, **schedule, local_configs=[{"op_names": ["query"], "end_step": 5}, {"reg_coeff": 0.2}]
    )
    assert timed.to_record() == plain.to_record()
    assert not schedule.keys() & timed.to_record().keys()
    # Records of older versions hold the schedule; they open, and say the same.
    old = {**dataclasses.asdict(timed), "achieved_sparsity": 0.5}
    assert hc.WeightPruningConfig(**old).to_record() == {**plain.to_record(), "achieved_sparsity": 0.5}
