"""Guided conversion: which teacher speaks at which update, what it learns, and that a killed run ends the same."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.training.signals import WantedSignals
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, linear, logged, same, trained, trainer_of, weights


@pytest.mark.parametrize(("teacher_dropout", "floor"), [(True, 0.2222), (False, 0.1111)])
def test_dropout_alone_makes_a_noise_floor(tmp_path, teacher_dropout, floor):
    sizes = {"num_hidden_layers": 1, "hidden_size": 64}
    student, teacher = dense(0, 0.1, **sizes), dense(0, 0.1, **sizes)
    trainer = trainer_of("fixed", tmp_path, student, teacher, compat="cald")
    trainer.session.layer_term.pairs, trainer.session.teacher.wanted = [(0, 0)], WantedSignals((0,), logits=False)
    trainer.session.teacher.dropout = teacher_dropout
    ids = torch.randint(5, 99, (32, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    with torch.no_grad():
        power = float(student.eval().bert.embeddings(ids).square().mean())
        student.train()
        seen = torch.stack([trainer.loss_terms(student, batch)[0]["layer"] for _ in range(12)]).mean()
    assert float(seen) / power == pytest.approx(floor, rel=0.02)
    # The floor is dropout's alone.
    student.eval()
    assert float(trainer.loss_terms(student, batch)[0]["layer"].detach()) == pytest.approx(0, abs=1e-10)


def test_padding_counts_only_in_the_published_loss(tmp_path):
    student, teacher = linear(0).double(), dense(1).double()
    batch = pad(ROWS[:8])
    width = batch["input_ids"].shape[1]
    wide = {name: F.pad(value, (0, width)) if name != "labels" else value for name, value in batch.items()}
    found = {}
    for name, options in {"cald": {"compat": "cald"}, "masked": {}}.items():
        trainer = trainer_of("fixed", tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), **options)
        found[name] = [float(trainer.loss_terms(trainer.model, x)[0]["layer"].detach()) for x in (batch, wide)]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher))
    everything = sum(float((a - b).square().mean()) for a, b in zip(ours, theirs, strict=True))
    live = 0.0
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        for row in range(8):
            count = int(batch["attention_mask"][row].sum())
            live += float((a[row, :count] - b[row, :count]).square().mean()) / 8 / 2
    assert found["cald"][0] == pytest.approx(everything, rel=1e-12)
    assert abs(found["cald"][1] / found["cald"][0] - 1) > 1e-3
    assert found["masked"] == pytest.approx([live, live], rel=1e-12)


def test_output_term_of_two_classes(tmp_path):
    student, teacher = linear(0).double(), dense(1).double()
    trainer = trainer_of("fixed", tmp_path, student, teacher, alpha_output=1.0, alpha_layer=0.0, temperature=2.0)
    batch = pad(ROWS[:8])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = 0.0
    for a, b in zip(teacher(**inputs).logits.tolist(), student(**inputs).logits.tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-(x[0] - x[1]) / 2)) for x in (a, b))
        expected += 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 8
    assert float(trainer.loss_terms(student, batch)[0]["output"].detach()) == pytest.approx(expected, rel=1e-12)
    trainer.teacher_model.load_state_dict(dense(0).double().state_dict())
    trainer.model = dense(0).double()
    assert abs(float(trainer.loss_terms(trainer.model, batch)[0]["output"].detach())) < 1e-15


@pytest.mark.parametrize("kind", ["fixed", "joint"])
def test_no_student_loss_reaches_the_teacher(tmp_path, kind):
    teacher = dense(1)
    trainer = trainer_of(kind, tmp_path, linear(0), teacher, alpha_output=1.0)
    teacher.requires_grad_(True)
    marks = {name: torch.full_like(p, 3.0) for name, p in teacher.named_parameters()}
    for name, parameter in teacher.named_parameters():
        parameter.grad = marks[name].clone()
    trainer.compute_loss(trainer.model, pad(ROWS[:8])).backward()
    assert all(torch.equal(p.grad, marks[name]) for name, p in teacher.named_parameters())
    assert all(p.grad is not None for name, p in trainer.model.named_parameters() if "pooler" not in name)


def test_hybrid_between_unguided_and_target_guided(tmp_path):
    def run(teacher=True, **options):
        calls, given = [], dense(1, 0.1) if teacher else None
        trainer = trainer_of("fixed", tmp_path, linear(0, 0.1), given, teacher_dropout=True, **options)
        if teacher:
            given.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
        trainer.train()
        return weights(trainer.model), sorted(logged(trainer, "loss/layer")), calls

    unguided, none, _ = run(teacher=False, alpha_layer=0.0)
    target, all_steps, calls = run()
    assert none == []
    assert all_steps == [1, 2, 3, 4, 5, 6]
    assert calls == [s for s in range(6) for _ in range((3, 1)[s % 2])]
    assert not same(unguided, target)
    for limit, twin in ((0, [True, False]), (6, [False, True]), (7, [False, True]), (4, [False, False])):
        ends, steps, calls = run(max_distill_steps=limit)
        assert steps == [1, 2, 3, 4, 5, 6][:limit]
        assert calls == [s for s in range(min(limit, 6)) for _ in range((3, 1)[s % 2])]
        assert [same(ends, other) for other in (unguided, target)] == twin


def test_changing_teachers_stop_with_the_hybrid_too(tmp_path, saved_states):
    teacher, seen = dense(1), []
    trainer = trainer_of("joint", tmp_path, linear(0), teacher, lambda _: seen.append(weights(teacher)),
                         max_distill_steps=2)  # fmt: skip
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    assert set(calls) == {0, 1}
    assert not same(seen[0], seen[1])
    assert same(seen[1], seen[5])
    trainer = trainer_of("snapshots", tmp_path, linear(0), max_distill_steps=1, teacher_snapshots=[saved_states])
    trainer.train()
    assert same(weights(trainer.teacher_model), weights(dense(11)))
    assert sorted(logged(trainer, "loss/layer")) == [1]
    for kind, options in (("joint", {}), ("snapshots", {"teacher_snapshots": [saved_states]})):
        assert trainer_of(kind, tmp_path, linear(0), alpha_layer=0.0, **options).teacher_model is None


def fine_tune(model, rate, warmup, total, cycle=1, accumulation=3, clip=1.0, decay=0.1):
    """Written by hand: AdamW, linear warm-up and decay, clipping; only every `cycle`-th update is taken."""
    named = list(model.named_parameters())
    kept = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
    others = [p for name, p in named if not (name.endswith("bias") or "LayerNorm" in name)]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}])
    batches = [pad(ROWS[start : start + 8]) for start in range(0, 30, 8)]
    done = update = 0
    for _ in range(3):
        for start in range(0, len(batches), accumulation):
            update += 1
            if update % cycle:
                continue
            factor = done / warmup if done < warmup else (total - done) / (total - warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            micro = batches[start : start + accumulation]
            for batch in micro:
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                (F.cross_entropy(logits, batch["labels"]) / len(micro)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    return model


@pytest.mark.parametrize(("cycle", "accumulation"), [(1, 3), (1, 1), (2, 3), (3, 1), (4, 3)])
def test_teacher_ends_where_fine_tuning_alone_ends(tmp_path, cycle, accumulation):
    teacher, updates = dense(1).double(), 6 if accumulation == 3 else 12
    start = weights(teacher)
    trained(
        "joint", tmp_path, linear(0).double(), teacher, ordered=True, gradient_accumulation_steps=accumulation,
        weight_decay=0.1, warmup_steps=2, teacher_update_cycle=cycle, alpha_layer=5.0, alpha_output=1.0,
    )  # fmt: skip
    alone = fine_tune(dense(1).double(), 3e-3, 2 // cycle, updates // cycle, cycle, accumulation)
    for name, value in weights(alone).items():
        # The true gradient of a key bias is zero: Adam amplifies its rounding.
        near = {"rtol": 0, "atol": 1e-10 if "key.bias" in name else 1e-12}
        torch.testing.assert_close(teacher.state_dict()[name], value, **near, msg=name)
    assert not same(weights(teacher), start)


def test_teacher_does_not_notice_its_student(tmp_path):
    ends = []
    for seed, options in ((0, {}), (7, {"alpha_layer": 9.0, "eval_strategy": "steps", "eval_steps": 2})):
        teacher = dense(1, 0.1)
        student = linear(seed, 0.3, share="layer" if seed else "none")
        trained("joint", tmp_path, student, teacher, ordered=True, **options)
        ends.append(weights(teacher))
    assert same(*ends)
    still = dense(1, 0.1)
    trained("joint", tmp_path, linear(0, 0.3), still, ordered=True, seed=4)
    assert not same(weights(still), ends[0])  # Its dropout follows the seed, so it was on.


@pytest.mark.parametrize("options", [{"teacher_learning_rate": 0.0}, {"teacher_update_cycle": 7}])
def test_a_teacher_that_never_learns_is_a_fixed_one(tmp_path, options):
    teacher = dense(1)
    seen = trained("joint", tmp_path, linear(0, 0.1), teacher, weight_decay=0.1, teacher_dropout=False, **options)
    assert same(weights(teacher), weights(dense(1)))
    assert same(seen, trained("fixed", tmp_path, linear(0, 0.1), dense(1), weight_decay=0.1))
    assert not same(seen, trained("joint", tmp_path, linear(0, 0.1), dense(1), weight_decay=0.1))


@pytest.mark.parametrize(("cycle", "turns"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [3, 6]), (4, [4])])
def test_the_turn_of_the_teacher(tmp_path, cycle, turns):
    """Two updates an epoch: counting from each epoch's start, cycles of 3 and 4 would never come."""
    teacher = dense(1)
    states, seen = [weights(teacher)], []

    def look(step):
        if not same(states[-1], weights(teacher)):
            seen.append(step)
        states.append(weights(teacher))

    trainer = trainer_of("joint", tmp_path, linear(0), teacher, look, teacher_update_cycle=cycle)
    trainer.train()
    assert seen == turns
    assert sorted(logged(trainer, "loss/teacher")) == turns


def test_targets_come_from_before_the_step(tmp_path):
    teacher = dense(1)
    trainer = trainer_of("joint", tmp_path, linear(0).double(), teacher.double(), ordered=True, max_steps=1)
    student, reference, found = copy.deepcopy(trainer.model), copy.deepcopy(teacher), []
    trainer.train()
    assert not same(weights(teacher), weights(reference))
    with torch.no_grad():
        for start in (0, 8, 16):
            batch = {k: v for k, v in pad(ROWS[start : start + 8]).items() if k != "labels"}
            ours, theirs = (m(**batch, output_hidden_states=True).hidden_states[1:] for m in (student, reference))
            for row, live in enumerate(batch["attention_mask"].bool()):
                pairs = zip(ours, theirs, strict=True)
                found.append(sum(float((a[row][live] - b[row][live]).square().mean()) for a, b in pairs) / 2)
    assert logged(trainer, "loss/layer")[1] == pytest.approx(sum(found) / 24, abs=1e-6)


@pytest.mark.parametrize(("schedule", "warmup", "total"), [("own", 2, 6), ("stretched", 4, 12)])
def test_learning_rate_of_the_teacher(tmp_path, schedule, warmup, total):
    trainer = trainer_of(
        "joint", tmp_path, linear(0), dense(1), gradient_accumulation_steps=1, warmup_steps=4, teacher_update_cycle=2,
        teacher_schedule=schedule, teacher_learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    rates = logged(trainer, "teacher_learning_rate")
    assert sorted(rates) == list(range(1, 13))
    for step, rate in rates.items():
        done = step // 2
        factor = done / warmup if done < warmup else (total - done) / (total - warmup)
        assert rate == pytest.approx(0.5 * factor, abs=1e-12)
    assert rates[12] == (0 if schedule == "own" else pytest.approx(0.375))


def test_the_trained_teacher_is_saved(tmp_path):
    teacher = dense(1)
    trained("joint", tmp_path / "a", linear(0), teacher, save_teacher=True)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "teacher")
    assert same(weights(found), weights(teacher))
    assert not same(weights(found), weights(dense(1)))
    trained("joint", tmp_path / "b", linear(0), dense(1))
    assert not (tmp_path / "b" / "teacher").exists()


@pytest.mark.parametrize(("options", "text"), [
    ({"teacher_learning_rate": -1e-5}, "teacher_learning_rate must be zero or positive, got -1e-05"),
    ({"teacher_learning_rate": float("nan")}, "teacher_learning_rate"),
    ({"teacher_update_cycle": 0}, "teacher_update_cycle must be at least 1, got 0"),
    ({"teacher_schedule": "other"}, "teacher_schedule must be"),
    ({"teacher_cache_dir": "x"}, "teacher_cache_dir must be unset"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}, "depend on a metric"),
])  # fmt: skip
def test_wrong_arguments_of_a_learning_teacher(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        hc.JointTeacherArguments(str(tmp_path), use_cpu=True, **options)
