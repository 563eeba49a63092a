"""The distillation trainer: its loss against a hand computation, its teacher, its projector, its heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    default_data_collator,
)

import hf_compress as hc
from hf_compress.training.layer_matching import match_layers
from tests.crash_program import Rows, pad


def bert(hidden=16, layers=2, seed=0, head=BertForSequenceClassification, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 99, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
             "intermediate_size": 2 * hidden, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return head(BertConfig(**{**sizes, **options}))


def arguments(folder, **options):
    defaults = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True,
                "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
                "dataloader_pin_memory": False}  # fmt: skip
    return hc.DistillationArguments(str(folder), **{**defaults, **options})


def trainer_of(folder, student=None, teacher=None, rows=None, collator=pad, **options):
    return hc.DistillationTrainer(
        model=student or bert(seed=0), teacher_model=teacher or bert(seed=1), args=arguments(folder, **options),
        train_dataset=rows or Rows(), eval_dataset=Rows(), data_collator=collator,
    )  # fmt: skip


def batch_of(count=8):
    rows = Rows()
    return pad([rows[i] for i in range(count)])


def test_loss_equals_hand_computation(tmp_path):
    trainer = trainer_of(tmp_path, alpha_task=0.5, alpha_output=2.0, alpha_layer=3.0, temperature=4.0)
    batch = batch_of()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student = trainer.model(**inputs, output_hidden_states=True)
        teacher = trainer.teacher_model(**inputs, output_hidden_states=True)
    task = F.cross_entropy(student.logits, batch["labels"])
    p, q = (teacher.logits / 4).softmax(-1), (student.logits / 4).softmax(-1)
    output = 16 * (p * (p / q).log()).sum(-1).mean()
    layer = torch.zeros(())
    for index in (1, 2):
        for row in range(8):
            live = batch["attention_mask"][row].bool()
            layer += (
                student.hidden_states[index][row][live] - teacher.hidden_states[index][row][live]
            ).square().mean() / 16
    torch.testing.assert_close(loss, 0.5 * task + 2 * output + 3 * layer)
    assert "hidden_states" not in outputs


def test_accumulated_single_examples_equal_one_batch(tmp_path):
    losses = []
    for name, size, steps in (("a", 8, 1), ("b", 1, 8)):
        trainer = trainer_of(
            tmp_path / name, student=bert(seed=0), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            alpha_layer=1.0, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.5, seed=5,
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 8
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-4, atol=2e-4)


def test_teacher_is_outside_of_everything(tmp_path):
    teacher = bert(seed=1).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    trainer = trainer_of(tmp_path, teacher=teacher)
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    mine = {id(p) for p in teacher.parameters()}
    assert not mine & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trainer.save_model()
    assert set(load_file(tmp_path / "model.safetensors")) == set(start)
    assert all(not torch.equal(v, start[k]) for k, v in trainer.model.state_dict().items() if "position_ids" not in k)


def test_unguided_never_runs_a_teacher(tmp_path):
    trainer = hc.DistillationTrainer(
        model=bert(), args=arguments(tmp_path, alpha_output=0.0), train_dataset=Rows(), data_collator=pad
    )
    trainer.train()
    assert trainer.teacher_model is None
    assert {k for entry in trainer.state.log_history for k in entry if k.startswith("loss/")} == {"loss/task"}


def test_the_task_weight_holds_without_a_teacher(tmp_path):
    batch = batch_of()
    for options in ({"alpha_output": 0.0}, {"max_distill_steps": 0}):
        trainer = trainer_of(tmp_path, alpha_task=0.25, **options)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = 0.25 * F.cross_entropy(logits, batch["labels"])
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_hybrid_stops_asking_the_teacher(tmp_path):
    trainer = trainer_of(tmp_path, max_distill_steps=3)
    calls = []
    trainer.teacher_model.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    assert calls == [0, 1, 2]


def test_projector_learns_is_resumed_and_stays_out_of_the_student(tmp_path):
    def run(folder, **options):
        trainer = trainer_of(
            tmp_path / folder, student=bert(16, 2), teacher=bert(32, 4, seed=1), alpha_layer=1.0,
            save_strategy="steps", save_steps=4, **options,
        )  # fmt: skip
        return trainer

    trainer = run("a")
    first = {k: v.clone() for k, v in trainer.projectors.state_dict().items()}
    trainer.train()
    assert all(not torch.equal(v, first[k]) for k, v in trainer.projectors.state_dict().items())
    resumed = run("a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for k, v in resumed.projectors.state_dict().items():
        assert torch.equal(v, trainer.projectors.state_dict()[k])
    assert not any("map" in k for k in load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors"))


def test_resume_without_the_projector_is_refused(tmp_path):
    options = {
        "student": bert(16),
        "teacher": bert(32, seed=1),
        "alpha_layer": 1.0,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    trainer_of(tmp_path, **options).train()
    (tmp_path / "checkpoint-4" / "projectors.safetensors").unlink()
    with pytest.raises(ValueError, match="projectors.safetensors"):
        trainer_of(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_teacher_that_takes_other_arguments(tmp_path):
    """A DistilBERT learns from a BERT: token types go to the teacher, never to the student."""
    torch.manual_seed(0)
    student = DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=99, dim=16, n_layers=1, n_heads=4, hidden_dim=32, max_position_embeddings=32
    ))  # fmt: skip
    teacher = bert(seed=1)
    seen = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)

    def with_types(features):
        batch = pad(features)
        return {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}

    trainer = trainer_of(tmp_path, student=student, teacher=teacher, collator=with_types)
    trainer.train()
    assert all("token_type_ids" in names and "labels" not in names for names in seen)


def test_teacher_with_its_own_tokens(tmp_path):
    student, teacher = bert(seed=0), bert(seed=1, vocab_size=50)

    class Both(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return {**row, "teacher_input_ids": row["input_ids"] % 50}

    def pad_teacher(features):
        batch = pad([{**f, "labels": 0} for f in features])
        return {k: batch[k] for k in ("input_ids", "attention_mask")}

    collator = hc.TeacherStudentCollator(pad, pad_teacher)
    trainer = trainer_of(tmp_path, student=student, teacher=teacher, rows=Both(), collator=collator)
    batch = collator([Both()[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch)
    expected = teacher(
        input_ids=batch["input_ids"] % 50 * batch["attention_mask"], attention_mask=batch["attention_mask"]
    )
    inputs = {name.removeprefix("teacher_"): value for name, value in batch.items() if "teacher_" in name}
    signals = trainer.session.teacher.forward(inputs)
    torch.testing.assert_close(signals.logits[0], expected.logits)
    with pytest.raises(ValueError, match="vocabulary"):
        trainer.compute_loss(trainer.model, pad([Rows()[0]]))


@pytest.mark.parametrize("head", [BertForTokenClassification, BertForQuestionAnswering])
def test_token_level_heads(tmp_path, head):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(16):
        ids = torch.randint(5, 99, (8,), generator=generator)
        targets = {"labels": ids % 2} if head is BertForTokenClassification else {
            "start_positions": ids[0] % 8, "end_positions": ids[1] % 8}  # fmt: skip
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.int64), **targets})
    trainer = trainer_of(
        tmp_path, student=bert(head=head), teacher=bert(head=head, seed=1), rows=rows, alpha_task=0.0, alpha_layer=1.0,
        learning_rate=1e-2, num_train_epochs=15, collator=default_data_collator,
    )  # fmt: skip
    trainer.train()
    outputs = [entry["loss/output"] for entry in trainer.state.log_history if "loss/output" in entry]
    assert outputs[-1] < 0.5 * outputs[0]


@pytest.mark.parametrize(("problem", "num_labels"), [("regression", 1), ("multi_label_classification", 3)])
def test_regression_and_multilabel(tmp_path, problem, num_labels):
    def collate(features):
        batch = pad(features)
        shape = (len(features),) if num_labels == 1 else (len(features), num_labels)
        return {**batch, "labels": torch.full(shape, 0.5)}

    options = {"num_labels": num_labels, "problem_type": problem}
    trainer = trainer_of(tmp_path, student=bert(**options), teacher=bert(seed=1, **options), collator=collate)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in trainer.state.log_history if "loss" in e)


def test_evaluation_reports_terms(tmp_path):
    trainer = trainer_of(tmp_path)
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert logged["eval_loss/task"] + logged["eval_loss/output"] == pytest.approx(metrics["eval_loss"], rel=1e-3)


def test_best_model_is_loaded_and_kept(tmp_path):
    trainer = trainer_of(
        tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=1,
        load_best_model_at_end=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    saved = load_file(f"{best}/model.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in trainer.model.state_dict().items())
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2


def test_a_layer_map_of_layers_that_are_not_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layer_map is \[0, 1\], but alpha_layer is 0"):
        hc.DistillationArguments(str(tmp_path), layer_map=[0, 1], use_cpu=True)


def test_layer_map_rules():
    assert match_layers(6, 6) == [(i, i) for i in range(6)]
    assert match_layers(3, 12) == [(0, 3), (1, 7), (2, 11)]
    assert match_layers(2, 4, [-1, 0]) == [(1, 0)]
    for bad, text in (([0], "one entry for each"), ([0, 4], "teacher layers 0..3"), ([-1, -1], "at least one layer")):
        with pytest.raises(ValueError, match=text):
            match_layers(2, 4, bad)


@pytest.mark.parametrize(("options", "text"), [
    ({"alpha_task": -1.0}, "alpha_task must be zero or positive"),
    ({"alpha_task": 0.0, "alpha_output": 0.0}, "must not all be 0"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"max_distill_steps": -1}, "max_distill_steps"),
    ({"max_distill_steps": 3, "alpha_task": 0.0}, "alpha_task must be above 0"),
    ({"compat": "other"}, "compat must be one of"),
    ({"layer_reduction": "max"}, "layer_reduction must be one of"),
    ({"teacher_cache_dir": "x", "teacher_dropout": True}, "teacher_cache_dir"),
])  # fmt: skip
def test_wrong_arguments(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        arguments(tmp_path, **options)


def test_teacher_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="teacher_model must be given"):
        hc.DistillationTrainer(model=bert(), args=arguments(tmp_path), train_dataset=Rows())
    with pytest.raises(ValueError, match="must have the student's 2 labels, got 3"):
        trainer_of(tmp_path, teacher=bert(num_labels=3))
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    others = {"id2label": {0: "no", 1: "maybe"}, "label2id": {"no": 0, "maybe": 1}}
    with pytest.raises(ValueError, match=r"the student's labels \['no', 'yes'\], got \['no', 'maybe'\]"):
        trainer_of(tmp_path, student=bert(**names), teacher=bert(**others))


def test_not_a_number_stops_training(tmp_path):
    student = bert()
    with torch.no_grad():
        student.classifier.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="loss must be finite"):
        trainer_of(tmp_path, student=student).train()
