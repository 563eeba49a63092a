"""Writes the step of a finished training into the model's record."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from hf_compress.core.own_config import own_config_
from hf_compress.core.record import append_step, record_of
from hf_compress.methods.weight_pruning.config import NAME, WeightPruningConfig


def config_of(step: dict[str, Any]) -> WeightPruningConfig:
    """The config of one step of a record."""
    return WeightPruningConfig(**{name: value for name, value in step.items() if name != "method"})


def record_step(model: nn.Module, config: WeightPruningConfig, achieved: float) -> None:
    """Write a finished step into a model's config, unless the config already holds it.

    Args:
        model: Its config is changed.
        config: The config of the training.
        achieved: Sparsity over all weights that the config selects.
    """
    own_config_(model)
    model_config: Any = model.config
    completed = dataclasses.replace(config, achieved_sparsity=achieved)
    record, steps = completed.to_record(), record_of(model_config)["steps"]
    # A model that was opened from a checkpoint after the last pruning update carries the step already, maybe before
    # that of another callback. Records of older versions also hold the schedule.
    known = None
    for index in range(-1, -1 - len(steps), -1):
        if steps[index]["method"] != NAME:
            break
        if {**config_of(steps[index]).to_record(), "achieved_sparsity": achieved} == record:
            known = index
            break
    append_step(model_config, NAME, completed, instead_of=known)
