"""What a training needs is checked before its first step; damaged checkpoints are one line."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import Rows, pad


ROWS = [Rows()[index] for index in range(16)]


def bert(seed=0, hidden=16):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    ))  # fmt: skip


class Steps(TrainerCallback):
    """Counts what callbacks see."""

    def __init__(self):
        self.steps = self.predictions = 0

    def on_step_begin(self, *args, **kwargs):
        self.steps += 1

    def on_prediction_step(self, *args, **kwargs):
        self.predictions += 1


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def by_class(prediction):
    """Names that only some evaluations have, and no metric at all for two rows."""
    if len(prediction.label_ids) < 3:
        raise RuntimeError("too few")
    return {f"recall_{label}": 1.0 for label in set(prediction.label_ids.tolist())}


def trainer_of(folder, steps=None, trainer_class=CompressionTrainer, metrics=accuracy, rows=ROWS, **options):
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
                "save_strategy": "no", "num_train_epochs": 1, "dataloader_pin_memory": False}  # fmt: skip
    given = {"teacher_model": bert(1, 32)} if issubclass(trainer_class, hc.DistillationTrainer) else {}
    arguments = getattr(trainer_class, "arguments_class", hc.DistillationArguments)
    return trainer_class(
        model=bert(), args=arguments(str(folder), **{**defaults, **options}), train_dataset=ROWS, eval_dataset=rows,
        data_collator=pad, compute_metrics=metrics, callbacks=[steps or Steps()], **given,
    )  # fmt: skip


BEST = {"eval_strategy": "epoch", "save_strategy": "best"}


@pytest.mark.parametrize(("options", "text"), [
    ({**BEST, "metric_for_best_model": "acuracy"}, r"metric_for_best_model is 'acuracy'.* There are: accuracy, loss"),
    ({**BEST, "metric_for_best_model": "eval_f1"}, "'eval_f1', which no evaluation gives"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: it must be at least 1"),
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1"),
    ({"num_train_epochs": -1}, "num_train_epochs is -1 and max_steps is -1"),
    ({"num_train_epochs": float("nan")}, "num_train_epochs is nan"),
    ({"num_train_epochs": float("inf")}, "num_train_epochs is inf"),
    ({"optim": "adamw_bnb_8bit"}, "optim is .*adamw_bnb_8bit.*, which cannot be used: .*bitsandbytes"),
    ({"optim": "galore_adamw"}, "optim is .*galore"),
    ({"push_to_hub": True}, "push_to_hub is set, but the hub cannot be used: .*offline"),
])  # fmt: skip
def test_found_before_the_first_step(tmp_path, options, text):
    steps = Steps()
    with pytest.raises(ValueError, match=text) as found:
        trainer_of(tmp_path, steps, **options).train()
    assert "\n" not in str(found.value)
    assert steps.steps == 0


@pytest.mark.parametrize("trainer_class", [CompressionTrainer, hc.DistillationTrainer, hc.JointTeacherTrainer])
def test_the_check_leaves_no_trace(tmp_path, trainer_class):
    ends = []
    for options in ({**BEST, "metric_for_best_model": "accuracy"}, {"eval_strategy": "epoch"}):
        steps = Steps()
        trainer = trainer_of(tmp_path, steps, trainer_class, **options)
        trainer.train()
        ends.append((trainer.model.state_dict(), steps.predictions, [
            {k: v for k, v in entry.items() if "per_second" not in k and "runtime" not in k}
            for entry in trainer.state.log_history]))  # fmt: skip
    assert ends[0][1:] == ends[1][1:]
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])


class Added(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_added"] = 1.0


@pytest.mark.parametrize("case", ["rare name", "added by a callback", "two sets", "a streamed set", "the loss"])
def test_a_metric_that_is_there_later_is_not_refused(tmp_path, case):
    options, name = {}, "loss"
    if case == "rare name":
        options, name = {"metrics": by_class}, "recall_1"
    elif case == "added by a callback":
        name = "added"
    elif case == "two sets":
        options, name = {"rows": {"one": ROWS[:8], "two": ROWS[8:]}}, "two_accuracy"
    elif case == "a streamed set":
        rows = [{name: torch.as_tensor(value).tolist() for name, value in row.items()} for row in ROWS]
        options, name = {"rows": Dataset.from_list(rows).to_iterable_dataset()}, "accuracy"
        options["remove_unused_columns"] = False
        options["accelerator_config"] = {"dispatch_batches": False}
    trainer = trainer_of(tmp_path, **BEST, metric_for_best_model=name, **options)
    if case == "a streamed set":
        trainer.data_collator = lambda rows: pad(
            [{**row, "input_ids": torch.as_tensor(row["input_ids"])} for row in rows]
        )
    if case == "added by a callback":
        trainer.add_callback(Added())
    trainer.train()
    assert trainer.state.best_metric is not None


class Evil:
    def __reduce__(self):
        return os.system, ("false",)


FILES = {
    "optimizer.pt": "optimizer and schedule",
    "scheduler.pt": "optimizer and schedule",
    "rng_state.pth": "random numbers",
    "model.safetensors": "weights",
    "projectors.safetensors": "projectors",
    "epoch_rng_state_0.pth": "order of the examples",
    "teacher/training_state.pt": "teacher",
    "teacher/model.safetensors": "teacher",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {"save_strategy": "steps", "save_steps": 2, "alpha_layer": 1.0}
    trainer_of(folder, None, hc.JointTeacherTrainer, **options).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("damage", ["truncated", "malicious", "empty", "other"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_are_one_line(tmp_path, checkpoint, name, damage):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    file, content = folder / name, (checkpoint / name).read_bytes()
    evil = pickle.dumps(Evil(), protocol=2)
    damaged = {"truncated": content[: len(content) // 2], "malicious": evil, "empty": b"", "other": b"[1, 2]" * 100}
    file.write_bytes(damaged[damage])
    steps = Steps()
    trainer = trainer_of(tmp_path, steps, hc.JointTeacherTrainer, alpha_layer=1.0)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint .*checkpoint-2.* its {FILES[name]}") as found:
        trainer.train(str(folder))
    assert "\n" not in str(found.value)
    assert steps.steps == 0


def test_a_checkpoint_of_another_model_is_one_line(tmp_path, checkpoint):
    trainer = trainer_of(tmp_path, None, CompressionTrainer)
    trainer.model = trainer.model_wrapped = bert(0, 32)
    with pytest.raises(ValueError, match="its weights cannot be read.*has shape .16. instead of .32.") as found:
        trainer.train(str(checkpoint))
    assert "\n" not in str(found.value)
