"""`hf-compress proximal`: students of three kinds, baselines from the same beginning, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.cli.output import results_table
from hf_compress.tasks.metrics import classification_metrics
from tests.test_bad_input import write_model, write_tokenizer


STEPS = "--data_dir data --max_length 16 --use_cpu --max_steps 3 --per_device_train_batch_size 8 --learning_rate 1e-3"
PAIRS = STEPS.replace("--data_dir data", "--data_dir pairs")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pretrained encoder of two layers, a fine-tuned one, texts and pairs of texts."""
    root = tmp_path_factory.mktemp("proximal")
    write_model(root / "teacher")
    BertForSequenceClassification.from_pretrained(root / "teacher").bert.save_pretrained(root / "teacher")
    write_model(root / "tuned")
    write_model(root / "other_words")
    write_tokenizer(root / "other_words", [f"x{index}" for index in range(300)])
    texts = [f"{'good' if i % 2 else 'bad'} w{i % 30} w{i % 7}" for i in range(48)]
    columns = {"data": {"sentence": texts}, "pairs": {"sentence1": texts, "sentence2": texts[3:] + texts[:3]}}
    for name, found in columns.items():
        (root / name).mkdir()
        for split in ("train", "validation"):
            frame = pandas.DataFrame({**found, "label": [i % 2 for i in range(48)]})
            frame.to_parquet(root / name / f"{split}.parquet")
    return root


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def run(line, output_dir, code=0):
    assert main(shlex.split(f"proximal {line} --output_dir {output_dir}")) == code


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def assert_equal_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_student_out_of_the_teacher(tmp_path, capsys):
    run(f"--teacher_name_or_path teacher --student_layers 1 {STEPS}", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "eval_accuracy" in printed
    assert f"saved to {tmp_path / 'out'}" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with `ProximalTrainer` ([Follow Your Path: a Progressive Method for Knowledge Distillation](https" in card
    for shown in ("arxiv.org/abs/2107.09305", "`teacher=teacher`", "`alpha_output=1.0`", "`proximal_weight=0.4`"):
        assert shown in card
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert student.config.num_hidden_layers == 1
    assert hc.steps_of(student)[0]["kept_layers"] == [1]
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teacher")
    assert teacher.config.num_hidden_layers == 2
    before = weights("teacher")
    ours = teacher.bert.state_dict()
    assert any(not torch.equal(ours[name], value) for name, value in before.items())


def test_an_interrupted_training_goes_on(tmp_path):
    line = f"--teacher_name_or_path teacher --student_layers 1 --save_strategy steps --save_steps 2 {STEPS}"
    run(line, tmp_path / "whole")
    run(f"{line} --save_total_limit 3", tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").unlink()
    for path in (tmp_path / "again").glob("checkpoint-3"):
        path.rename(tmp_path / "gone")
    run(f"{line} --save_total_limit 3 --resume_from_checkpoint true", tmp_path / "again")
    assert_equal_weights(tmp_path / "again", tmp_path / "whole")
    assert_equal_weights(tmp_path / "again" / "teacher", tmp_path / "whole" / "teacher")


def test_baselines_are_the_trainings_by_hand(tmp_path, capsys):
    line = f"--teacher_name_or_path teacher --student_layers 1 --teacher_learning_rate 2e-3 {STEPS}"
    out = tmp_path / "out"
    run(f"{line} --baselines hard_labels distillation lambda_0 --proximal_weight 0.5", out)
    table = capsys.readouterr().out
    for name in ("proximal", "hard_labels", "tuned_teacher", "distillation", "lambda_0"):
        assert any(row.startswith(f"{name} ") for row in table.splitlines())
    results = json.loads((out / "baselines" / "results.json").read_text())
    assert set(results) == {"proximal", "hard_labels", "tuned_teacher", "distillation", "lambda_0"}
    assert all("eval_accuracy" in found for found in results.values())
    run(f"{line} --proximal_weight 0", tmp_path / "free")
    assert_equal_weights(out / "baselines" / "lambda_0", tmp_path / "free")
    finetune = f"finetune --model_name_or_path teacher {STEPS} --output_dir {tmp_path / 'by_hand'}"
    assert main(shlex.split(finetune.replace("--learning_rate 1e-3", "--learning_rate 2e-3"))) == 0
    assert_equal_weights(out / "baselines" / "tuned_teacher", tmp_path / "by_hand")
    # The student of the baselines has the layers of the teacher before its fine-tuning.
    by_hand = f"--model_name_or_path teacher --teacher_name_or_path {tmp_path / 'by_hand'} --student_layers 1"
    run(f"{by_hand} --teacher_learning_rate 0 {STEPS}", tmp_path / "distilled")
    assert_equal_weights(out / "baselines" / "distillation", tmp_path / "distilled")
    # Resumed, finished baselines are read.
    old = (out / "baselines" / "hard_labels" / "model.safetensors").stat().st_mtime_ns
    run(f"{line} --baselines hard_labels --proximal_weight 0.5 --resume_from_checkpoint true", out)
    assert (out / "baselines" / "hard_labels" / "model.safetensors").stat().st_mtime_ns == old
    capsys.readouterr()
    other = f"{line} --baselines hard_labels --proximal_weight 0.5 --resume_from_checkpoint true --weight_decay 0.3"
    assert main(shlex.split(f"proximal {other} --output_dir {out}")) == 2
    error = capsys.readouterr().err
    assert "weight_decay was 0.01, and now it is 0.3" in error
    assert "baselines/hard_labels" in error


def test_the_table_names_trainings_that_answer_one_class():
    """Against all 2x2 tables of answers to a few examples."""
    for counts in itertools.product(range(3), repeat=4):
        labels, answered = np.repeat([0, 0, 1, 1], counts), np.repeat([0, 1, 0, 1], counts)
        if len(labels):
            metrics = {f"eval_{name}": value for name, value in classification_metrics(answered, labels, 2).items()}
            table = results_table({"proximal": metrics, "hard_labels": {"eval_accuracy": 0.5}})
            constant = len(set(answered)) == 1 or len(set(labels)) == 1
            assert table.endswith("are the same, for proximal") == constant, counts


def test_a_baseline_whose_checkpoint_is_damaged_begins_with_a_zero_head(tmp_path):
    line = f"--teacher_name_or_path teacher --student_layers 1 --baselines hard_labels {STEPS}"
    run(line, tmp_path / "whole")
    run(line, tmp_path / "again")
    folder = tmp_path / "again" / "baselines" / "hard_labels"
    (folder / "results.json").unlink()
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        (checkpoint / "trainer_state.json").write_text("{")
    run(f"{line} --resume_from_checkpoint true", tmp_path / "again")
    assert_equal_weights(folder, tmp_path / "whole" / "baselines" / "hard_labels")


def test_distill_takes_layers_of_its_teacher(tmp_path):
    line = f"distill --teacher_name_or_path tuned --student_layers 1 --layers first {STEPS} --output_dir {tmp_path}"
    assert main(shlex.split(line)) == 0
    card = (tmp_path / "README.md").read_text()
    assert "with `DistillationTrainer` (" in card
    assert "): `teacher=tuned`, `alpha_task=1.0`, `alpha_output=1.0`, `alpha_layer=0.0`, `temperature=2.0`\n" in card
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert hc.steps_of(student)[0]["kept_layers"] == [0]


def test_a_new_bilstm(tmp_path):
    sizes = "--bilstm_hidden_size 8 --bilstm_embedding_size 6 --bilstm_embeddings teacher"
    run(f"--model_name_or_path bilstm {sizes} --teacher_name_or_path teacher {STEPS}", tmp_path)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (type(student).__name__, student.config.hidden_size) == ("BiLSTMForSequenceClassification", 8)
    assert student.config.vocab_size == len(AutoTokenizer.from_pretrained("teacher"))


def test_a_bilstm_reads_the_texts_of_a_pair_one_by_one(tmp_path):
    sizes = "--bilstm_hidden_size 8 --bilstm_embedding_size 6 --pair_mode separate"
    line = f"--model_name_or_path bilstm {sizes} --teacher_name_or_path teacher --baselines hard_labels {PAIRS}"
    run(line, tmp_path)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert student.config.pair_mode == "separate"
    assert "second_input_ids" in AutoTokenizer.from_pretrained(tmp_path).model_input_names
    # The teacher has the tokenizer with which it reads both texts as one.
    assert "second_input_ids" not in AutoTokenizer.from_pretrained(tmp_path / "teacher").model_input_names
    assert main(shlex.split(f"evaluate --models {tmp_path} --data_dir pairs --max_length 16")) == 0


T = "--teacher_name_or_path teacher"
BAD = {
    "no student": (f"{T} {STEPS}", "model_name_or_path must name the student, or student_layers say how many"),
    "all layers": (f"{T} --student_layers 2 {STEPS}", "student_layers must be smaller than the number of the model's"),
    "no layers": (f"{T} --student_layers 0 {STEPS}", "student_layers must be at least 1, got 0"),
    "unknown layers": (f"{T} --layers 0 7 {STEPS}", "layers must be indices of the model's layers 0..1, got 7. 'tea"),
    "a word": (f"{T} --layers middle {STEPS}", "must be even, first, last or one or more values of type int, got"),
    "not alone": (f"{T} --layers first 1 {STEPS}", "'first' must stand alone, got 2 values"),
    "bilstm of layers": (
        f"{T} --model_name_or_path bilstm --student_layers 1 {STEPS}",
        "student_layers must be left out for a new BiLSTM",
    ),
    "bilstm option": (
        f"{T} --student_layers 1 --bilstm_hidden_size 8 {STEPS}",
        "bilstm_hidden_size must be left out unless model_name_or_path is bilstm",
    ),
    "bilstm range": (
        f"{T} --model_name_or_path bilstm --bilstm_dropout 1.5 {STEPS}", "bilstm_dropout must be in 0..1, 1 excluded",
    ),
    "single texts": (
        f"{T} --model_name_or_path bilstm --pair_mode separate {STEPS}",
        "pair_mode must be joint for single texts, got separate and the column 'sentence'",
    ),
    "wrong pair column": (
        f"{T} --model_name_or_path bilstm --pair_mode separate --text_column sentence1 --text_pair_column two {PAIRS}",
        "text_pair_column 'two' is no column of",
    ),
    "other vocabulary": (
        f"{T} --model_name_or_path tuned --tokenizer_name other_words {STEPS}",
        "The tokenizer must have at most the model's",
    ),
    "no head": (
        f"{T} --student_layers 1 --teacher_learning_rate 0 {STEPS}",
        "teacher_name_or_path must be a model that was fine-tuned for this task when teacher_learning_rate is 0",
    ),
    "fixed by the method": (f"{T} --student_layers 1 --alpha_task 1 {STEPS}", "alpha_task must be left out"),
    "shards": (f"{T} --student_layers 1 --fsdp full_shard {STEPS}", "fsdp must not be set for a command"),
    "cache": (f"{T} --student_layers 1 --teacher_cache_dir c {STEPS}", "teacher_cache_dir must be unset: a learning"),
    "unknown baseline": (
        f"{T} --student_layers 1 --baselines magic {STEPS}",
        "baselines must be some of hard_labels, distillation, lambda_0, got 'magic'",
    ),
    "needless baseline": (
        f"--teacher_name_or_path tuned --student_layers 1 --teacher_learning_rate 0 --baselines lambda_0 {STEPS}",
        "baselines must leave out lambda_0 with teacher_learning_rate 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_refusals(case, tmp_path, capsys):
    line, message = BAD[case]
    run(line, tmp_path / "out", code=2)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert last.startswith("hf-compress: ")
    assert not (tmp_path / "out").exists()
