"""Token pruning: removal equals masking, what is kept, training of thresholds, stages, the controller."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_compress as hc
from hf_compress.core.architectures import blocks_of
from hf_compress.core.layers import LiveTokens
from hf_compress.methods.token_pruning.control import relative_macs, scale_thresholds
from hf_compress.methods.token_pruning.importance import keep_above, keep_top, token_importance
from hf_compress.methods.token_pruning.modeling import thresholds_of
from hf_compress.methods.token_pruning.training import regularizer
from hf_compress.report.tokens import trace_tokens, write_token_page


HEAD = "sequence_classification"
ENCODERS = pytest.mark.parametrize("architecture", ["bert", "roberta", "electra", "distilbert"])
NEAR = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def pruned(model):
    """`pruned(architecture, head, **fields)`: a tiny double-precision model that drops tokens."""

    def make(architecture="bert", head=HEAD, **fields):
        return hc.compress(model(architecture, head).double(), hc.TokenPruningConfig(**fields))

    return make


def run(model, batch):
    state = LiveTokens()
    with torch.no_grad():
        return model(**batch, live_tokens=state).logits, state


def arguments(folder, kind=TrainingArguments, **fields):
    return kind(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy=fields.pop("save_strategy", "no"), logging_steps=1, **fields,
    )  # fmt: skip


@pytest.fixture
def rows(sentences, tokenizer):
    return [{**tokenizer(text), "labels": label} for text, label in sentences]


@ENCODERS
@pytest.mark.parametrize("fields", [
    {"final_token_threshold": 0.0}, {"prune_mode": "topk", "token_keep_rate": 1.0},
], ids=["threshold", "topk"])  # fmt: skip
def test_neutral_settings_are_the_dense_model(model, batches, architecture, fields):
    dense = model(architecture, HEAD).double()
    batch = batches(dense.config, count=1)[0]
    with torch.no_grad():
        expected = dense(**batch).logits
    same = hc.compress(copy.deepcopy(dense), hc.TokenPruningConfig(**fields))
    logits, state = run(same, batch)
    torch.testing.assert_close(logits, expected, **NEAR)
    for block in blocks_of(same)[:-1]:
        assert torch.equal(state.kept[block.index], batch["attention_mask"].bool())


def masked_logits(model, batch, decide):
    """Attention and pruning written out for one example at a time, with masks and without removing anything."""
    layers, logits, kept = [b.layer for b in blocks_of(model)], [], []
    embed = model.base_model.embeddings
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        hidden = embed(input_ids=ids[None])[0]
        live, initial, counts = mask.bool().clone(), int(mask.sum()), []
        for index, layer in enumerate(layers):
            own = layer.attention.self
            query, key, value = (
                f(hidden).unflatten(-1, (4, 8)).transpose(0, 1) for f in (own.query, own.key, own.value)
            )
            scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~live, -torch.inf)
            weights = scores.softmax(-1)
            context = (weights @ value).transpose(0, 1).flatten(1)
            received = weights.mean(0)[live].sum(0)
            keep = decide(index, received, live, initial)
            keep[0] = True
            live = live & keep
            hidden = layer.feed_forward_chunk(layer.attention.output(context, hidden))
            counts.append(int(live.sum()))
        kept.append(counts)
        logits.append(hidden)
    return torch.stack(logits), kept


@pytest.mark.parametrize("fields", [
    {"final_token_threshold": 0.014}, {"final_token_threshold": 0.05, "score_norm": "live"},
    {"final_token_threshold": 0.05, "scoring_mode": "mean_norm"},
    {"final_token_threshold": 0.05, "score_norm": "initial", "threshold_ramp": "one_based"},
], ids=["reference", "live", "mean_norm", "initial"])  # fmt: skip
def test_removal_equals_masking(pruned, batches, fields):
    model = pruned("bert", "token_classification", **fields)
    batch = batches(model.config, count=1)[0]
    theta = thresholds_of(model).values.tolist()
    norm = "live" if fields.get("scoring_mode") == "mean_norm" else fields.get("score_norm", "reference")

    def decide(index, received, live, initial):
        if theta[index] == 0:
            return live.clone()
        divisor = {"reference": 128, "live": int(live.sum()), "initial": initial}[norm]
        return received / divisor >= max(1e-5, theta[index])

    with torch.no_grad():
        hidden, expected = masked_logits(model, batch, decide)
        state = LiveTokens()
        ours = model.base_model(**batch, live_tokens=state).last_hidden_state
    counts = torch.stack([state.fed[i] for i in range(3)], 1).tolist()
    assert counts == expected
    assert any(row[-1] < row[0] for row in counts)
    final = state.kept[2]
    torch.testing.assert_close(ours[final], hidden[final], **NEAR)


@ENCODERS
@pytest.mark.parametrize("fields", [
    {"final_token_threshold": 0.012}, {"prune_mode": "topk", "token_keep_rate": -0.5},
], ids=["threshold", "topk"])  # fmt: skip
def test_masks_are_monotone_and_keep_the_first_token(pruned, batches, architecture, fields):
    model = pruned(architecture, **fields)
    batch = batches(model.config, count=1)[0]
    _, state = run(model, batch)
    before = batch["attention_mask"].bool()
    for block in blocks_of(model):
        after = state.kept[block.index]
        assert (after <= before).all()
        assert after[:, 0].all()
        assert torch.equal(state.fed[block.index], after.sum(1))
        before = after


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_and_padding_change_nothing(pruned, batches, size):
    model = pruned(final_token_threshold=0.014)
    batch = batches(model.config, count=1)[0]
    together, _ = run(model, batch)
    part = {name: value[:size] for name, value in batch.items()}
    torch.testing.assert_close(run(model, part)[0], together[:size], **NEAR)
    wider = {name: F.pad(value, (0, 9)) for name, value in part.items()}
    torch.testing.assert_close(run(model, wider)[0], together[:size], **NEAR)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(run(model, shuffled)[0], together[order], **NEAR)


def test_worked_example():
    probs = torch.tensor([[[[0.5, 0.3, 0.2, 0], [0.6, 0.2, 0.2, 0], [0.7, 0.2, 0.1, 0], [0.25] * 4]]])
    live = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(token_importance(probs, live, "live"), torch.tensor([[0.6, 0.7 / 3, 0.5 / 3, 0.0]]))
    expected = torch.tensor([[0.0140625, 0.00546875, 0.00390625, 0.0]])
    torch.testing.assert_close(token_importance(probs, live), expected)
    assert float(token_importance(probs, live, "live").sum()) == pytest.approx(1)


def test_ties():
    scores, live = torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.3]]), torch.ones(1, 5, dtype=torch.bool)
    assert keep_above(scores, live, 0.3).tolist() == [[True, True, True, True, True]]
    assert keep_top(scores, live, torch.tensor([3])).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("lengths", [[1, 2], [1, 1], [0, 3]])
def test_everything_prunable(pruned, lengths):
    model = pruned(final_token_threshold=3.0)
    thresholds_of(model).values.data.fill_(1.0)
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    logits, state = run(model, {"input_ids": torch.full((2, 4), 5), "attention_mask": mask})
    assert torch.isfinite(logits).all()
    assert state.kept[1].sum(1).tolist() == [min(1, length) for length in lengths]


def test_threshold_gradient_by_finite_differences(pruned, batches):
    model = pruned(masking_mode="soft", final_token_threshold=0.01).train()
    batch = {**batches(model.config, count=1, size=4)[0], "labels": torch.tensor([0, 1, 0, 1])}
    thresholds = thresholds_of(model).double()
    theta = thresholds.values

    def objective():
        state = LiveTokens()
        return model(**batch, live_tokens=state).loss + 0.1 * regularizer(state)

    objective().backward()
    assert theta.grad[0] == 0
    for layer in (1, 2):
        values = []
        for step in (1e-7, -1e-7):
            with torch.no_grad():
                theta[layer] += step
                values.append(float(objective()))
                theta[layer] -= step
        assert float(theta.grad[layer]) == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-5, abs=1e-7)


def test_regularizer_pushes_thresholds_up_and_ignores_padding(pruned, batches):
    model = pruned(masking_mode="soft", final_token_threshold=0.01).train()
    batch = batches(model.config, count=1)[0]
    gradients = []
    for extra in (0, 11):
        state = LiveTokens()
        model(**{name: F.pad(value, (0, extra)) for name, value in batch.items()}, live_tokens=state)
        (gradient,) = torch.autograd.grad(regularizer(state), thresholds_of(model).values)
        gradients.append(gradient)
    assert (gradients[0][1:] < 0).all()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


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
    with pytest.raises(ValueError, match="must be of the hard stage, got one of the soft stage. Open it"):
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


def test_editing_the_ramp_after_training_changes_nothing(pruned, batches, tmp_path):
    model = pruned(final_token_threshold=0.014)
    model.save_pretrained(tmp_path)
    batch = batches(model.config, count=1)[0]
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, final_token_threshold=0.5, dtype="auto")
    assert torch.equal(run(other, batch)[0], run(model, batch)[0])


@pytest.mark.parametrize(("fields", "text"), [
    ({"token_keep_rate": 1.1}, "token_keep_rate must be at most 1"),
    ({"final_token_threshold": -1.0}, "final_token_threshold must not be negative"),
    ({"temperature": 0.0}, "temperature must be positive"), ({"score_reference_length": 0}, "score_reference_length"),
    ({"prune_mode": "rising_threshold"}, "prune_mode must be one of"), ({"masking_mode": "mixed"}, "masking_mode"),
    ({"prune_mode": "topk", "masking_mode": "soft"}, "masking_mode must be 'hard' for prune_mode='topk'"),
])  # fmt: skip
def test_wrong_values(fields, text):
    with pytest.raises(ValueError, match=text):
        hc.TokenPruningConfig(**fields)


def test_linear_attention_and_token_pruning_refuse_each_other(model):
    first = hc.compress(model("bert"), hc.LinformerConfig(projected_length=4))
    with pytest.raises(ValueError, match="must have softmax attention, got a replaced one in layer 0"):
        hc.compress(first, hc.TokenPruningConfig())
    second = hc.compress(model("bert"), hc.TokenPruningConfig())
    with pytest.raises(ValueError, match="must have ordinary layers"):
        hc.compress(second, hc.LinformerConfig(projected_length=4))


def test_cost_on_data(pruned, batches):
    model = pruned(final_token_threshold=0.014)
    data = batches(model.config, count=2)
    s, d = 32, 32
    expected = total = 0.0
    for batch in data:
        state = LiveTokens(whole=True)
        with torch.no_grad():
            model(**batch, live_tokens=state)
        for layer in range(3):
            for a, f in zip(state.attended[layer].tolist(), state.fed[layer].tolist(), strict=True):
                expected += 4 * s * d * a + 2 * d * a * a + 2 * d * 64 * f
        total += len(batch["input_ids"])
    cost = hc.count_cost(model, data=data)
    assert cost.macs == pytest.approx(expected / total, rel=1e-12)
    dense = hc.count_cost(model, seq_len=24).macs
    assert cost.macs < dense


def test_page_of_surviving_words(model, tokenizer, tmp_path):
    student = hc.compress(model("bert", HEAD), hc.TokenPruningConfig(final_token_threshold=0.014))
    trace = trace_tokens(student, tokenizer, "the film was very good <b>")
    assert trace.tokens[0] == "[CLS]"
    assert [row[0] for row in trace.kept] == [True] * 3
    write_token_page(tmp_path / "page.html", [trace])
    page = (tmp_path / "page.html").read_text()
    assert page.count("class=kept") == sum(map(sum, trace.kept))
    assert "<b>" not in page
    with pytest.raises(ValueError, match="model must drop tokens"):
        trace_tokens(model("bert"), tokenizer, "good")


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 1.0), (0.4, 0.7659), (0.2, 0.6881)])
@pytest.mark.parametrize("kind", [RobertaModel, RobertaForSequenceClassification])
def test_published_relative_macs(kind, rate, expected):
    # RoBERTa-base, 40 tokens, specification 7.3: what the head of a classifier does not read is not counted as saved.
    config = RobertaConfig(vocab_size=99, max_position_embeddings=64)
    ids = torch.randint(5, 99, (1, 40))
    dense = kind(config).eval()
    before = hc.count_cost(dense, 40).macs
    pruned = hc.compress(dense, hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=rate))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    assert hc.count_cost(pruned, data=data).macs / before == pytest.approx(expected, abs=5e-5)
