"""What decides a teacher's outputs changes its fingerprint or the keys of its examples; names do not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.training.cache import TeacherCache
from hf_compress.training.fingerprints import example_keys, teacher_fingerprint
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teachers import FixedTeacher
from tests.crash_program import Rows, pad


KIND = "sequence_classification"
CHANGES = {
    "heads": {"num_attention_heads": 2},
    "activation": {"hidden_act": "relu"},
    "padding id": {"pad_token_id": 7},
    "epsilon": {"layer_norm_eps": 1e-3},
}
PRUNED = {
    "dense": None,
    "threshold": {"final_token_threshold": 0.02},
    "another threshold": {"final_token_threshold": 0.03},
    "score length": {"final_token_threshold": 0.02, "score_reference_length": 64},
    "top-k": {"prune_mode": "topk", "token_keep_rate": 0.5},
    "top-k, more": {"prune_mode": "topk", "token_keep_rate": 0.6},
}
LINEAR = ({"slot_mask": False}, {"slot_mask": True})


def rebuilt(dense, **changes):
    config = copy.deepcopy(dense.config)
    config.update(changes)
    other = AutoModelForSequenceClassification.from_config(config).eval()
    other.load_state_dict(dense.state_dict())
    return other


@pytest.mark.parametrize("change", list(CHANGES))
def test_the_config_counts(model, change):
    dense = model("bert", KIND)
    other = rebuilt(dense, **CHANGES[change])
    assert teacher_fingerprint(other) != teacher_fingerprint(dense)


def test_the_record_counts(model):
    """Linear attention and token pruning, as the weights alone do not tell."""
    found = []
    for options in PRUNED.values():
        pruned = model("bert", KIND)
        found.append(pruned if options is None else hc.compress(pruned, hc.TokenPruningConfig(**options)))
    linear = [hc.compress(model("bert", KIND), hc.LinformerConfig(projected_length=4, **x)) for x in LINEAR]
    assert linear[0].state_dict().keys() == linear[1].state_dict().keys()
    assert len({teacher_fingerprint(one) for one in (*found, *linear)}) == len(PRUNED) + len(LINEAR)


def test_weights_dtype_buffers_and_modules_count(model):
    dense = model("bert", KIND)
    others = [copy.deepcopy(dense) for _ in range(4)]
    with torch.no_grad():
        others[0].classifier.bias[0] += 1e-6
    others[1].half()
    others[2].bert.embeddings.position_ids += 1  # Not in the state dict.
    others[3].bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    assert len({teacher_fingerprint(one) for one in (dense, *others)}) == 5


def test_names_do_not_count(model, tmp_path):
    dense = model("bert", KIND)
    seen = teacher_fingerprint(dense)
    dense.save_pretrained(tmp_path / "renamed")
    opened = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "renamed", attn_implementation=kernel)
        for kernel in ("eager", "sdpa")
    ]
    opened[0].config.update({"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}})
    opened[1].config.problem_type = "single_label_classification"
    opened[1].config.transformers_version = "5.0.0"
    assert {teacher_fingerprint(one) for one in (*opened, copy.deepcopy(dense))} == {seen}


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_a_cache_of_right_padded_texts_is_right_for_left_padded_ones(model, tmp_path, architecture):
    dense = model(architecture, KIND).double()
    right = pad([Rows()[index] for index in range(8)])
    del right["labels"]
    shift = right["input_ids"].shape[1] - right["attention_mask"].sum(1)
    left = {
        name: torch.stack([row.roll(int(n)) for row, n in zip(value, shift, strict=True)])
        for name, value in right.items()
    }
    cached = FixedTeacher(dense, WantedSignals((1,)), cache=TeacherCache.of(dense, str(tmp_path), {}))
    live = FixedTeacher(copy.deepcopy(dense), WantedSignals((1,)))
    for batch in (right, left, {name: F.pad(value, (0, 3)) for name, value in right.items()}):
        for _ in range(2):
            seen, expected = cached.forward(batch), live.forward(batch)
            torch.testing.assert_close(seen.logits[0], expected.logits[0], rtol=0, atol=1e-12)
            where = batch["attention_mask"].bool()
            torch.testing.assert_close(seen.hidden[0][where], expected.hidden[0][where], rtol=0, atol=1e-12)
    # Right padding, however wide, is read from the cache.
    assert cached.cache.misses == 16
    assert len(cached.cache) == 16 - int((shift == 0).sum())


def test_keys_see_every_input():
    ids = torch.arange(1, 13).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    variants = [
        batch,
        {**batch, "token_type_ids": torch.ones_like(ids)},
        {**batch, "position_ids": torch.arange(6).expand(2, 6)},
        {**batch, "image": torch.zeros(2, 3, 4, 4)},
        {**batch, "image": torch.ones(2, 3, 4, 4)},
        {**batch, "weights": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {**batch, "flag": True},
        {**batch, "flag": False},
        {**batch, "scale": torch.tensor(2.0)},
    ]
    keys = [key for variant in variants for key in example_keys(variant)]
    assert len(set(keys)) == 2 * len(variants)


@pytest.mark.parametrize("batch", [
    {"pixel_values": torch.zeros(2, 3, 4, 4)},
    {"input_ids": torch.zeros(2, 4, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 4, 6)},
    {"input_ids": torch.zeros(2, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 1, 6, 6)},
])  # fmt: skip
def test_what_is_not_one_text_a_row_is_refused(batch):
    with pytest.raises(ValueError, match="Leave teacher_cache_dir out"):
        example_keys(batch)
