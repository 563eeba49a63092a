"""Guided training where it touches something else: evaluation, trials, dropped tokens, zero weights."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

import hf_compress as hc
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.training.signals import WantedSignals
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, linear, logged, same, trainer_of, weights


def start_of(kind, saved_states):
    options = {"teacher_snapshots": [saved_states]} if kind == "snapshots" else {}
    return (None if kind == "snapshots" else dense(1, 0.1)), options


@pytest.mark.parametrize("kind", ["fixed", "joint", "snapshots"])
def test_evaluations_are_not_random(kind, tmp_path, saved_states):
    teacher, options = start_of(kind, saved_states)
    trainer = trainer_of(kind, tmp_path, linear(0, 0.1), teacher, teacher_dropout=True, **options)
    seen = [trainer.evaluate()["eval_loss/layer"] for _ in range(2)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    trainer.train()
    seen = [trainer.evaluate()["eval_loss/layer"] for _ in range(2)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["fixed", "joint", "snapshots"])
def test_every_trial_begins_anew(kind, tmp_path, saved_states):
    ends = []
    for trials in (1, 2):
        teacher, options = start_of(kind, saved_states)
        # What a search sets before it makes the student, which takes effect only when the teacher is made again.
        trainer = trainer_of(
            kind,
            tmp_path,
            None,
            teacher,
            alpha_layer=0.0,
            alpha_output=1.0,
            init=lambda: linear(0, 0.1),
            **options,
        )
        trainer.args.alpha_output, trainer.args.alpha_layer = 0.0, 1.0
        if kind == "joint":
            trainer.args.teacher_learning_rate = 1e-2
        for _ in range(trials):
            trainer.train()
        ends.append(weights(trainer.model))
        assert sorted(logged(trainer, "loss/layer")) == [1, 2, 3, 4, 5, 6]
        assert logged(trainer, "loss/output") == {}
    assert same(*ends)
    if kind == "joint":
        assert trainer.session.teacher.peak == 1e-2


def test_a_teacher_that_is_given_and_not_asked_never_runs(tmp_path):
    teacher, calls = dense(1), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = trainer_of("fixed", tmp_path, linear(), teacher, alpha_layer=0.0)
    trainer.train()
    trainer.evaluate()
    assert calls == []


def test_a_learning_teacher_without_weight_is_announced(tmp_path, caplog):
    trainer_of("joint", tmp_path, linear(), dense(1), alpha_layer=0.0)
    assert "alpha_output and alpha_layer are 0: no teacher learns and none is saved" in caplog.text


def test_dropped_tokens_are_not_compared(tmp_path):
    config = hc.TokenPruningConfig(final_token_threshold=0.25, score_reference_length=8)
    student = hc.compress(dense(num_hidden_layers=3), config)
    teacher = dense(1, num_hidden_layers=3)
    trainer = trainer_of("fixed", tmp_path, student, teacher, alpha_layer=1.0)
    batch = pad(ROWS[:8])
    student.train()
    found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    layer = trainer.losses.averages["train"].take()["loss/layer"]
    state = LiveTokens(whole=True)
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        ours = student(**inputs, forward_state=state, output_hidden_states=True).hidden_states[1:]
        theirs = teacher.eval()(**inputs, output_hidden_states=True).hidden_states[1:]
    expected = []
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        examples = [
            torch.stack([(one[row, column] - other[row, column]).square().mean() for column in kept.nonzero()[:, 0]])
            for row, kept in enumerate(state.kept_after(index))
        ]
        expected.append(torch.stack([values.mean() for values in examples]).mean())
    assert state.kept_after(1).sum() < batch["attention_mask"].sum()  # Some were dropped.
    assert layer == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert torch.isfinite(found[0])


def test_a_teacher_that_drops_tokens_shows_all_of_its_last_layer(tmp_path):
    teacher = hc.compress(dense(1), hc.TokenPruningConfig(final_token_threshold=0.0))
    trainer = trainer_of("fixed", tmp_path, dense(), teacher)
    batch = pad(ROWS[:4])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        outputs = dense(1).eval()(**inputs, output_hidden_states=True)
        expected = WantedSignals((2,), logits=False).of(outputs, inputs).hidden[0]
    live = batch["attention_mask"].bool()
    torch.testing.assert_close(trainer.session.teacher.forward(inputs).hidden[-1][live], expected[live])


def test_thresholds_and_weights_are_clipped_apart(tmp_path, monkeypatch):
    student = hc.compress(dense(), hc.TokenPruningConfig(masking_mode="soft"))
    trainer = hc.CompressionTrainer(
        student, hc.DistillationArguments(str(tmp_path), max_grad_norm=0.5, report_to="none", use_cpu=True),
        train_dataset=ROWS, data_collator=pad,
    )  # fmt: skip
    unscaled = []
    real = trainer.accelerator.clip_grad_norm_
    # With fp16 it takes the scale out of all gradients at every call.
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *a: unscaled.append(1) or real(*a))
    student.bert.token_thresholds.values.requires_grad_(True)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer._clip_grad_norm(student)
    thresholds = student.bert.token_thresholds.values
    others = torch.cat([p.grad.flatten() for p in student.parameters() if p is not thresholds])
    assert len(unscaled) == 1
    assert float(thresholds.grad.norm()) == pytest.approx(0.5, rel=1e-4)
    assert float(others.norm()) == pytest.approx(0.5, rel=1e-4)


def test_left_padding_is_right_in_a_compiled_model():
    model = hc.compress(
        dense(), hc.LinformerConfig(projected_length=4, slot_mask=True, initialization="pooling", length_scaling=False)
    ).eval()  # fmt: skip
    ids = torch.randint(5, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        eager = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.compiler.reset()
        compiled = torch.compile(model.bert, backend="eager")(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(compiled[mask.bool()], eager[mask.bool()])
    assert F.mse_loss(eager[0, 7:], model.bert(input_ids=ids[:1, 7:]).last_hidden_state[0]) > 0  # Positions differ.


def test_images_have_no_limit_of_tokens(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
             "image_size": 8, "patch_size": 4}  # fmt: skip
    student, teacher = (ViTForImageClassification(ViTConfig(**sizes)) for _ in range(2))
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": n % 2} for n, image in enumerate(images)]
    args = hc.DistillationArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, alpha_layer=1.0)
    hc.DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=rows).train()


class Many(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return ROWS[index % len(ROWS)]


@pytest.mark.parametrize(("count", "per_epoch", "total", "warm"), [
    (104_743, 3_274, 32_740, 1_964), (363_846, 11_371, 113_710, 6_823), (67_349, 2_105, 21_050, 1_263),
    (25_000, 782, 7_820, 469),
], ids=["qnli", "qqp", "sst2", "imdb"])  # fmt: skip
def test_published_steps_and_warm_up(tmp_path, count, per_epoch, total, warm):
    args = hc.JointTeacherArguments(
        str(tmp_path), per_device_train_batch_size=16, gradient_accumulation_steps=2, num_train_epochs=10,
        warmup_steps=warm, alpha_layer=1.0, alpha_output=0.0, report_to="none", use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = hc.JointTeacherTrainer(
        model=linear(), teacher_model=dense(1), args=args, train_dataset=Many(count), data_collator=pad
    )
    found = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert (per_epoch, total) == (found[1], found[-1])
    trainer.create_optimizer_and_scheduler(total)
    for scheduler in (trainer.lr_scheduler, trainer.session.teacher.trained._schedule):
        factor = scheduler.lr_lambdas[0]
        assert (factor(0), factor(warm), factor(total)) == (0, 1, 0)
        assert factor(warm - 1) < 1 > factor(warm + 1)


def test_a_teacher_without_a_head_is_named(tmp_path):
    teacher = dense(1).bert
    with pytest.raises(ValueError, match="A teacher that learns needs a loss, but BertModel gave none"):
        trainer_of("joint", tmp_path, linear(0), teacher).train()
    with pytest.raises(ValueError, match="The model must return logits, got BaseModelOutput"):
        trainer_of("fixed", tmp_path, linear(0), dense(1).bert, alpha_output=1.0).train()
