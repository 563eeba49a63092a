"""Losses of next tokens: from the head a chunk at a time, counted per predicted token, with common vocabularies."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_compress as hc
from hf_compress.training import token_losses
from hf_compress.training.language_head import LanguageHead, language_head
from tests import language_program as program
from tests.distributed_program import double_precision
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


HEADS = ("gpt2", "llama", "llama, tied", "phi", "gemma2", "granite", "cohere")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four tokens in a chunk."""
    monkeypatch.setattr(token_losses, "CHUNK", 4 * program.WORDS)


def distilling(tmp_path, student, teacher, trainer_class=hc.DistillationTrainer, **options):
    args = trainer_class.arguments_class(
        str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="no", **options,
    )  # fmt: skip
    return trainer_class(
        copy.deepcopy(student), copy.deepcopy(teacher), args, train_dataset=program.windows(4),
        eval_dataset=program.windows(4), data_collator=program.collate,
    )  # fmt: skip


def loss_and_gradients(trainer, batch, whole):
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, batch, return_outputs=whole)
    loss = loss[0] if whole else loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Sums of losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "scale", "cap"), [(1.0, 1.0, None), (3.0, 0.25, None), (20.0, 2.0, 5.0)])
@pytest.mark.parametrize("again", [(1.0, 1.0), (2.0, 0.5)])
def test_sums_and_gradients_are_those_of_all_logits_at_once(temperature, scale, cap, again):
    with double_precision():
        torch.manual_seed(0)
        layer, hidden = nn.Linear(7, program.WORDS), torch.randn(11, 7, requires_grad=True)
        targets, teacher = torch.randint(program.WORDS, (11,)), 3 * torch.randn(11, program.WORDS)
        weights, again = (0.7, 0.4), torch.tensor(again)
    logits = layer(hidden) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    p, q = (torch.log_softmax(each / temperature, -1) for each in (teacher, logits))
    expected = torch.stack(
        [0.7 * F.cross_entropy(logits, targets, reduction="sum"), 0.4 * temperature**2 * (p.exp() * (p - q)).sum()]
    )
    inputs = [hidden, layer.weight, layer.bias]
    slopes = torch.autograd.grad((expected * again).sum(), inputs)
    head = LanguageHead(layer, scale, cap)
    losses = token_losses.TokenLosses(targets, lambda tokens: teacher[tokens], temperature, weights)
    found = token_losses.summed_over_tokens(hidden, head, losses)
    assert_equal_to_rounding(found.detach(), expected.detach())
    # The second pass has to compute them anew.
    for _ in range(2):
        ours = torch.autograd.grad((found * again).sum(), inputs, retain_graph=True)
        for one, other in zip(ours, slopes, strict=True):
            assert_equal_to_rounding(one, other)


def test_no_tokens_have_no_loss():
    layer, hidden = nn.Linear(3, 5), torch.zeros(0, 3, requires_grad=True)
    losses = token_losses.TokenLosses(torch.zeros(0, dtype=torch.int64), None)
    found = token_losses.summed_over_tokens(hidden, LanguageHead(layer), losses)
    found.sum().backward()
    assert found.tolist() == [0.0]
    assert not layer.weight.grad.any()


# Trainers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "alphas"),
    [*((kind, (1.0, 0.5, 1.0)) for kind in HEADS), ("llama", (0.0, 1.0, 0.0)), ("llama", (1.0, 0.0, 1.0))],
)
def test_losses_from_the_head_are_those_from_logits(tmp_path, kind, alphas):
    student, teacher = program.language_model(kind, 0), program.language_model(kind, 1)
    assert language_head(student) is not None
    task, output, layer = alphas
    trainer = distilling(tmp_path, student, teacher, alpha_task=task, alpha_output=output, alpha_layer=layer)
    batch = program.collate(program.windows(3))
    expected, slopes = loss_and_gradients(trainer, batch, whole=True)
    loss, gradients = loss_and_gradients(trainer, batch, whole=False)
    assert_equal_to_rounding(loss, expected)
    assert gradients.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert_equal_to_rounding(gradients[name], slope)


def test_losses_in_half_precision(tmp_path):
    student, teacher = (program.language_model("llama", seed) for seed in (0, 1))
    batch = program.collate(program.windows(3))
    reference = loss_and_gradients(distilling(tmp_path, student, teacher), batch, whole=False)
    for options in ({"bf16": True}, {}):
        if not options:
            student, teacher = student.bfloat16(), teacher.bfloat16()
        trainer = distilling(tmp_path, student, teacher, **options)
        for whole in (True, False):
            with trainer.accelerator.autocast():
                loss, gradients = loss_and_gradients(trainer, batch, whole)
            assert float(loss) == pytest.approx(float(reference[0]), rel=0.05)
            ours, theirs = gradients["lm_head.weight"].float(), reference[1]["lm_head.weight"]
            assert float((ours - theirs).norm() / theirs.norm()) < 0.1, (options, whole)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, kind, types, args=(), kwargs=None):
        found = kind(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            self.size = max(self.size, each.numel() if torch.is_tensor(each) else 0)
        return found


@pytest.mark.parametrize("whole", [False, True])
def test_no_tensor_holds_the_logits_of_all_tokens(tmp_path, whole):
    """No more than the head's weights: one update of student and teacher, forward and backward."""
    student, teacher = (program.language_model("llama", seed, words=1000) for seed in (0, 1))
    trainer = distilling(tmp_path, student, teacher)
    batch = program.collate(program.windows(4))
    trainer.next_tokens.head()
    with Largest() as seen:
        loss_and_gradients(trainer, batch, whole)
    logits, weights = batch["input_ids"].numel() * 1000, student.lm_head.weight.numel()
    assert logits > 2 * weights
    assert seen.size == (logits if whole else weights)


def test_models_whose_loss_is_more_than_their_logits_are_left_to_themselves(tmp_path):
    student = program.language_model("mixtral", 0)
    assert language_head(student) is None
    trainer = distilling(tmp_path, student, program.language_model("mixtral", 1), alpha_output=0.0)
    batch = program.collate(program.windows(3))
    loss, _ = loss_and_gradients(trainer, batch, whole=False)
    assert_equal_to_rounding(loss, trainer.model.train()(**batch).loss.detach())


class Doubled(type(program.language_model("llama", 0))):
    """Its forward does to the logits what its config does not tell."""

    def forward(self, *args, **kwargs):
        labels = kwargs.pop("labels", None)
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        if labels is not None:
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=program.WORDS)
        return outputs


def test_a_head_that_does_more_than_its_config_tells_is_found():
    torch.manual_seed(0)
    model = Doubled(program.language_model("llama", 0).config)
    assert language_head(model) is None
    assert language_head(program.language_model("llama", 0)) is not None


def test_code_that_reads_the_logits_gets_them(tmp_path):
    """A loss term of the user, and outputs that `Trainer` gathers for metrics."""
    seen = []

    class Reading(hc.DistillationTrainer):
        def loss_terms(self, model, inputs):
            terms, outputs = super().loss_terms(model, inputs)
            seen.append(outputs["logits"].shape)
            return terms, outputs

    models = program.language_model("llama", 0), program.language_model("llama", 1)
    batch = program.collate(program.windows(3))
    trainer = distilling(tmp_path, *models, trainer_class=Reading)
    loss_and_gradients(trainer, batch, whole=False)
    assert seen == [(*batch["input_ids"].shape, program.WORDS)]
    trainer = distilling(tmp_path, *models)
    assert trainer.predict(program.windows(2)).predictions.shape[-1] == program.WORDS
    alone = trainer.evaluate()
    trainer.args.prediction_loss_only = True
    for name, value in trainer.evaluate().items():
        if "loss" in name:
            assert value == pytest.approx(alone[name], rel=1e-5)


def test_a_cache_keeps_what_the_head_reads(tmp_path):
    models = program.language_model("llama", 0), program.language_model("llama", 1)
    batch, folder = program.collate(program.windows(3)), tmp_path / "cache"
    expected, _ = loss_and_gradients(distilling(tmp_path, *models), batch, whole=False)
    trainer = distilling(tmp_path, *models, teacher_cache_dir=str(folder))
    for whole in (False, True, False):
        assert_equal_to_rounding(loss_and_gradients(trainer, batch, whole)[0], expected)
    assert (trainer.teacher_cache.misses, trainer.teacher_cache.hits) == (3, 9)
    targets = trainer.session.answer(batch, training=True)
    assert targets.logits == ()
    assert targets.head_inputs.shape[-1] == 16


# Counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(program.KINDS))
def test_micro_batches_count_their_tokens(tmp_path, kind):
    """Eight batches of one window are one batch of eight, though the windows are of different lengths."""
    apart = program.train(kind, str(tmp_path / "a"), per_device_train_batch_size=1, gradient_accumulation_steps=8)
    at_once = program.train(kind, str(tmp_path / "b"), per_device_train_batch_size=8)
    begun = program.language_model("llama", 0).double().state_dict()
    for name, value in at_once["weights"].items():
        torch.testing.assert_close(apart["weights"][name], value, rtol=0, atol=1e-6)
        assert name.startswith("teacher.") or differ_beyond_rounding(value, begun[name]), name
    for ours, theirs in zip(apart["logs"], at_once["logs"], strict=True):
        # `Trainer` measures norms of micro-batches in its own way.
        names = {name for name in theirs if "loss" in name}
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-5)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {}])
def test_losses_from_logits_count_their_tokens(tmp_path, monkeypatch, options):
    """The model's own loss, and that of `Trainer`, where the head is not read apart."""
    monkeypatch.setattr("hf_compress.training.next_tokens.language_head", lambda model: None)
    apart, at_once = (
        program.train("fixed", str(tmp_path / str(size)), per_device_train_batch_size=size,
                      gradient_accumulation_steps=8 // size, **options)
        for size in (1, 8)
    )  # fmt: skip
    for name, value in at_once["weights"].items():
        torch.testing.assert_close(apart["weights"][name], value, rtol=0, atol=1e-6)


def test_a_window_of_which_a_batch_predicts_nothing(tmp_path):
    models = program.language_model("llama", 0), program.language_model("llama", 1)
    trainer = distilling(tmp_path, *models, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.train_dataset[1]["labels"][:] = -100
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


@pytest.mark.parametrize("kind", ["fixed", "joint"])
def test_two_processes_count_tokens_as_one(tmp_path, pair, kind):
    found = pair.run(program.train, kind, str(tmp_path / "two"), per_device_train_batch_size=4)
    one = program.train(kind, str(tmp_path / "one"), per_device_train_batch_size=8)
    for each in found:
        for name, value in one["weights"].items():
            torch.testing.assert_close(each["weights"][name], value, rtol=0, atol=1e-6)
    for ours, theirs in zip(found[0]["logs"], one["logs"], strict=True):
        names = {name for name in theirs if "loss" in name}
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-5)


# Vocabularies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("sizes", [(61, 64), (64, 61)])
def test_a_padded_vocabulary_is_compared_in_what_both_have(tmp_path, whole, sizes):
    student, teacher = (program.language_model("llama", seed, size) for seed, size in enumerate(sizes))
    trainer = distilling(tmp_path, student, teacher, alpha_task=0.0)
    batch = program.collate(program.windows(3))
    loss, _ = loss_and_gradients(trainer, batch, whole)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    counted = batch["labels"][:, 1:] != -100
    p, q = (
        torch.log_softmax(model.eval()(**inputs).logits[:, :-1][counted][:, :61] / 2, -1)
        for model in (teacher, trainer.model)
    )
    assert_equal_to_rounding(loss, 4 * (p.exp() * (p - q)).sum(-1).mean().detach())


@pytest.mark.parametrize(
    ("words", "changed"), [(63, {}), (640, {}), (64, {"eos_token_id": 5}), (64, {"bos_token_id": None})]
)
def test_other_vocabularies_are_refused(tmp_path, words, changed):
    teacher = program.language_model("llama", 1, words)
    for name, value in changed.items():
        setattr(teacher.config, name, value)
    trainer = distilling(tmp_path, program.language_model("llama", 0), teacher)
    expected = f"The teacher must read the student's vocabulary (61 tokens), got {words}."
    with pytest.raises(ValueError, match=re.escape(expected)):
        loss_and_gradients(trainer, program.collate(program.windows(3)), whole=False)
