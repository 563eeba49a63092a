"""The teacher's stored outputs: computed once, equal to computed ones, refused when they are not this teacher's."""

from __future__ import annotations

import json
import sqlite3

import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_compress.training.cache import TeacherCache
from hf_compress.training.fingerprints import example_keys
from tests.crash_program import Rows, pad
from tests.test_distillation import bert, trainer_of


TINY_T5 = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
           "decoder_start_token_id": 0}  # fmt: skip
TINY_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
            "image_size": 8, "patch_size": 4}  # fmt: skip

TINY_DISTILBERT = {"vocab_size": 99, "dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 1}


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def count_calls(trainer):
    calls = []
    trainer.teacher_model.register_forward_hook(lambda *_: calls.append(trainer.state.epoch))
    return calls


def test_teacher_runs_in_the_first_epoch_only(tmp_path):
    trainer = trainer_of(tmp_path / "a", num_train_epochs=3, teacher_cache_dir=str(tmp_path / "cache"))
    calls = count_calls(trainer)
    trainer.train()
    assert len(calls) == 8
    assert len(trainer.teacher_cache) == 64
    again = trainer_of(tmp_path / "b", num_train_epochs=1, teacher_cache_dir=str(tmp_path / "cache"))
    calls = count_calls(again)
    again.train()
    assert calls == []


@pytest.mark.parametrize("alpha_layer", [0.0, 1.0])
def test_cached_training_equals_live_training(tmp_path, alpha_layer):
    runs = []
    for name, options in (
        ("live", {}),
        ("cold", {"teacher_cache_dir": str(tmp_path / "c")}),
        ("warm", {"teacher_cache_dir": str(tmp_path / "c")}),
    ):
        trainer = trainer_of(
            tmp_path / name, num_train_epochs=2, alpha_layer=alpha_layer, learning_rate=1e-3, **options
        )
        trainer.train()
        runs.append(weights(trainer))
    for name, value in runs[0].items():
        for other in runs[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_keys_ignore_padding_and_see_every_token():
    rows = Rows()
    alone, together = pad([rows[0]]), pad([rows[0], rows[1], rows[2]])
    assert example_keys(alone)[0] == example_keys(together)[0]
    changed = {**alone, "input_ids": alone["input_ids"].clone()}
    changed["input_ids"][0, 0] += 1
    assert example_keys(changed)[0] != example_keys(alone)[0]
    assert len(set(example_keys(pad([rows[i] for i in range(64)])))) == 64


def test_stored_values_come_back_at_live_positions(tmp_path):
    """Also when the padded length happens to equal the number of classes."""
    cache = TeacherCache(str(tmp_path), "f", {})
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = {"input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]), "attention_mask": mask}
    keys = example_keys(inputs)
    flat, wide = torch.randn(2, 3), torch.randn(2, 3, 4)
    cache.write(keys, inputs, [flat], [wide])
    wider = {k: torch.nn.functional.pad(v, (2, 0)) for k, v in inputs.items()}  # left padding this time
    (stored,), (states,) = TeacherCache(str(tmp_path), "f", {}).read(keys, wider)
    assert torch.equal(stored, flat)
    assert torch.equal(states[0, 2:4], wide[0, :2])
    assert torch.equal(states[1, 2:5], wide[1])
    assert not states[0, 4].any()


def test_other_teachers_are_refused(tmp_path):
    trainer_of(tmp_path / "a", teacher_cache_dir=str(tmp_path / "cache")).train()
    with pytest.raises(ValueError, match="another teacher"):
        trainer_of(tmp_path / "b", teacher=bert(seed=2), teacher_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="another set of outputs"):
        trainer_of(tmp_path / "c", alpha_layer=1.0, teacher_cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("damage", ["value", "page", "cut", "text", "other tables"])
def test_damage_is_said_in_one_line(tmp_path, damage):
    cache, file = tmp_path / "cache", tmp_path / "cache" / "outputs.sqlite"
    trainer = trainer_of(tmp_path / "a", teacher_cache_dir=str(cache))
    trainer.train()
    (data,) = trainer.teacher_cache._own.database.execute("SELECT data FROM outputs LIMIT 1").fetchone()
    trainer.teacher_cache._own.database.close()
    raw = bytearray(file.read_bytes())
    if damage == "value":
        raw[raw.index(data)] ^= 255
        file.write_bytes(raw)
    elif damage == "page":
        raw[65536:66536] = bytes(1000)
        file.write_bytes(raw)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-70000])
    elif damage == "text":
        file.write_text("no database at all " * 100)
    else:
        file.unlink()
        sqlite3.connect(file).execute("CREATE TABLE identity (other TEXT)").connection.close()
    with pytest.raises(ValueError, match=r"teacher_cache_dir '.*cache' (is damaged|cannot be used)") as caught:
        trainer_of(tmp_path / "b", teacher_cache_dir=str(cache), num_train_epochs=1).train()
    assert "\n" not in str(caught.value)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty or a teacher cache"):
        TeacherCache(str(tmp_path), "f", {})
    assert json.dumps([p.name for p in tmp_path.iterdir()]) == '["thesis.txt"]'


def test_left_overs_do_not_confuse(tmp_path):
    """Of a crash, and the files of an earlier format."""
    for name in (".meta.json.incomplete", ".shapes.json.incomplete", "outputs.sqlite-journal"):
        (tmp_path / name).write_text("{")
    assert len(TeacherCache(str(tmp_path), "f", {})) == 0
    old = tmp_path / "old"
    old.mkdir()
    for name, text in (("meta.json", '{"version": 1}'), ("index-0.bin", ""), ("values-0.bin", "")):
        (old / name).write_text(text)
    with pytest.raises(ValueError, match="was made with another format; delete it or name another folder"):
        TeacherCache(str(old), "f", {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_keep_their_precision(tmp_path, dtype):
    cache = TeacherCache(str(tmp_path), "f", {})
    inputs = {
        "input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    starts, vectors = (
        (torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)),
        torch.randn(2, 3, 4, dtype=dtype),
    )
    live = inputs["attention_mask"].bool()
    cache.write([b"1", b"2"], inputs, starts, [vectors])
    seen, (states,) = cache.read([b"1", b"2"], inputs)
    assert torch.equal(states, vectors * live[..., None])
    assert all(torch.equal(a, b * live) for a, b in zip(seen, starts, strict=True))


def test_what_belongs_to_no_token_is_not_stored(tmp_path):
    cache = TeacherCache(str(tmp_path), "f", {})
    inputs = {"input_ids": torch.tensor([[5, 6]])}
    with pytest.raises(ValueError, match=r"its logits have shape \(1, 3, 9\)"):
        cache.write([b"1"], inputs, [torch.zeros(1, 3, 9)], [])
    for model in (T5ForConditionalGeneration(T5Config(**TINY_T5)), ViTForImageClassification(ViTConfig(**TINY_VIT))):
        with pytest.raises(ValueError, match="teacher_cache_dir must be unset for"):
            TeacherCache.of(model, str(tmp_path / "x"), {})


def test_a_repeated_text_has_one_answer(tmp_path):
    """The second time it stands in a batch with new texts; a resumed run finds the whole batch stored."""
    rows = [Rows()[index] for index in range(8)]
    rows[5] = rows[0]
    batches = [pad(rows[:4]), pad(rows[4:])]
    trainer = trainer_of(tmp_path, teacher_cache_dir=str(tmp_path / "cache"))
    first = [trainer.session.teacher.forward(batch).logits[0] for batch in batches]
    again = [trainer.session.teacher.forward(batch).logits[0] for batch in batches]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[1][1], first[0][0])


def test_inputs_that_the_teacher_does_not_take_do_not_count(tmp_path):
    """A BERT with token types learns from a DistilBERT, which has none; labels are no input."""
    torch.manual_seed(0)
    teacher = DistilBertForSequenceClassification(DistilBertConfig(**TINY_DISTILBERT))
    trainer = trainer_of(tmp_path / "a", teacher=teacher, teacher_cache_dir=str(tmp_path / "cache"))
    batch = pad([Rows()[index] for index in range(4)])
    variants = [batch, {**batch, "token_type_ids": batch["attention_mask"]}, {**batch, "labels": 1 - batch["labels"]}]
    seen = [trainer.session.teacher.forward(variant).logits[0] for variant in variants]
    assert len(trainer.teacher_cache) == 4
    assert all(torch.equal(stored, seen[0]) for stored in seen)


def test_a_cache_that_is_no_longer_used_is_closed(tmp_path):
    cache = TeacherCache(str(tmp_path), "f", {})
    database = cache._own.database
    del cache
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        database.execute("SELECT 1")
