"""Stages of token pruning in a Trainer: soft and hard, a target to reach, resumed runs, configs edited by hand."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import hf_compress as hc
from hf_compress.methods.token_pruning.control import relative_macs, scale_thresholds
from hf_compress.methods.token_pruning.modeling import thresholds_of


HEAD = "sequence_classification"


def arguments(folder, kind=TrainingArguments, **fields):
    return kind(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy=fields.pop("save_strategy", "no"), logging_steps=1, **fields,
    )  # fmt: skip


@pytest.fixture
def rows(sentences, tokenizer):
    return [{**tokenizer(text), "labels": label} for text, label in sentences]


def test_soft_and_hard_stage(model, rows, tokenizer, tmp_path):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02))
    start = thresholds_of(student).values.detach().clone()
    weights = student.base_model.encoder.layer[0].output.dense.weight.detach().clone()
    callback = hc.ThresholdAnnealingCallback(2e-3, 1e-4, lambda_threshold=0.1, learning_rate=1e-3)
    common = {"train_dataset": rows, "processing_class": tokenizer}
    trainer = hc.CompressionTrainer(
        student, arguments(tmp_path / "soft", max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-3),
        callbacks=[callback], **common,
    )  # fmt: skip
    trainer.train()
    moved = thresholds_of(student).values.detach()
    assert moved[0] == start[0] == 0
    assert (moved[1:] != start[1:]).all()
    assert (moved - start).abs().max() <= 1e-3 * 4 * 1.01
    assert not torch.equal(student.base_model.encoder.layer[0].output.dense.weight, weights)
    assert thresholds_of(student).temperature == pytest.approx(2e-3 * (1e-4 / 2e-3) ** (3 / 4))
    logged = [entry for entry in trainer.state.log_history if "loss/threshold" in entry]
    assert logged
    assert logged[0]["loss"] == pytest.approx(logged[0]["loss/task"] + logged[0]["loss/threshold"], rel=1e-4)
    trainer.save_model()

    hard = AutoModelForSequenceClassification.from_pretrained(tmp_path / "soft", masking_mode="hard")
    assert torch.equal(thresholds_of(hard).values, moved)
    other = hc.CompressionTrainer(hard, arguments(tmp_path / "x"), **common)
    with pytest.raises(ValueError, match="must be of the hard phase, got one of the soft phase. Open it"):
        other.train(resume_from_checkpoint=str(tmp_path / "soft" / "checkpoint-2"))
    second = hc.CompressionTrainer(
        hard, arguments(tmp_path / "hard", max_steps=3, learning_rate=1e-3, eval_strategy="no"),
        eval_dataset=rows[:16], **common,
    )  # fmt: skip
    second.train()
    assert second.state.global_step == 3
    assert torch.equal(thresholds_of(hard).values, moved)
    metrics = second.evaluate()
    macs, dense = 0.0, 0.0
    for row in rows[:16]:
        share = relative_macs(hard, {k: torch.tensor([row[k]]) for k in ("input_ids", "attention_mask")})
        length = len(row["input_ids"])
        cost = hc.count_cost(hard, length).macs
        macs, dense = macs + share * cost, dense + cost
    # An evaluation of the classifier only computes the first token in the last layer.
    assert metrics["eval_relative_macs"] <= macs / dense + 1e-6


def rate_of_thresholds(trainer):
    theta = thresholds_of(trainer.model).values
    return [
        group["initial_lr"] for group in trainer.optimizer.param_groups if any(p is theta for p in group["params"])
    ]


def test_thresholds_have_the_learning_rate_that_was_asked_for(model, rows, tokenizer, tmp_path):
    common = {"train_dataset": rows, "processing_class": tokenizer}
    config = hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02)
    callback = hc.ThresholdAnnealingCallback(learning_rate=3e-3)
    first = hc.CompressionTrainer(
        hc.compress(model("bert", HEAD), config), arguments(tmp_path, max_steps=1), callbacks=[callback], **common
    )
    first.train()
    assert rate_of_thresholds(first) == [3e-3]
    # Where it would be ignored, it is refused: a stock Trainer, and a callback that comes after the optimizer.
    late = hc.CompressionTrainer(hc.compress(model("bert", HEAD), config), arguments(tmp_path, max_steps=1), **common)
    late.create_optimizer()
    late.add_callback(hc.ThresholdAnnealingCallback(learning_rate=3e-3))
    student = hc.compress(model("bert", HEAD), config)
    stock = Trainer(student, arguments(tmp_path, max_steps=1), callbacks=[callback], **common)
    for trainer in (late, stock):
        with pytest.raises(ValueError, match="learning_rate must be given to the constructor of a trainer of this"):
            trainer.train()


def test_hand_edited_config_with_a_callback(model, rows, tokenizer, tmp_path):
    student = model("bert", HEAD)
    student.config.prune_mode, student.config.masking_mode = "absolute_threshold", "soft"
    callback = hc.ThresholdAnnealingCallback(learning_rate=3e-3)
    trainer = hc.CompressionTrainer(
        student, arguments(tmp_path, max_steps=1), train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    assert rate_of_thresholds(trainer) == [3e-3]


def test_switching_run_resumes_in_its_hard_stage(model, rows, tokenizer, tmp_path):
    final = []
    for stop in (None, 4):
        for resume in (False, True) if stop else (False,):
            config = hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02)
            folder = tmp_path / str(stop)
            if resume:
                student = AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-4")
                assert student.config.masking_mode == "hard"
            else:
                student = hc.compress(model("bert", HEAD), config)
            callbacks = [hc.ThresholdAnnealingCallback(learning_rate=1e-3), hc.StageSwitchCallback(0.5)]
            trainer = hc.CompressionTrainer(
                student, arguments(folder, max_steps=6, save_strategy="steps", save_steps=4), train_dataset=rows,
                processing_class=tokenizer, callbacks=callbacks,
            )  # fmt: skip
            if stop and not resume:
                trainer.add_callback(_StopAt(stop))
            trainer.train(resume_from_checkpoint=resume)
        final.append(student.state_dict())
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_resumed_soft_stage_equals_unbroken(model, rows, tokenizer, tmp_path):
    final = []
    for stop in (None, 3):
        config = hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02)
        for resume in (False, True) if stop else (False,):
            student = hc.compress(model("bert", HEAD), config)
            callbacks = [hc.ThresholdAnnealingCallback(2e-3, 1e-4, target_relative_macs=0.6, measure_every=2)]
            trainer = hc.CompressionTrainer(
                student, arguments(tmp_path / str(stop), max_steps=6, save_strategy="steps", save_steps=3),
                train_dataset=rows, processing_class=tokenizer, callbacks=callbacks,
            )  # fmt: skip
            if stop and not resume:
                trainer.add_callback(_StopAt(stop))
            trainer.train(resume_from_checkpoint=resume)
        final.append(student.state_dict())
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


@pytest.mark.parametrize("stop", [3, 5], ids=["soft", "hard"])
def test_resumed_run_to_a_target_equals_unbroken(model, rows, tokenizer, tmp_path, stop):
    final = []
    for name in ("unbroken", "stopped"):
        for resume in (False, True) if name == "stopped" else (False,):
            student = hc.compress(
                model("bert", HEAD), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02)
            )
            steer = hc.ThresholdAnnealingCallback(
                2e-3, 1e-4, target_relative_macs=0.8, measure_every=2, measure_examples=16
            )
            trainer = hc.CompressionTrainer(
                student, arguments(tmp_path / name, max_steps=7, save_strategy="steps", save_steps=stop),
                train_dataset=rows, processing_class=tokenizer, callbacks=[steer, hc.StageSwitchCallback(0.5)],
            )  # fmt: skip
            if name == "stopped" and not resume:
                trainer.add_callback(_StopAt(stop))
            trainer.train(resume_from_checkpoint=resume)
        final.append(student.state_dict())
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


@pytest.mark.parametrize("target", [0.9, 0.75, 0.6])
def test_thresholds_scaled_to_a_target(model, rows, tokenizer, target):
    student = hc.compress(model("bert"), hc.TokenPruningConfig(final_token_threshold=0.05))
    batch = dict(
        tokenizer.pad([{k: row[k] for k in ("input_ids", "attention_mask")} for row in rows], return_tensors="pt")
    )
    before = thresholds_of(student).values.detach().clone()
    factor = scale_thresholds(student, batch, target)
    assert torch.equal(thresholds_of(student).values, before * factor)
    # By another way: one example at a time, its own length.
    macs, dense = 0.0, 0.0
    plain = model("bert")
    for row in rows:
        one = {k: torch.tensor([row[k]]) for k in ("input_ids", "attention_mask")}
        macs += hc.count_cost(student, data=[one]).macs
        dense += hc.count_cost(plain, data=[one]).macs
    assert abs(macs / dense - target) <= 0.015
    assert scale_thresholds(student, batch, target) == 1  # It is there already.


def test_thresholds_that_no_factor_can_help_stay(model, rows, tokenizer, caplog):
    student = hc.compress(model("bert"), hc.TokenPruningConfig(final_token_threshold=0.05))
    batch = dict(
        tokenizer.pad([{k: row[k] for k in ("input_ids", "attention_mask")} for row in rows], return_tensors="pt")
    )
    before = thresholds_of(student).values.detach().clone()
    assert scale_thresholds(student, batch, 0.01) == 1
    assert torch.equal(thresholds_of(student).values, before)
    assert "No factor on the thresholds leaves 0.010" in caplog.text


@pytest.mark.parametrize("switch", [True, False], ids=["soft and hard", "soft alone"])
def test_a_training_ends_at_its_target(model, rows, tokenizer, tmp_path, switch):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.05))
    callbacks = [hc.ThresholdAnnealingCallback(target_relative_macs=0.7, measure_examples=len(rows))]
    callbacks += [hc.StageSwitchCallback(0.5)] if switch else []
    trainer = hc.CompressionTrainer(
        student, arguments(tmp_path, max_steps=4), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    assert abs(trainer.evaluate()["eval_relative_macs"] - 0.7) <= 0.015


def test_the_soft_stage_learns_under_its_target(model, rows, tokenizer, tmp_path):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.05))
    batch = dict(
        tokenizer.pad([{k: row[k] for k in ("input_ids", "attention_mask")} for row in rows], return_tensors="pt")
    )
    seen, ratios = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(relative_macs(model, batch))
            ratios.append(thresholds_of(model).values.detach()[1:] / thresholds_of(model).values.detach()[-1])

    callbacks = [
        hc.ThresholdAnnealingCallback(
            target_relative_macs=0.7, measure_every=1, measure_examples=len(rows), learning_rate=1e-3
        ),
        Watch(),
    ]
    trainer = hc.CompressionTrainer(
        student, arguments(tmp_path, max_steps=4), train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train()
    assert len(seen) == 4
    assert max(abs(found - 0.7) for found in seen) <= 0.015
    # What the layers are to each other is learned all the same.
    assert not torch.allclose(ratios[0], ratios[-1])


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_stage_switch_in_one_run(model, rows, tokenizer, tmp_path):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02))
    seen = []

    class Watch(_StopAt):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((model.config.masking_mode, thresholds_of(model).values.detach().clone()))

    callbacks = [hc.ThresholdAnnealingCallback(learning_rate=1e-3), hc.StageSwitchCallback(0.5), Watch(0)]
    trainer = hc.CompressionTrainer(
        student, arguments(tmp_path, max_steps=6), train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train()
    assert [mode for mode, _ in seen] == ["soft"] * 3 + ["hard"] * 3
    assert not torch.equal(seen[0][1], seen[2][1])
    assert all(torch.equal(seen[2][1], values) for _, values in seen[3:])
    assert student.config.token_prune_stage == "hard"


@pytest.mark.parametrize("kind", [hc.CompressionTrainer, Trainer])
def test_lambda_is_logged_in_time_for_trackers(model, rows, tokenizer, tmp_path, kind):
    seen = []

    class Tracker(TrainerCallback):
        """As those of `report_to`, which come before a user's callbacks."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(masking_mode="soft"))
    callbacks = [Tracker(), hc.ThresholdAnnealingCallback(lambda_threshold=0.2, lambda_warmup=0.5)]
    settings = arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=4)
    trainer = kind(
        student, settings, train_dataset=rows, eval_dataset=rows[:8], processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train()
    expected = [0.0, 0.1, 0.2, 0.2]
    assert [entry["prune/lambda"] for entry in trainer.state.log_history if "loss" in entry] == expected
    if kind is hc.CompressionTrainer:
        assert [entry["prune/lambda"] for entry in seen if "loss" in entry] == expected
    assert not any("prune/lambda" in entry for entry in seen if "eval_loss" in entry)


def test_callbacks_in_a_plain_trainer(model, rows, tokenizer, tmp_path):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.02))
    callbacks = [hc.ThresholdAnnealingCallback(1e-3, 1e-4), hc.StageSwitchCallback(0.5)]
    Trainer(
        student, arguments(tmp_path, max_steps=4), train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    ).train()
    assert student.config.masking_mode == "hard"
    with pytest.raises(ValueError, match="must train a model with token thresholds, got BertForSequence"):
        Trainer(model("bert", HEAD), arguments(tmp_path), train_dataset=rows, callbacks=callbacks)


def test_config_edited_by_hand_is_honoured(model, rows, tokenizer, tmp_path):
    model("bert", HEAD).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    edited = {**json.loads(file.read_text()), "prune_mode": "topk", "token_keep_rate": 0.2, "temperature": 1e-4}
    file.write_text(json.dumps(edited))
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    trainer = hc.CompressionTrainer(
        opened, arguments(tmp_path / "t", max_steps=1), train_dataset=rows, processing_class=tokenizer
    )
    assert hc.steps_of(opened)[0]["token_keep_rate"] == 0.2
    trainer.train()
    trainer.save_model()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "t")
    assert hc.steps_of(again)[0]["prune_mode"] == "topk"
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "t", token_keep_rate=0.9)
    assert hc.steps_of(other)[0]["token_keep_rate"] == 0.9
