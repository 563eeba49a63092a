"""A teacher of another kind is one class: it answers, and learns from what its student answers."""

import copy

import pytest
import torch
import torch.nn.functional as F

import hf_compress as hc
from hf_compress.training.learning_teacher import LearningTeacher
from hf_compress.training.teachers import Learner
from tests import guided_setup
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, linear, logged, same, trainer_of, weights


class Walking(LearningTeacher):
    """Stays near its student: it learns the labels and the student's answers, and is asked with its new weights."""

    def learn(self, window, student):
        self.model.train(self.dropout)
        losses = []
        for number, batch in enumerate(window.batches, start=1):
            answers = student(batch.student).logits[0]
            with self.trained.micro_batch(last=number == len(window.batches)) as model:
                outputs = model(**batch.teacher)
                near = F.kl_div(outputs.logits.log_softmax(-1), answers.softmax(-1), reduction="batchmean")
                loss = 0.6 * outputs.loss + 0.4 * near
                self.trained.accelerator.backward(loss / len(window.batches))
            losses.append(loss.detach())
        self.trained.step()
        self.trained.zero_grad()
        return {"loss/walking": torch.stack(losses)}


class WalkingTrainer(hc.JointTeacherTrainer):
    def make_teacher(self, model, wanted, label_order):
        return Walking(model, wanted, learning_rate=self.args.teacher_learning_rate, dropout=False)


@pytest.fixture
def walking(monkeypatch):
    monkeypatch.setitem(guided_setup.KINDS, "joint", (WalkingTrainer, hc.JointTeacherArguments))


OPTIONS = {"ordered": True, "alpha_task": 0.0, "alpha_output": 1.0, "alpha_layer": 0.0, "temperature": 1.0,
           "weight_decay": 0.0, "max_grad_norm": 1.0}  # fmt: skip


def by_hand(student, teacher):
    """Teacher first, on the whole window, then the student; AdamW and linear decay for both."""
    rates, updates = {"student": 1e-2, "teacher": 3e-3}, 6
    models = {"student": student.train(), "teacher": teacher.train()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), weight_decay=0.0) for name, model in models.items()}
    batches = [pad(ROWS[start : start + 8]) for start in range(0, 30, 8)]
    windows = [batches[:3], batches[3:]] * 3

    def step(name, done):
        for group in optimizers[name].param_groups:
            group["lr"] = rates[name] * (updates - done) / updates
        torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()

    for done, window in enumerate(windows):
        for batch in window:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                answers = student(**inputs).logits
            outputs = teacher(**batch)
            near = F.kl_div(outputs.logits.log_softmax(-1), answers.softmax(-1), reduction="batchmean")
            ((0.6 * outputs.loss + 0.4 * near) / len(window)).backward()
        step("teacher", done)
        for batch in window:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                targets = teacher(**inputs).logits
            answers = student(**inputs).logits.log_softmax(-1)
            (F.kl_div(answers, targets.softmax(-1), reduction="batchmean") / len(window)).backward()
        step("student", done)


def test_a_teacher_that_walks_with_its_student(tmp_path, walking):
    student, teacher = linear(0).double(), dense(1).double()
    trainer = trainer_of("joint", tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), **OPTIONS)
    assert isinstance(trainer.session.teacher, Learner)
    trainer.train()
    by_hand(student, teacher)
    for ours, theirs in ((trainer.model, student), (trainer.teacher_model, teacher)):
        for name, value in theirs.state_dict().items():
            # The true gradient of a key bias is zero: Adam amplifies its rounding.
            if "key.bias" not in name:
                torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)
    assert sorted(logged(trainer, "loss/walking")) == [1, 2, 3, 4, 5, 6]


def test_it_resumes_to_the_same_end(tmp_path, walking):
    options = {**OPTIONS, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of("joint", tmp_path / "whole", linear(0, 0.1), dense(1), **options)
    whole.train()
    resumed = trainer_of("joint", tmp_path / "again", linear(5, 0.1), dense(6), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(weights(resumed.model), weights(whole.model))
    assert same(weights(resumed.teacher_model), weights(whole.teacher_model))


def test_a_student_answers_as_in_an_evaluation(tmp_path, walking):
    """Without dropout, gradients or random numbers; its training goes on as it was."""
    seen = []

    class Asking(Walking):
        def learn(self, window, student):
            before, training = torch.get_rng_state(), trainer.model.training
            first, again = (student(batch.student).logits[0] for batch in [window.batches[0]] * 2)
            seen.append(torch.equal(first, again) and not first.requires_grad)
            assert torch.equal(torch.get_rng_state(), before)
            assert trainer.model.training == training
            return super().learn(window, student)

    class AskingTrainer(WalkingTrainer):
        def make_teacher(self, model, wanted, label_order):
            return Asking(model, wanted, learning_rate=1e-3)

    args = hc.JointTeacherArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_teacher=False)
    trainer = AskingTrainer(linear(0, 0.3), dense(1, 0.1), args, train_dataset=ROWS, data_collator=pad)
    trainer.train()
    assert seen == [True, True]
