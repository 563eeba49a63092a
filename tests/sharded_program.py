"""Trainings that each of two processes runs: with whole models (DDP), and with a part of one each (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.support_rows import UPDATES, train


CONFIG = {
    "fsdp_version": 2,
    "version": 2,
    "reshard_after_forward": True,
    "transformer_layer_cls_to_wrap": ["BertLayer"],
}
SHARDED = {"fsdp": "full_shard", "fsdp_config": CONFIG}


@contextlib.contextmanager
def shards_on_the_cpu() -> Iterator[None]:
    """Let accelerate shard there: it heeds `fsdp_plugin` in processes with GPUs alone. All else is its own."""
    begin = AcceleratorState.__init__

    def admitting(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = admitting
    try:
        yield
    finally:
        AcceleratorState.__init__ = begin


class Begun(TrainerCallback):
    """Whether a training has read a batch."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


def in_parallel(row: str, folder: str) -> dict[str, Any]:
    """Each process has the whole model."""
    found = train(row, Path(folder), gradient_accumulation_steps=1)
    return {"weights": found.weights, "losses": found.losses}


def in_shards(row: str, folder: str, **changes: Any) -> dict[str, Any]:
    """Each process has a part of the model; the training is saved, and resumed from its middle.

    Returns:
        The weights at both ends, or the refusal and the number of updates before it.
    """
    options = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": UPDATES // 2, **SHARDED}
    begun, place = Begun(), Path(folder)
    with shards_on_the_cpu():
        try:
            found = train(row, place / "run", callback=begun, **{**options, **changes})
        except ValueError as error:
            return {"refused": str(error), "updates": begun.steps}
        sharded = all(isinstance(parameter, DTensor) for parameter in found.trainer.model.parameters())
        found.trainer.save_model(str(place / "saved"))
        checkpoint = place / "run" / f"checkpoint-{UPDATES // 2}"
        resumed = train(row, place / "resumed", resume=str(checkpoint), **{**options, **changes})
    return {
        "weights": found.weights, "losses": found.losses, "resumed": resumed.weights, "sharded": sharded,
    }  # fmt: skip
