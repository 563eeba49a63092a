"""Proximal training of other architectures and heads, with adapters, other tokenizers, in searches."""

import copy
import math
import warnings

import optuna
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

import hf_compress as hc
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, logged, same, trainer_of, weights
from tests.proximal_by_hand import Walk, walk_by_hand, zero_heads_
from tests.test_proximal import near


SGD = {"optim": "sgd", "learning_rate": 0.5, "teacher_learning_rate": 0.5, "weight_decay": 0.0}

# What alone changes in the first update: the last linear layer.
OUTPUT_LAYERS = {
    "bert": "classifier", "roberta": "classifier.out_proj", "electra": "classifier.out_proj",
    "distilbert": "classifier", "mpnet": "classifier.out_proj", "deberta-v2": "classifier", "modernbert": "classifier",
    "gpt2": "score", "llama": "score", "opt": "score",
}  # fmt: skip


def perturbed(model, seed=7):
    generator = torch.Generator().manual_seed(seed)
    found = copy.deepcopy(model)
    for parameter in found.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


def classifier_rows(config, batches, count=16):
    (batch,) = batches(config, count=1, size=count, length=10)
    return [
        {"input_ids": ids[mask.bool()], "labels": index % config.num_labels}
        for index, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True))
    ]


def padding_with(pad_id):
    def collate(features):
        batch = pad(features)
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad_id)
        return {**batch, "input_ids": ids}

    return collate


@pytest.mark.parametrize("architecture", [
    name if name in ("bert", "roberta", "distilbert", "mpnet", "gpt2") else pytest.param(name, marks=pytest.mark.slow)
    for name in OUTPUT_LAYERS
])  # fmt: skip
def test_both_begin_with_the_same_answer(tmp_path, model, batches, architecture):
    """Zero logits: no divergence, a task loss of ln C, and gradients for the output layers alone."""
    student = model(architecture, "sequence_classification")
    rows = classifier_rows(student.config, batches)
    check_beginning(tmp_path, student, perturbed(student), (OUTPUT_LAYERS[architecture],) * 2, rows)


def check_beginning(folder, student, teacher, layers, rows):
    before, ends = (weights(student), weights(teacher)), []

    def look(update):
        if update == 1:
            ends.extend((weights(student), weights(teacher)))

    trainer = trainer_of(
        "proximal", folder, student, teacher, look, rows=rows, max_steps=2,
        collator=padding_with(student.config.pad_token_id), gradient_accumulation_steps=2, proximal_weight=0.4, **SGD,
    )  # fmt: skip
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # The student of the first update already learns from a teacher that made a step.
    assert first["loss/proximal"] == 0
    assert first["loss/teacher_task"] == pytest.approx(math.log(student.config.num_labels), abs=1e-6)
    models = (trainer.model, trainer.teacher_model)
    for start, end, last, layer in zip(before, ends, models, layers, strict=True):
        changed = {name for name in start if not torch.equal(start[name], end[name])}
        assert changed == {name for name in start if name.startswith(f"{layer}.")}
        assert float(end[f"{layer}.weight"].abs().max()) > 0
        # Then the gradient reaches the rest.
        after = weights(last)
        assert any(not torch.equal(end[name], after[name]) for name in end.keys() - changed)


def test_a_bilstm_and_its_teacher_begin_with_the_same_answer(tmp_path, model, batches):
    teacher = model("bert", "sequence_classification")
    config = hc.BiLSTMConfig(vocab_size=99, embedding_size=16, hidden_size=8, dropout=0.0, pad_token_id=0)
    student = perturbed(hc.BiLSTMForSequenceClassification(config))
    check_beginning(tmp_path, student, teacher, ("classifier",) * 2, classifier_rows(teacher.config, batches))


def first_update(folder, student, teacher, rows, collator, **options):
    """One update of plain gradient descent: what was logged, the first models, and the teacher after its step."""
    begun = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    trainer = trainer_of(
        "proximal", folder, student, teacher, ordered=True, rows=rows, collator=collator, max_steps=1,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, zero_init_heads=False,
        remove_unused_columns=False, **{**SGD, **options},
    )  # fmt: skip
    trainer.train()
    found = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return found, *begun, trainer.teacher_model.eval(), collator(rows[:8])


def kl(target, logits):
    p, q = F.log_softmax(target, -1), F.log_softmax(logits, -1)
    return (p.exp() * (p - q)).sum(-1)


def mean_by_example(values, counted):
    return ((values * counted).sum(1) / counted.sum(1)).mean()


def check_first(found, task, proximal, output, weight=0.4):
    assert found["loss/teacher_task"] == pytest.approx(float(task), abs=2e-6)
    assert found["loss/proximal"] == pytest.approx(float(proximal), abs=2e-6)
    assert found["loss/teacher"] == pytest.approx(float((1 - weight) * task + weight * proximal), abs=2e-6)
    assert found["loss/output"] == pytest.approx(float(output), abs=2e-6)
    assert float(proximal) > 1e-3
    assert float(output) > 1e-3


def test_token_classification(tmp_path, model):
    rows = [{**row, "labels": int(row["labels"])} for row in ROWS]

    def collate(features):
        batch = pad(features)
        labels = (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, 0] = -100
        return {**batch, "labels": labels}

    student = model("bert", "token_classification")
    found, student, teacher, taught, batch = first_update(tmp_path, student, perturbed(student), rows, collate)
    inputs, counted = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"] != -100
    with torch.no_grad():
        asked, told = student(**inputs).logits, teacher(**batch)
        check_first(
            found, told.loss, mean_by_example(kl(asked, told.logits), counted),
            mean_by_example(kl(taught(**inputs).logits, asked), counted),
        )  # fmt: skip


def test_question_answering(tmp_path, model):
    def collate(features):
        batch = pad(features)
        del batch["labels"]
        return {**batch, "start_positions": torch.ones(len(features), dtype=torch.int64),
                "end_positions": torch.full((len(features),), 2)}  # fmt: skip

    student = model("bert", "question_answering")
    found, student, teacher, taught, batch = first_update(tmp_path, student, perturbed(student), ROWS, collate)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = batch["attention_mask"] == 0

    def positions(outputs):
        return [t.masked_fill(hidden, -1e9) for t in (outputs.start_logits, outputs.end_logits)]

    with torch.no_grad():
        asked, told = student(**inputs), teacher(**batch)
        proximal, output = (
            sum(kl(p, q).mean() for p, q in zip(positions(one), positions(other), strict=True)) / 2
            for one, other in ((asked, told), (taught(**inputs), asked))
        )
    check_first(found, told.loss, proximal, output)


def test_causal_language_models(tmp_path, model):
    def collate(features):
        batch = pad(features)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    student = model("llama", "causal_lm")
    found, student, teacher, taught, batch = first_update(
        tmp_path, student, perturbed(student), ROWS, collate, proximal_weight=0.2
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        asked, told = student(**inputs).logits, teacher(**batch)
        proximal, output = (
            kl(one, other)[:, :-1][counted].mean()
            for one, other in ((asked, told.logits), (taught(**inputs).logits, asked))
        )
        check_first(found, told.loss, proximal, output, 0.2)


def test_a_language_model_begins_with_uniform_answers(tmp_path, model):
    def collate(features):
        batch = pad(features)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    student = model("llama", "causal_lm")
    trainer = trainer_of("proximal", tmp_path, student, perturbed(student), collator=collate, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss/proximal") == {1: 0}
    assert logged(trainer, "loss/teacher_task")[1] == pytest.approx(math.log(99), abs=1e-5)


def test_a_teacher_with_another_tokenizer(tmp_path):
    """It reads the columns `teacher_<name>` when it learns and when it answers."""
    rows = [{**row, "teacher_input_ids": row["input_ids"].repeat_interleave(2) // 3} for row in ROWS]

    def pad_teacher(features):
        batch = pad([{**feature, "labels": 0} for feature in features])
        del batch["labels"]
        return batch

    collate = hc.TeacherStudentCollator(pad, pad_teacher)
    student, teacher = dense(0).double(), dense(1, vocab_size=40).double()
    trainer = trainer_of(
        "proximal", tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), ordered=True, rows=rows,
        collator=collate, weight_decay=0.0, remove_unused_columns=False,
    )  # fmt: skip
    trainer.train()
    zero_heads_(student, teacher)
    batches = [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]
    windows = [batches[:3], batches[3:]] * 3
    walk_by_hand(student, teacher, windows, Walk(len(windows)))
    near(trainer.model, student, 1e-9)
    near(trainer.teacher_model, teacher, 1e-9)


# peft asks transformers for an attribute that is about to be renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_student_with_adapters(tmp_path):
    """Its base stays; its output layer, which peft keeps twice, begins with zeros where it is trained."""

    def adapted(seed):
        return get_peft_model(
            dense(seed), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.1)
        )

    student = adapted(0)
    before = weights(student)
    options = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 5e-2}
    trainer = trainer_of("proximal", tmp_path / "whole", student, dense(1), **options)
    trainer.train()
    assert logged(trainer, "loss/proximal")[1] == 0
    after = weights(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"lora" in name or "modules_to_save" in name for name in changed} == {True}
    assert any("modules_to_save" in name for name in changed)
    resumed = trainer_of("proximal", tmp_path / "again", adapted(0), dense(5), **options)
    resumed.train(str(tmp_path / "whole" / "checkpoint-3"))
    assert same(weights(resumed.model), after)
    assert same(weights(resumed.teacher_model), weights(trainer.teacher_model))


@pytest.mark.parametrize("best", [2, 6])
def test_the_teacher_saved_is_that_of_the_best_student(tmp_path, best):
    seen = {}

    def score(prediction):
        update = trainer.state.global_step
        return {"score": -abs(update - best)}

    def look(update):
        seen[update] = weights(trainer.model), weights(trainer.teacher_model)

    trainer = trainer_of("proximal", tmp_path, dense(0), dense(1), look, save_teacher=True, save_strategy="steps",
                         save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
                         metric_for_best_model="score", save_total_limit=1)  # fmt: skip
    trainer.compute_metrics = score
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    for folder, expected in ((tmp_path, seen[best][0]), (tmp_path / "teacher", seen[best][1])):
        assert same(weights(AutoModelForSequenceClassification.from_pretrained(folder)), expected)
    assert same(weights(trainer.teacher_model), seen[best][1])


def test_every_trial_of_a_search_begins_with_the_given_teacher(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    begun, ended = [], []

    class Looks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                begun.append((weights(trainer.model), weights(trainer.teacher_model)))

        def on_train_end(self, args, state, control, **kwargs):
            ended.append((weights(trainer.model), weights(trainer.teacher_model)))

    teacher = dense(1)
    given = weights(teacher)
    # The order of rows would depend on how many random numbers were drawn for the model.
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "ordered": True}
    trainer = trainer_of("proximal", tmp_path / "search", None, teacher, init=lambda trial: dense(0), **options)
    trainer.add_callback(Looks())
    rates = iter((1e-3, 1e-2))

    def space(trial):
        rate = next(rates)
        return {"proximal_weight": trial.suggest_float("proximal_weight", 0.5, 0.5),
                "learning_rate": trial.suggest_float("learning_rate", rate, rate)}  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.hyperparameter_search(hp_space=space, n_trials=2, direction="minimize", backend="optuna")
    assert len(begun) == len(ended) == 2
    expected = {**given, "classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(2)}
    for student, taught in begun:
        assert same(taught, expected)
        assert not student["classifier.weight"].any()
    assert not same(ended[0][0], ended[1][0])
    # The second trial is a training of its own with its values.
    alone = trainer_of("proximal", tmp_path / "alone", dense(0), dense(1), proximal_weight=0.5, learning_rate=1e-2,
                       **options)  # fmt: skip
    alone.train()
    assert same(weights(alone.model), ended[1][0])
    assert same(weights(alone.teacher_model), ended[1][1])


def test_a_teacher_given_by_its_folder(tmp_path):
    dense(1).save_pretrained(tmp_path / "teacher")
    ends = []
    for number, teacher in enumerate((dense(1), str(tmp_path / "teacher"))):
        trainer = trainer_of("proximal", tmp_path / str(number), dense(0), teacher, max_steps=2)
        trainer.train()
        ends.append(trainer)
    near(ends[0].model, ends[1].model, 1e-6)
    near(ends[0].teacher_model, ends[1].teacher_model, 1e-6)


@pytest.mark.slow
def test_plain_arguments_get_the_defaults(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = hc.ProximalTrainer(dense(0), dense(1), args, train_dataset=ROWS, data_collator=pad)
    trainer.train()
    assert (trainer.args.proximal_weight, trainer.args.temperature, trainer.args.zero_init_heads) == (0.4, 1.0, True)
    assert trainer.args.teacher_learning_rate == 3e-5
