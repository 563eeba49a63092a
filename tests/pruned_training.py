"""What the tests of weight pruning share: units counted by hand, and a training that watches its zeros."""

import itertools

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_compress as hc


HEAD = "sequence_classification"


# What the patterns mean, spelled out unit by unit.


def units_of(pattern, shape):
    """Index lists (row, column) of each unit of a matrix, for block patterns."""
    rows, columns = (int(size) if size != "channel" else None for size in pattern.split("x"))
    rows, columns = rows or shape[0], columns or shape[1]
    for top, left in itertools.product(range(0, shape[0], rows), range(0, shape[1], columns)):
        yield [
            (r, c) for r in range(top, min(top + rows, shape[0])) for c in range(left, min(left + columns, shape[1]))
        ]


def zero_units(pattern, matrix):
    """(units that are entirely zero, units) of a weight; N:M by groups within rows, filled up with zeros."""
    zero = np.asarray(matrix) == 0
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        zero = np.pad(zero, ((0, 0), (0, -zero.shape[1] % m)), constant_values=True)
        counts = zero.reshape(len(zero), -1, m).sum(2)
        return int((counts >= n).sum()), counts.size
    units = list(units_of(pattern, zero.shape))
    return sum(all(zero[element] for element in unit) for unit in units), len(units)


def linears(model):
    """The layers that a config without names prunes in a BERT classifier."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("bert.encoder")
    }


# In training.


def examples(config, batches, number=16):
    """Examples of one length, as Trainer reads them."""
    others = batches(config, count=1, size=number, length=12, seed=5)[0]
    if "input_ids" not in others:
        (main,) = others.keys() - {"attention_mask"}
        return [{main: value, "labels": index % 2} for index, value in enumerate(others[main])]
    ids = batches(config, count=1, size=number, length=12, seed=5)[0]["input_ids"]
    ids = ids.where(ids != config.pad_token_id, 3)
    return [{"input_ids": row, "labels": index % 2} for index, row in enumerate(ids)]


def arguments(folder, **changes):
    quiet = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(
        folder,
        **{**quiet, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 14, **changes},
    )


SMALL = {"pattern": "4x1", "target_sparsity": 0.9, "pruning_frequency": 3, "start_step": 1, "end_step": 10}


class ZerosStay(TrainerCallback):
    """Runs after the pruning callback and after each update compares the weights with its masks."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for name, mask in self.pruning.masks.items():
            weight = model.get_submodule(name).weight
            assert not weight[mask].any()
            assert torch.equal(optimizer.state[weight]["pruned"], mask)
        self.seen.append(self.pruning.logged_values()["prune/sparsity"])


def pruning_trainer(model, folder, data, config, kind=Trainer, extra=(), **changes):
    callback = hc.WeightPruningCallback(hc.WeightPruningConfig(**config))
    watch = ZerosStay(callback)
    callbacks = [callback, watch, *extra]
    return kind(model, arguments(folder, **changes), train_dataset=data, eval_dataset=data, callbacks=callbacks), watch


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
