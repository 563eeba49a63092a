"""The teacher's stored outputs: computed once, equal to computed ones, refused when they are not this teacher's."""

from __future__ import annotations

import json

import pytest
import torch

from hf_compress.training.cache import TeacherCache, example_keys, teacher_fingerprint
from tests.crash_program import Rows, pad
from tests.test_distillation import bert, trainer_of


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
    logits, hidden = torch.randn(2, 3), torch.randn(2, 3, 4)
    cache.write(keys, inputs, [logits], [hidden])
    wider = {k: torch.nn.functional.pad(v, (2, 0)) for k, v in inputs.items()}  # left padding this time
    (stored,), (states,) = TeacherCache(str(tmp_path), "f", {}).read(keys, wider)
    assert torch.equal(stored, logits)
    assert torch.equal(states[0, 2:4], hidden[0, :2])
    assert torch.equal(states[1, 2:5], hidden[1])
    assert not states[0, 4].any()


def test_other_teachers_are_refused(tmp_path):
    trainer_of(tmp_path / "a", teacher_cache_dir=str(tmp_path / "cache")).train()
    with pytest.raises(ValueError, match="another teacher"):
        trainer_of(tmp_path / "b", teacher=bert(seed=2), teacher_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="another set of outputs"):
        trainer_of(tmp_path / "c", alpha_layer=1.0, teacher_cache_dir=str(tmp_path / "cache"))


def test_fingerprint_sees_one_changed_weight():
    model = bert(seed=1)
    before = teacher_fingerprint(model)
    assert before == teacher_fingerprint(bert(seed=1))
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    assert teacher_fingerprint(model) != before


def test_damage_is_noticed(tmp_path):
    cache = tmp_path / "cache"
    trainer_of(tmp_path / "a", teacher_cache_dir=str(cache)).train()
    values = (cache / "values-0.bin").read_bytes()
    (cache / "values-0.bin").write_bytes(bytes([values[0] ^ 255]) + values[1:])
    with pytest.raises(ValueError, match="damaged"):
        trainer_of(tmp_path / "b", teacher_cache_dir=str(cache)).train()
    (cache / "values-0.bin").write_bytes(values[:-8])
    with pytest.raises(ValueError, match="damaged"):
        trainer_of(tmp_path / "b", teacher_cache_dir=str(cache))
    (cache / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="unreadable"):
        trainer_of(tmp_path / "b", teacher_cache_dir=str(cache))


def test_a_cut_off_record_costs_one_example(tmp_path):
    cache = tmp_path / "cache"
    trainer_of(tmp_path / "a", teacher_cache_dir=str(cache)).train()
    index = (cache / "index-0.bin").read_bytes()
    (cache / "index-0.bin").write_bytes(index[:-5])
    trainer = trainer_of(tmp_path / "b", teacher_cache_dir=str(cache))
    assert len(trainer.teacher_cache) == 63
    trainer.train()
    assert len(trainer_of(tmp_path / "c", teacher_cache_dir=str(cache)).teacher_cache) == 64


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty or a teacher cache"):
        TeacherCache(str(tmp_path), "f", {})
    assert json.dumps([p.name for p in tmp_path.iterdir()]) == '["thesis.txt"]'
