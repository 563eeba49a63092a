"""Engines that hold the weights of a training themselves: FSDP2, whose processes hold parts, and DeepSpeed."""

from __future__ import annotations

import os
from typing import Any, cast

from torch import Tensor
from transformers import TrainingArguments


def launched_with(variable: str) -> bool:
    """Whether `accelerate launch` has set a variable of the environment."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def refuse_deepspeed(args: TrainingArguments) -> None:
    """Refuse a training under DeepSpeed.

    Raises:
        ValueError: Says what to use.
    """
    if getattr(args, "deepspeed", None) or launched_with("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "deepspeed must not be set: its engine clips, steps and saves by itself, past the masks, thresholds and "
            "teachers of this package. Use FSDP2 (fsdp=True) to shard a model, or torchrun alone (DDP)."
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes hold parts of a tensor: whatever looks at all of it makes them exchange the parts."""
    # Asked this way, `torch.distributed.tensor` need not be imported.
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory; the tensor itself where it is whole."""
    part: Tensor = cast(Any, tensor).to_local() if is_sharded(tensor) else tensor
    return part
