"""Our trainers in the place of `transformers.Trainer`: what worked there works here, or says what to change."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

import hf_compress as hc
from hf_compress.training.given_teacher import auto_class_of
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import Rows, pad
from tests.test_distilled_positions import batch_of, language_model


ROWS = [Rows()[index] for index in range(16)]
PLAIN = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_strategy": "no",
         "dataloader_pin_memory": False, "logging_steps": 1, "per_device_train_batch_size": 4}  # fmt: skip


def bert(seed=0, kind=BertForSequenceClassification, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=32, **options))


def logged(trainer):
    return {name for entry in trainer.state.log_history for name in entry if name.startswith("loss/")}


@pytest.mark.parametrize("trainer_class", [hc.DistillationTrainer, hc.JointTeacherTrainer])
def test_plain_arguments_get_the_defaults(tmp_path, trainer_class):
    plain = TrainingArguments(str(tmp_path), learning_rate=3e-3, **PLAIN)
    plain.weight_decay = 0.25
    trainer = trainer_class(bert(), bert(1), plain, train_dataset=ROWS, data_collator=pad)
    assert isinstance(trainer.args, trainer_class.arguments_class)
    assert (trainer.args.learning_rate, trainer.args.weight_decay, trainer.args.alpha_output) == (3e-3, 0.25, 1.0)
    assert not hasattr(plain, "alpha_output")
    trainer.train()
    assert {"loss/task", "loss/output"} <= logged(trainer)
    trainer.save_model()


def test_the_arguments_of_another_trainer(tmp_path):
    args = hc.DistillationArguments(str(tmp_path), alpha_layer=0.5, **PLAIN)
    trainer = hc.JointTeacherTrainer(bert(), bert(1), args, train_dataset=ROWS, data_collator=pad)
    assert (trainer.args.alpha_layer, trainer.args.teacher_update_cycle) == (0.5, 1)
    with pytest.raises(ValueError, match="args must be SnapshotTeacherArguments with teacher_snapshots"):
        hc.SnapshotTeacherTrainer(bert(), args, train_dataset=ROWS)
    with pytest.raises(ValueError, match="args must be DistillationArguments or TrainingArguments, got dict"):
        hc.DistillationTrainer(bert(), bert(1), {"alpha_task": 1})


def test_a_teacher_by_name(tmp_path):
    teacher = bert(1, num_labels=3)
    teacher.save_pretrained(tmp_path / "teacher")
    args = hc.DistillationArguments(str(tmp_path), **PLAIN)
    for name in (tmp_path / "teacher", str(tmp_path / "teacher")):
        trainer = hc.DistillationTrainer(bert(num_labels=3), name, args, train_dataset=ROWS, data_collator=pad)
        trainer.train()
        for key, value in teacher.state_dict().items():
            assert torch.equal(value, trainer.teacher_model.state_dict()[key])
    bert(1, BertModel).save_pretrained(tmp_path / "no_head")
    for name, text in (("no_head", "its weight files lack classifier"), ("nowhere", "teacher_model .*nowhere")):
        with pytest.raises(ValueError, match=text):
            hc.DistillationTrainer(bert(), str(tmp_path / name), args, train_dataset=ROWS, data_collator=pad)


@pytest.mark.parametrize(("kind", "expected"), [
    ("gpt2", transformers.AutoModelForCausalLM), ("llama", transformers.AutoModelForCausalLM),
    ("bert", transformers.AutoModelForMaskedLM), ("t5", transformers.AutoModelForSeq2SeqLM)])  # fmt: skip
def test_the_kind_of_a_head(kind, expected):
    assert auto_class_of(language_model(kind, 0)) is expected


def test_a_teacher_that_shares_weights_is_refused(tmp_path):
    student, teacher = bert(), bert(1)
    teacher.bert.encoder = student.bert.encoder
    with pytest.raises(ValueError, match=r"share \d+ parameters \(bert.encoder.*copy.deepcopy"):
        hc.DistillationTrainer(student, teacher, hc.DistillationArguments(str(tmp_path), **PLAIN))
    assert all(parameter.requires_grad for parameter in student.parameters())


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Doubled(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, False, num_items_in_batch)


class Elsewhere(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("mixin", [Weighted, Elsewhere])
@pytest.mark.parametrize("trainer_class", [hc.DistillationTrainer, CompressionTrainer])
def test_a_mixin_that_replaces_the_loss_is_refused(tmp_path, mixin, trainer_class):
    class Hidden(mixin, trainer_class):
        pass

    given = {"teacher_model": bert(1)} if trainer_class is hc.DistillationTrainer else {}
    args = hc.DistillationArguments(str(tmp_path), **PLAIN)
    with pytest.raises(ValueError, match=rf"{mixin.__name__}.compute_loss.*class Hidden\({trainer_class.__name__}"):
        Hidden(bert(), args=args, train_dataset=ROWS, data_collator=pad, **given).train()


class OldStyle(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super(OldStyle, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)  # noqa: UP008


class ByName(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return hc.DistillationTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def logging_its_calls(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


class Doubling(Doubled):
    compute_loss = logging_its_calls(Doubled.compute_loss)


@pytest.mark.parametrize("bases", [
    (hc.DistillationTrainer, Weighted), *((mixin, hc.DistillationTrainer) for mixin in (
        Doubled, OldStyle, ByName, Doubling))])  # fmt: skip
def test_a_mixin_that_goes_on_distils(tmp_path, bases):
    trainer = type("Both", bases, {})(
        bert(), bert(1), hc.DistillationArguments(str(tmp_path), **PLAIN), train_dataset=ROWS, data_collator=pad
    )
    trainer.train()
    assert {"loss/task", "loss/output"} <= logged(trainer)


def test_a_loss_of_a_subclass_of_its_own_is_announced(tmp_path, caplog):
    class Own(hc.DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    args = hc.DistillationArguments(str(tmp_path), **PLAIN)
    Own(bert(), bert(1), args, train_dataset=ROWS, data_collator=pad).train()
    assert caplog.text.count("Own.compute_loss") == 1


@pytest.mark.parametrize("collator", ["plain", "seq2seq"])
def test_encoder_decoders_need_no_special_collator(tmp_path, collator, tokenizer):
    student, teacher = language_model("t5", 0), language_model("t5", 1)
    rows = [{name: value[i] for name, value in batch_of().items()} for i in range(3)]
    given = {}
    if collator == "seq2seq":
        given = {"data_collator": transformers.DataCollatorForSeq2Seq(tokenizer, model=student)}
        rows = [{name: value.tolist() for name, value in row.items()} for row in rows]
    args = hc.DistillationArguments(str(tmp_path), **PLAIN)
    trainer = hc.DistillationTrainer(student, teacher, args, train_dataset=rows, eval_dataset=rows, **given)
    trainer.train()
    assert {"loss/task", "loss/output"} <= logged(trainer)
    assert trainer.evaluate()["eval_loss/output"] > 0
    layered = hc.DistillationArguments(str(tmp_path), alpha_layer=1.0, **PLAIN)
    with pytest.raises(ValueError, match="alpha_layer compares .* t5 has both"):
        hc.DistillationTrainer(student, copy.deepcopy(teacher), layered, train_dataset=rows)
