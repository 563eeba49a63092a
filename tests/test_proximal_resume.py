"""Interrupted proximal trainings end with the weights of the unbroken one, for teacher and student."""

import pytest
import torch

import hf_compress as hc
from tests.guided_setup import ROWS, dense, same, trainer_of, weights
from tests.stopping import Stop, train_with_stops


UPDATES = 8
# Eight micro-batches and four updates an epoch: each of these stops is in the middle of one, or at its end.
FEW, MORE = [[3, 4, 5]], [[1, 2, 3, 4, 5, 6, 7], [6, 7], [1, 5]]

MODES = {
    "lambda 0.4": {},
    "lambda 0": {"proximal_weight": 0.0},
    "dual": {"prox_mode": "dual", "dual_epsilon": 0.01, "dual_learning_rate": 0.5},
    "published": {"compat": "prokt"},
    "teacher without dropout": {"teacher_dropout": False, "student_ce_weight": 0.5},
    "hidden states": {"alpha_layer": 0.5},
    "fixed teacher": {"teacher_learning_rate": 0.0},
    "bilstm": {"prox_mode": "dual", "dual_epsilon": 0.01, "dual_learning_rate": 0.5},
}


def student_of(mode, seed):
    if mode != "bilstm":
        return dense(seed, 0.1)
    torch.manual_seed(seed)
    return hc.BiLSTMForSequenceClassification(hc.BiLSTMConfig(
        vocab_size=99, embedding_size=16, hidden_size=8, num_layers=2, dropout=0.4, pad_token_id=0,
    ))  # fmt: skip


def ends(folder, mode, stops):
    """The weights of student and teacher, and what was logged, after a stop at each of these updates."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
               "weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 3, **MODES[mode]}  # fmt: skip

    def part(number, stop):
        # A resumed training takes both from the checkpoint, but a fixed teacher.
        seed = 1 if mode == "fixed teacher" else 1 + 10 * number
        trainer = trainer_of(
            "proximal", folder, student_of(mode, number), dense(seed, 0.1, num_hidden_layers=3), **options
        )
        trainer.train_dataset = [*ROWS, *ROWS[:2]]
        trainer.add_callback(Stop(stop))
        return trainer

    trainer = train_with_stops(part, folder, stops)
    assert trainer.state.global_step == UPDATES
    kept = {**weights(trainer.model), **{f"teacher {k}": v for k, v in weights(trainer.teacher_model).items()}}
    if trainer.projectors is not None:
        kept |= {f"map {k}": v for k, v in weights(trainer.projectors).items()}
    names = ("loss/output", "loss/teacher", "loss/proximal", "prox/beta", "teacher_learning_rate")
    last = next(entry for entry in trainer.state.log_history if entry["step"] == UPDATES and "loss" in entry)
    return kept, {name: last.get(name) for name in names}


@pytest.mark.parametrize("mode", [
    mode if mode in ("lambda 0.4", "bilstm") else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES
])  # fmt: skip
@pytest.mark.parametrize("patterns", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "many"])
def test_interruptions_leave_no_trace(tmp_path, mode, patterns):
    whole, logged = ends(tmp_path / "whole", mode, [])
    assert any(name.startswith("teacher ") for name in whole)
    for stops in patterns:
        found, seen = ends(tmp_path / "-".join(map(str, stops)), mode, stops)
        assert same(found, whole), stops
        assert seen == logged, stops


def test_heads_become_zero_once(tmp_path):
    """Not when a training goes on."""
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of("proximal", tmp_path / "whole", dense(0), dense(1), **options)
    trainer.train()
    heads = {}

    def look(update):
        heads[update] = [
            float(m.classifier.weight.detach().abs().max()) for m in (resumed.model, resumed.teacher_model)
        ]

    resumed = trainer_of("proximal", tmp_path / "again", dense(5), dense(6), look, learning_rate=0.0, **options)
    # With no learning rate for either, the heads in the end are those of the checkpoint.
    resumed.train(str(tmp_path / "whole" / "checkpoint-3"))
    assert min(heads[4]) > 1e-4


def test_a_training_after_a_resumed_one_keeps_what_was_learned(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trainer_of("proximal", tmp_path / "whole", dense(0), dense(1), **options).train()
    again = trainer_of("proximal", tmp_path / "again", dense(5), dense(6), **{**options, "max_steps": 4})
    again.train(str(tmp_path / "whole" / "checkpoint-3"))
    heads = [model.classifier.weight.detach().clone() for model in (again.model, again.teacher_model)]
    found = []
    learn = again.session.teacher.learn

    def look(window, student):
        found.append([model.classifier.weight.detach().clone() for model in (again.model, again.teacher_model)])
        return learn(window, student)

    again.session.teacher.learn = look
    again.args.max_steps = 1
    again.train()
    assert all(torch.equal(one, other) for one, other in zip(found[0], heads, strict=True))


def test_a_checkpoint_without_the_teacher_is_refused(tmp_path):
    plain = trainer_of("fixed", tmp_path / "plain", dense(0), dense(1), alpha_output=1.0, alpha_layer=0.0,
                       save_strategy="steps", save_steps=3)  # fmt: skip
    plain.train()
    trainer = trainer_of("proximal", tmp_path / "again", dense(0), dense(1))
    with pytest.raises(ValueError, match="must hold the teacher's state"):
        trainer.train(str(tmp_path / "plain" / "checkpoint-3"))


@pytest.mark.parametrize("damage", ["training_state.pt", "model.safetensors"])
def test_a_damaged_teacher_is_refused(tmp_path, damage):
    trainer = trainer_of("proximal", tmp_path, dense(0), dense(1), save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train()
    file = tmp_path / "checkpoint-3" / "teacher" / damage
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = trainer_of("proximal", tmp_path, dense(0), dense(1), max_steps=6)
    with pytest.raises(ValueError, match="teacher") as refused:
        again.train(str(tmp_path / "checkpoint-3"))
    assert "\n" not in str(refused.value)


def test_a_dual_checkpoint_goes_on_with_its_weight(tmp_path):
    options = {"prox_mode": "dual", "dual_epsilon": 0.0, "dual_learning_rate": 50.0, "save_strategy": "steps",
               "save_steps": 3}  # fmt: skip
    trainer = trainer_of("proximal", tmp_path, dense(0), dense(1), max_steps=3, **options)
    trainer.train()
    last = [entry["prox/beta"] for entry in trainer.state.log_history if "prox/beta" in entry][-1]
    assert last != 1.0
    again = trainer_of("proximal", tmp_path, dense(0), dense(1), max_steps=4, **{**options, "dual_learning_rate": 0.0})
    again.train(str(tmp_path / "checkpoint-3"))
    found = [entry["prox/beta"] for entry in again.state.log_history if entry["step"] == 4 and "prox/beta" in entry]
    assert found == pytest.approx([last])
