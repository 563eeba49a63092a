"""ProximalTrainer: against loops written by hand, and what must hold of it exactly."""

import copy
import math

import pytest
import torch

from hf_compress.training.teachers import Learner
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, logged, same, trainer_of, weights
from tests.proximal_by_hand import Walk, walk_by_hand, zero_heads_
from tests.rounding import assert_equal_to_rounding


def numbers(values, dtype=torch.float64):
    """Rows whose labels are numbers or lists of them, and a collator for a model in double precision."""
    rows = [{**row, "labels": values(row["input_ids"].tolist())} for row in ROWS]

    def collate(features):
        batch = pad(features)
        return {**batch, "labels": batch["labels"].to(dtype)}

    return rows, collate


# Kind of labels -> options of the models, rows and collator.
TASKS = {
    "classes": ({}, (ROWS, pad)),
    "regression": (
        {"num_labels": 1, "problem_type": "regression"}, numbers(lambda ids: math.sin(ids[0])),
    ),
    "labels": (
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        numbers(lambda ids: [float(ids[0] % k == 0) for k in (2, 3, 5)]),
    ),
}  # fmt: skip

HAND = {"temperature": 1.0, "weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 1.0}


def windows_of(rows, collate, size=8, accumulation=3, epochs=3):
    batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)] * epochs


def near(ours, theirs, atol):
    for name, value in theirs.state_dict().items():
        # The true gradient of a key bias is zero: Adam amplifies its rounding.
        if "key.bias" not in name:
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def far(ours, theirs):
    return max(float((ours.state_dict()[name] - value).abs().max()) for name, value in theirs.state_dict().items())


MODES = {
    "lambda 0.4": ({}, {}),
    "lambda 0": ({"proximal_weight": 0.0}, {"proximal_weight": 0.0}),
    "temperature": ({"temperature": 2.5}, {"temperature": 2.5}),
    "labels too": ({"student_ce_weight": 0.7}, {"student_ce_weight": 0.7}),
    "textbook direction": ({"proximal_direction": "teacher_student"}, {"reverse": True}),
    "dual": (
        {"prox_mode": "dual", "dual_epsilon": 0.02, "dual_beta": 0.5, "dual_learning_rate": 0.3},
        {"dual": (0.02, 0.5, 0.3)},
    ),
    "dual that ends at 0": (
        {"prox_mode": "dual", "dual_epsilon": 2.0, "dual_beta": 0.1, "dual_learning_rate": 0.1},
        {"dual": (2.0, 0.1, 0.1)},
    ),
    "published": ({"compat": "prokt", "gradient_accumulation_steps": 2}, {"published": True}),
    "published dual": (
        {"compat": "prokt", "gradient_accumulation_steps": 2, "prox_mode": "dual", "dual_epsilon": 0.02,
         "dual_beta": 0.5, "dual_learning_rate": 0.3},
        {"published": True, "dual": (0.02, 0.5, 0.3)},
    ),
}  # fmt: skip


COMBINATIONS = [
    *((mode, "classes") for mode in MODES), ("lambda 0.4", "regression"), ("lambda 0.4", "labels"),
    ("textbook direction", "regression"), ("textbook direction", "labels"), ("temperature", "labels"),
    ("dual", "regression"),
]  # fmt: skip
BRIEF = {
    *((mode, "classes") for mode in ("lambda 0.4", "lambda 0", "temperature", "dual", "published dual")),
    ("lambda 0.4", "regression"), ("textbook direction", "labels"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "task"),
    [pytest.param(*both, marks=[] if both in BRIEF else [pytest.mark.slow]) for both in COMBINATIONS],
)
def test_both_follow_the_loop_written_by_hand(tmp_path, mode, task):
    (options, by_hand), (sizes, (rows, collate)) = MODES[mode], TASKS[task]
    student, teacher = dense(0, **sizes).double(), dense(1, num_hidden_layers=3, **sizes).double()
    trainer = trainer_of(
        "proximal", tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), ordered=True, rows=rows,
        collator=collate, **{**HAND, **options},
    )  # fmt: skip
    assert isinstance(trainer.session.teacher, Learner)
    trainer.train()
    zero_heads_(student, teacher)
    windows = windows_of(rows, collate, accumulation=options.get("gradient_accumulation_steps", 3))
    walk = Walk(len(windows), weight_decay=0.1, warmup=2, **by_hand)
    seen = walk_by_hand(student, teacher, windows, walk, task)
    near(trainer.model, student, 1e-9)
    near(trainer.teacher_model, teacher, 1e-9)
    places, names = [len(window) for window in windows], {"output": "output", "teacher": "teacher"}
    if mode != "lambda 0":
        names |= {"teacher_task": "teacher_task", "proximal": "proximal"}
    for name, key in names.items():
        means = [sum(part) / len(part) for part in torch.tensor(seen[name], dtype=torch.float64).split(places)]
        found = logged(trainer, f"loss/{key}")
        torch.testing.assert_close(list(found.values()), [float(mean) for mean in means], rtol=0, atol=2e-6)


def test_the_weight_of_dual_is_logged(tmp_path):
    options, by_hand = MODES["dual"]
    student, teacher = dense(0).double(), dense(1).double()
    trainer = trainer_of(
        "proximal", tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), ordered=True, **{**HAND, **options}
    )
    trainer.train()
    zero_heads_(student, teacher)
    windows = windows_of(ROWS, pad)
    seen = walk_by_hand(student, teacher, windows, Walk(len(windows), weight_decay=0.1, warmup=2, **by_hand))
    # As learning rates are logged: that of the next update.
    found = list(logged(trainer, "prox/beta").values())
    assert len(found) == 6
    torch.testing.assert_close(found[:-1], seen["beta"][1:], rtol=0, atol=2e-6)
    assert len({round(value, 6) for value in found}) == 6


@pytest.mark.parametrize("mode", [pytest.param("lambda 0.4", marks=pytest.mark.slow), "dual"])
def test_accumulated_micro_batches_are_one_large_batch(tmp_path, mode):
    """Of 24 rows, as 3 times 8 and as 24: the steps of plain gradient descent are the same."""
    ends = []
    for number, (size, accumulation) in enumerate(((8, 3), (24, 1))):
        trainer = trainer_of(
            "proximal", tmp_path / str(number), dense(0).double(), dense(1).double(), ordered=True, rows=ROWS[:24],
            optim="sgd", learning_rate=0.5, teacher_learning_rate=0.3, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, **MODES[mode][0],
        )  # fmt: skip
        trainer.train()
        ends.append(trainer)
    near(ends[0].model, ends[1].model, 1e-12)
    near(ends[0].teacher_model, ends[1].teacher_model, 1e-12)
    assert far(ends[0].model, dense(0).double()) > 1e-2


def test_a_teacher_that_does_not_learn_is_plain_distillation(tmp_path):
    """Dropout in both: bit for bit, and the teacher stays as it was, its head too."""
    student, teacher = dense(0, 0.1), dense(1, 0.1)
    kept = weights(teacher)
    options = {"temperature": 1.5, "weight_decay": 0.1}
    walking = trainer_of(
        "proximal", tmp_path / "a", copy.deepcopy(student), teacher, teacher_learning_rate=0.0, student_ce_weight=0.3,
        **options,
    )  # fmt: skip
    walking.train()
    zero_heads_(student)
    plain = trainer_of(
        "fixed", tmp_path / "b", student, dense(1, 0.1), alpha_task=0.3, alpha_output=1.0, alpha_layer=0.0, **options
    )
    plain.train()
    assert same(weights(walking.model), weights(plain.model))
    assert same(weights(walking.teacher_model), kept)
    assert torch.count_nonzero(kept["classifier.weight"])
    assert not logged(walking, "loss/teacher")


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_without_the_pull_the_teacher_does_not_depend_on_its_student(tmp_path, dropout):
    ends = []
    students = (dense(0, 0.1), dense(5, 0.3, num_hidden_layers=1))
    for number, student in enumerate(students):
        trainer = trainer_of("proximal", tmp_path / str(number), student, dense(1, dropout), proximal_weight=0.0)
        trainer.train()
        ends.append(weights(trainer.teacher_model))
        assert not logged(trainer, "loss/proximal")
    assert same(*ends)
    # It is the teacher that JointTeacherTrainer would have trained.
    teacher = dense(1, dropout)
    zero_heads_(teacher)
    trainer = trainer_of("joint", tmp_path / "joint", dense(0), teacher, alpha_output=1.0, alpha_layer=0.0)
    trainer.train()
    assert same(weights(trainer.teacher_model), ends[0])


@pytest.mark.slow
def test_with_the_pull_it_does(tmp_path):
    ends = []
    for number, student in enumerate((dense(0), dense(5))):
        trainer = trainer_of("proximal", tmp_path / str(number), student, dense(1), proximal_weight=0.3)
        trainer.train()
        ends.append(trainer.teacher_model)
    assert far(*ends) > 1e-4


def test_the_student_learns_from_the_teacher_after_its_step(tmp_path):
    student, teacher = dense(0).double(), dense(1).double()
    trainer = trainer_of("proximal", tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), ordered=True,
                         weight_decay=0.0)  # fmt: skip
    trainer.train()
    zero_heads_(student, teacher)
    windows = windows_of(ROWS, pad)
    walk_by_hand(student, teacher, windows, Walk(len(windows), stale=True))
    # The teacher walks near the student: a stale one is another teacher, too.
    assert far(trainer.model, student) > 1e-2


def test_near_one_the_teacher_stays_with_its_student(tmp_path):
    """Both say nothing in the beginning, so that there is nothing to learn."""
    trainer = trainer_of("proximal", tmp_path, dense(0), dense(1), proximal_weight=1 - 1e-6, optim="sgd",
                         learning_rate=0.5, teacher_learning_rate=0.5)  # fmt: skip
    trainer.train()
    assert max(logged(trainer, "loss/proximal").values()) < 1e-9
    trainer.teacher_model.eval()
    with torch.no_grad():
        logits = trainer.teacher_model(**pad(ROWS)).logits
    assert float(logits.abs().max()) < 1e-4


def test_evaluation_leaves_both_as_they_are(tmp_path):
    """It reads the student alone, and gives the plain loss on the labels."""
    student, teacher = dense(0, 0.1), dense(1, 0.1)
    trainer = trainer_of("proximal", tmp_path, student, teacher)
    asked = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    for training in (True, False):
        student.train(training)
        teacher.train(training)
        before = weights(student), weights(teacher), torch.get_rng_state()
        metrics = trainer.evaluate()
        assert same(weights(student), before[0])
        assert same(weights(teacher), before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
        assert teacher.training is training
    student.eval()
    with torch.no_grad():
        expected = student(**pad(ROWS[:8])).loss
    assert_equal_to_rounding(torch.tensor(metrics["eval_loss"]), expected)
    assert asked == []


def test_evaluations_do_not_change_the_training(tmp_path):
    ends = []
    for number, options in enumerate(({}, {"eval_strategy": "steps", "eval_steps": 1, "evaluate_teacher": True})):
        trainer = trainer_of("proximal", tmp_path / str(number), dense(0, 0.1), dense(1, 0.1), **options)
        trainer.train()
        ends.append((weights(trainer.model), weights(trainer.teacher_model)))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_the_teacher_is_evaluated_under_its_own_prefix(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "evaluate_teacher": True}
    trainer = trainer_of("proximal", tmp_path, dense(0), dense(1), **options)
    trainer.train()
    teacher, student = (logged(trainer, f"eval_{name}loss") for name in ("teacher_", ""))
    assert sorted(teacher) == sorted(student) == [3, 6]
    for model, found in ((trainer.teacher_model, teacher), (trainer.model, student)):
        model.eval()
        with torch.no_grad():
            expected = model(**pad(ROWS[:8])).loss
        assert_equal_to_rounding(torch.tensor(found[6]), expected)
    assert abs(teacher[6] - student[6]) > 1e-4


def test_saved_folders_give_student_and_teacher(tmp_path):
    trainer = trainer_of("proximal", tmp_path, dense(0), dense(1, num_hidden_layers=3), save_teacher=True,
                         save_strategy="steps", save_steps=6)  # fmt: skip
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-6"):
        student = type(trainer.model).from_pretrained(folder)
        teacher = type(trainer.teacher_model).from_pretrained(folder / "teacher")
        assert same(weights(student), weights(trainer.model))
        assert same(weights(teacher), weights(trainer.teacher_model))
    assert not any("teacher" in name for name in trainer.model.state_dict())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in trainer.teacher_model.parameters()}


def test_hidden_states_beside_the_outputs(tmp_path):
    teacher = dense(1, num_hidden_layers=3, hidden_size=32)
    trainer = trainer_of("proximal", tmp_path, dense(0), teacher, alpha_layer=0.5)
    assert trainer.projectors is not None
    before = copy.deepcopy(trainer.projectors.state_dict())
    trainer.train()
    found = logged(trainer, "loss/layer")
    assert len(found) == 6
    assert found[6] < found[1]
    assert not same(dict(before), weights(trainer.projectors))


def test_the_student_is_untouched_by_the_teachers_step(tmp_path):
    """No gradient reaches the other model: after the teacher learned, the student has none, and the reverse."""
    student, teacher = dense(0, 0.1), dense(1, 0.1)
    trainer = trainer_of("proximal", tmp_path, student, teacher, max_steps=2)
    learn, found = trainer.session.teacher.learn, []

    def watched(window, answers):
        assert all(p.grad is None or not p.grad.any() for p in student.parameters())
        before = weights(student)
        outcome = learn(window, answers)
        found.append(same(before, weights(student)))
        assert all(p.grad is None or not p.grad.any() for p in [*student.parameters(), *teacher.parameters()])
        return outcome

    trainer.session.teacher.learn = watched
    trainer.train()
    assert found == [True, True]
    assert all(p.grad is None or not p.grad.any() for p in teacher.parameters())


def test_what_a_user_sees_in_the_log(tmp_path):
    trainer = trainer_of("proximal", tmp_path, dense(0), dense(1), student_ce_weight=0.5)
    trainer.train()
    first, last = (entry for entry in trainer.state.log_history if entry.get("loss") and entry["step"] in (1, 6))
    expected = {"loss/output", "loss/task", "loss/teacher", "loss/teacher_task", "loss/proximal"}
    assert {name for name in first if name.startswith("loss/")} == expected
    assert "prox/beta" not in first
    assert first["teacher_learning_rate"] == pytest.approx(3e-3 * 5 / 6)
    assert first["loss/teacher"] == pytest.approx(0.6 * first["loss/teacher_task"] + 0.4 * first["loss/proximal"])
    assert first["loss/teacher_task"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["teacher_learning_rate"] == 0
