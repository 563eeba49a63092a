"""Any number of interruptions, at any updates: the training ends with the weights of the unbroken one."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.crash_program import Rows, pad
from tests.stopping import Stop, train_with_stops


ROWS = [Rows()[index] for index in range(30)]
# Eight micro-batches of 4 rows and four updates an epoch, three epochs.
UPDATES = 12


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Every training starts with a full garbage collection; what was imported need not be searched each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def trainer_of(folder, seed, stop=0, trainer_class=CompressionTrainer, **options):
    torch.manual_seed(seed)
    student = BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.2,
    ))  # fmt: skip
    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2, "save_strategy": "no", "eval_strategy": "epoch", "seed": 3,
                "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
                "weight_decay": 0.1, "max_grad_norm": 0.1}  # fmt: skip
    return trainer_class(
        model=student, args=hc.DistillationArguments(str(folder), **{**defaults, **options}), train_dataset=ROWS,
        eval_dataset=ROWS[:8], data_collator=pad, callbacks=[Stop(stop)],
    )  # fmt: skip


def interrupted(folder, stops, **options):
    """The weights in the end, after a stop at each of these updates."""
    trainer = train_with_stops(lambda number, stop: trainer_of(folder, number, stop, **options), folder, stops)
    assert trainer.state.global_step == UPDATES
    return trainer.model.state_dict()


# The first is an epoch's end and then a place inside the next, the second two ends; the others are drawn.
PATTERNS = [[4, 6], [4, 5, 8, 9, 11], [2, 3, 10]]
MORE = [sorted(random.Random(seed).sample(range(1, UPDATES), 1 + seed % 6)) for seed in range(30)]


@pytest.mark.parametrize("sampling", ["group_by_length", "random"])
@pytest.mark.parametrize("patterns", [PATTERNS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "many"])
def test_interruptions_leave_no_trace(tmp_path, sampling, patterns):
    whole = interrupted(tmp_path / "whole", [], train_sampling_strategy=sampling)
    for stops in patterns:
        found = interrupted(tmp_path / "-".join(map(str, stops)), stops, train_sampling_strategy=sampling)
        assert [name for name in whole if not torch.equal(whole[name], found[name])] == [], stops


def test_evaluations_do_not_disturb_the_training(tmp_path):
    """An interruption after an epoch's last update skips the evaluation that would have followed."""
    ends = [
        interrupted(tmp_path / when, [], train_sampling_strategy="group_by_length", eval_strategy=when, eval_steps=1)
        for when in ("no", "steps")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
