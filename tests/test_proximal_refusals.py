"""Mistakes with ProximalTrainer: one clear line before any work, and both models as they were."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

import hf_compress as hc
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, same, trainer_of, weights


NAN, INF = float("nan"), float("inf")

# Arguments -> what the line says.
ARGUMENTS = [
    ({"proximal_weight": 1.0}, r"proximal_weight must be at least 0 and below 1, got 1\.0"),
    ({"proximal_weight": -0.1}, r"proximal_weight .* got -0\.1"),
    ({"proximal_weight": NAN}, "proximal_weight .* got nan"),
    ({"teacher_learning_rate": -1e-5}, "teacher_learning_rate must be zero or positive, got -1e-05"),
    ({"teacher_learning_rate": NAN}, "teacher_learning_rate .* got nan"),
    ({"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
    ({"student_ce_weight": -1.0}, r"student_ce_weight must be zero or positive, got -1\.0"),
    ({"student_ce_weight": INF}, "student_ce_weight .* got inf"),
    ({"prox_mode": "duel"}, "prox_mode must be one of .* got 'duel'"),
    ({"proximal_direction": "both"}, "proximal_direction must be one of .* got 'both'"),
    ({"compat": "cald"}, "compat must be .*prokt.* got 'cald'"),
    ({"dual_epsilon": 0.1}, "dual_epsilon must be left out .*prox_mode"),
    ({"dual_beta": 2.0}, "dual_beta must be left out .*prox_mode"),
    ({"dual_learning_rate": 0.1}, "dual_learning_rate must be left out .*prox_mode"),
    ({"prox_mode": "dual", "dual_epsilon": -1.0}, "dual_epsilon must be zero or positive, got -1"),
    ({"prox_mode": "dual", "dual_beta": NAN}, "dual_beta must be zero or positive, got nan"),
    ({"prox_mode": "dual", "teacher_learning_rate": 0.0}, "prox_mode must be 'fixed' .*teacher_learning_rate"),
    ({"evaluate_teacher": True, "teacher_learning_rate": 0.0}, "evaluate_teacher .*teacher_learning_rate"),
    ({"alpha_task": 0.5}, "alpha_task must be left out, got 0.5: student_ce_weight"),
    ({"alpha_output": 0.5}, "alpha_output must be left out, got 0.5"),
    ({"compat": "prokt", "student_ce_weight": 0.5}, "student_ce_weight .*compat='prokt'"),
    ({"compat": "prokt", "optim": "sgd"}, "optim must be left out .*compat='prokt'"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type must not depend on a metric"),
    ({"teacher_cache_dir": "cache"}, "teacher_cache_dir must be unset"),
    ({"alpha_layer": -1.0}, "alpha_layer must be zero or positive"),
    ({"max_distill_steps": 3}, "max_distill_steps|alpha_task|student_ce_weight"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "says"), ARGUMENTS, ids=lambda value: str(value).replace(" ", ""))
def test_arguments(tmp_path, options, says):
    if options.get("lr_scheduler_type"):
        options = {**options, "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=says) as refused:
        hc.ProximalArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", **options)
    assert "\n" not in str(refused.value)


def test_arguments_are_checked_again_for_a_trial(tmp_path):
    args = hc.ProximalArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.proximal_weight = 1.5
    with pytest.raises(ValueError, match="proximal_weight"):
        args.check()


def named(names, seed=1):
    model = dense(seed, num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def frozen_head(seed):
    model = dense(seed)
    model.classifier.requires_grad_(False)
    return model


def sharing():
    student, teacher = dense(0), dense(1)
    teacher.bert.embeddings.word_embeddings.weight = student.bert.embeddings.word_embeddings.weight
    return student, teacher


def itself():
    student = dense(0)
    return student, student


def tied():
    config = GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0, bos_token_id=1,
                        eos_token_id=2)  # fmt: skip
    return GPT2LMHeadModel(config), GPT2LMHeadModel(config)


def lm_labels(features):
    batch = pad(features)
    return {**batch, "labels": batch["input_ids"]}


def unlabelled(features):
    batch = pad(features)
    del batch["labels"]
    return batch


# What is wrong -> the two models, the options of the trainer, and what the line says.
TRAININGS = {
    "no teacher": (lambda: (dense(0), None), {}, "teacher_model must be given"),
    "more labels": (lambda: (dense(0), dense(1, num_labels=3)), {}, "must have the student's 2 labels, got 3"),
    "other labels": (
        lambda: (named(["yes", "no"], 0), named(["cat", "dog"])), {}, "must have the student's labels .* got",
    ),
    "another order": (
        lambda: (named(["yes", "no"], 0), named(["no", "yes"])), {}, "must count its labels as the student does",
    ),
    "itself": (itself, {}, "teacher_model must be another object than model"),
    "shared weights": (sharing, {}, "share 1 parameters"),
    "another vocabulary": (
        lambda: (dense(0), dense(1, vocab_size=120)), {}, r"must read the student's vocabulary \(99 tokens\), got 120",
    ),
    "too short": (
        lambda: (dense(0), dense(1, max_position_embeddings=4)), {}, "The teacher must read inputs of .* tokens",
    ),
    "no labels": (lambda: (dense(0), dense(1)), {"collator": unlabelled}, "labels"),
    "no head": (lambda: (dense(0), BertModel(dense(1).config)), {}, "head|logits"),
    "output layer is the embeddings": (
        tied, {"collator": lm_labels}, "zero_init_heads must be False: the output layer of the student",
    ),
    "frozen output layer": (lambda: (frozen_head(0), dense(1)), {}, "zero_init_heads .* student"),
    "half a window": (
        lambda: (dense(0), dense(1)), {"compat": "prokt"}, "gradient_accumulation_steps must divide the 4 batches",
    ),
    "a folder without a model": (lambda: (dense(0), "nowhere/at/all"), {}, "teacher_model 'nowhere/at/all'"),
    "another width of hidden states": (
        lambda: (dense(0), dense(1)), {"alpha_layer": 1.0, "layer_map": [0]}, "layer_map",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TRAININGS)
def test_trainings(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    models, options, says = TRAININGS[mistake]
    student, teacher = models()
    kept = [weights(model) for model in (student, teacher) if isinstance(model, torch.nn.Module)]
    with pytest.raises(ValueError, match=says) as refused:
        trainer_of("proximal", tmp_path / "out", student, teacher, **options).train()
    assert "\n" not in str(refused.value)
    if mistake in ("no labels", "another vocabulary", "too short"):
        # Found with the first batch, when the heads were zero.
        return
    models = [model for model in (student, teacher) if isinstance(model, torch.nn.Module)]
    assert all(same(weights(model), before) for model, before in zip(models, kept, strict=True))


def test_without_zeros_tied_weights_are_fine(tmp_path):
    student, teacher = tied()
    trainer = trainer_of(
        "proximal", tmp_path, student, teacher, collator=lm_labels, zero_init_heads=False, max_steps=1
    )  # fmt: skip
    trainer.train()


def test_a_students_maker_needs_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="teacher_model must be given"):
        trainer_of("proximal", tmp_path, None, None, init=lambda: dense(0))


def test_other_arguments(tmp_path):
    with pytest.raises(ValueError, match="must be ProximalArguments or TrainingArguments, got dict"):
        hc.ProximalTrainer(dense(0), dense(1), {"output_dir": str(tmp_path)}, train_dataset=ROWS)
    given = hc.DistillationArguments(str(tmp_path), use_cpu=True, report_to="none", alpha_task=1.0)
    with pytest.raises(ValueError, match="ProximalArguments|alpha_task"):
        hc.ProximalTrainer(dense(0), dense(1), given, train_dataset=ROWS, data_collator=pad)


def test_the_teachers_own_folder_is_not_written_over(tmp_path):
    dense(1).save_pretrained(tmp_path / "out" / "teacher")
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teacher")
    trainer = trainer_of("proximal", tmp_path / "out", dense(0), teacher, save_teacher=True)
    with pytest.raises(ValueError, match="teacher"):
        trainer.train()
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teacher")
    assert same(weights(kept), weights(dense(1)))


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    teacher = dense(1)
    teacher.bert.embeddings.word_embeddings.weight.data[5:] = NAN
    trainer = trainer_of("proximal", tmp_path, dense(0), teacher)
    with pytest.raises(ValueError, match="The teacher's loss must be finite"):
        trainer.train()
