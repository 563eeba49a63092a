"""fp16: two models that are trained side by side each have a loss scale, a step and a schedule of their own."""

import math

import pytest
import torch

from tests.guided_setup import dense, linear, same, trainer_of, weights
from tests.half_precision import places, training_on


place = places()

# Plain AdamW: the fused one skips steps inside its kernel, which no schedule hears of.
OPTIONS = {"optim": "adamw_torch", "alpha_task": 1.0, "alpha_output": 1.0, "alpha_layer": 0.0}
LEARNERS = ["joint", "proximal"]


def options_of(kind):
    """A proximal trainer fixes the weight of the labels."""
    return {**OPTIONS, "alpha_task": 0.0} if kind == "proximal" else OPTIONS


def overflow(trainer, model, update):
    """Make one gradient of a model infinite in one update."""

    def infinite(gradient):
        return gradient * math.inf if trainer.state.global_step == update else gradient

    model.classifier.bias.register_hook(infinite)


def run(kind, folder, whose, place, **options):
    """A training of six updates, the third of which overflows; the weights after each."""
    seen = {"student": [], "teacher": []}
    student, teacher = linear(0, 0.1), dense(1, 0.1)

    def look(update):
        seen["student"].append(weights(student))
        seen["teacher"].append(weights(teacher))

    options = {**options_of(kind), **training_on(place, "fp16"), **options}
    trainer = trainer_of(kind, folder, student, teacher, look, **options)
    if whose:
        overflow(trainer, {"student": student, "teacher": teacher}[whose], 2)
    trainer.train()
    return trainer, seen


def counts(trainer):
    """Scale and steps of the schedule, of both models."""
    trained = trainer.session.teacher.trained
    return {
        "student": (trainer.accelerator.scaler.get_scale(), trainer.lr_scheduler.last_epoch),
        "teacher": (trained.accelerator.scaler.get_scale(), trained._schedule.last_epoch),
    }


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_an_overflow_skips_the_step_of_its_own_model_alone(tmp_path, place, kind, whose):
    trainer, seen = run(kind, tmp_path, whose, place)
    other = {"student": "teacher", "teacher": "student"}[whose]
    assert counts(trainer) == {whose: (2.0**15, 5), other: (2.0**16, 6)}
    stood = {name: [same(*pair) for pair in zip(seen[name], seen[name][1:], strict=False)] for name in seen}
    assert stood == {whose: [False, True, False, False, False], other: [False] * 5}


@pytest.mark.parametrize("kind", LEARNERS)
def test_without_an_overflow_both_scales_stay(tmp_path, place, kind):
    trainer, _ = run(kind, tmp_path, None, place)
    assert counts(trainer) == {"student": (2.0**16, 6), "teacher": (2.0**16, 6)}


def test_a_teacher_does_not_notice_that_its_student_overflowed(tmp_path, place):
    """Bit for bit: it learns from the labels alone."""
    ends = [run("joint", tmp_path / str(whose), whose, place)[1]["teacher"][-1] for whose in (None, "student")]
    assert same(*ends)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_the_fused_optimizer_stands_still_too(tmp_path, place, whose):
    """It skips the step in its kernel; the schedule goes on, as in transformers' own training."""
    trainer, seen = run("joint", tmp_path, whose, place, optim="adamw_torch_fused")
    other = {"student": "teacher", "teacher": "student"}[whose]
    assert {name: scale for name, (scale, _) in counts(trainer).items()} == {whose: 2.0**15, other: 2.0**16}
    stood = {name: [same(*pair) for pair in zip(seen[name], seen[name][1:], strict=False)] for name in seen}
    assert stood == {whose: [False, True, False, False, False], other: [False] * 5}


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_resumed_like_unbroken(tmp_path, place, kind, precision):
    """With dropout in both, mid-epoch, after both overflowed: weights, loss scales and schedules."""
    options = {**options_of(kind), **training_on(place, precision), "save_strategy": "steps", "save_steps": 3}

    def made(folder, seeds):
        student, teacher = linear(seeds[0], 0.1), dense(seeds[1], 0.1)
        trainer = trainer_of(kind, tmp_path / folder, student, teacher, **options)
        for model, update in ((student, 1), (teacher, 2)):
            if precision == "fp16":
                overflow(trainer, model, update)
        return trainer

    whole, again = made("whole", (0, 1)), made("again", (5, 6))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(weights(again.model), weights(whole.model))
    assert same(weights(again.teacher_model), weights(whole.teacher_model))
    if precision == "fp16":
        assert counts(whole) == counts(again) == {"student": (2.0**15, 5), "teacher": (2.0**15, 5)}


def test_a_published_turn_without_gradients_is_no_error(tmp_path, place):
    """On an epoch's partial window the published code steps in a turn in which it does not learn."""
    options = {**training_on(place, "fp16"), "compat": "cald", "teacher_update_cycle": 2, "optim": "adamw_torch"}
    # Windows of 3, 3 and 2 micro-batches, three times: gradients in the second, steps in the second and the third.
    trainer = trainer_of("joint", tmp_path, linear(0), dense(1), per_device_train_batch_size=4, **options)
    trainer.train()
    assert counts(trainer) == {"student": (2.0**16, 9), "teacher": (2.0**16, 6)}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_fixed_teacher_computes_as_its_student_does(tmp_path, place, precision):
    """Otherwise it would take several times as long as the student on a GPU."""
    student, teacher, seen = linear(0), dense(1), set()
    for network in (student, teacher):
        network.bert.encoder.layer[1].output.dense.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    options = {**OPTIONS, "alpha_layer": 1.0, "max_steps": 1, **training_on(place, precision)}
    trainer = trainer_of("fixed", tmp_path / "run", student, teacher, **options)
    trainer.train()
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert seen == {half}
    trainer.evaluate()
    assert seen == {half}


def test_a_cache_holds_the_answers_of_one_precision(tmp_path, place):
    options = {**OPTIONS, "teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    half, whole = training_on(place, "bf16"), training_on(place)
    trainer_of("fixed", tmp_path / "run", linear(0), dense(1), **options, **half).train()
    again = trainer_of("fixed", tmp_path / "run", linear(0), dense(1), **options, **half)
    again.train()
    assert (again.teacher_cache.hits > 0, again.teacher_cache.misses) == (True, 0)
    with pytest.raises(ValueError, match="teacher_cache_dir .* set of outputs"):
        trainer_of("fixed", tmp_path / "run", linear(0), dense(1), **options, **whole)
