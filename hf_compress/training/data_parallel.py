"""What several processes of one training need beyond `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn


def forget_evaluation_(model: nn.Module) -> None:
    """Let a model that was evaluated before be wrapped for training.

    accelerate marks a model that it has prepared for an evaluation alone, and does not wrap it afterwards: each
    process would train a model of its own.
    """
    vars(model).pop("_is_accelerate_prepared", None)


def require_one_device(num_devices: int) -> None:
    """Refuse `nn.DataParallel`, into which `Trainer` puts a model where one process sees several GPUs.

    It returns a loss for each of its copies, and leaves what layers share, as those that drop tokens do, on the first.

    Raises:
        ValueError: If there are several GPUs in one process.
    """
    if num_devices > 1:
        raise ValueError(
            f"n_gpu must be 1, got {num_devices} in one process: the losses and methods of this package do not "
            f"work in nn.DataParallel. Start one process for each (torchrun --nproc_per_node={num_devices} ...) or "
            "set CUDA_VISIBLE_DEVICES to one."
        )


def real_rows(accelerator: Accelerator, batch_size: int) -> int | None:
    """How many rows of an evaluation's batch this process counts; None: all of them, as every process does.

    The last batches are filled up with rows from the beginning of the data, so that all processes have as many.

    Args:
        accelerator: Of the evaluation.
        batch_size: Rows of the batch.
    """
    state, processes = accelerator.gradient_state, accelerator.num_processes
    if processes == 1 or not state.end_of_dataloader or not 0 < state.remainder < processes * batch_size:
        return None
    ours: int = state.remainder - accelerator.process_index * batch_size
    return min(max(ours, 0), batch_size)


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """The mean of a number that each process has."""
    found: list[float] = gather_object([value]) if accelerator.num_processes > 1 else [value]
    return sum(found) / len(found)


def first_rows(inputs: Mapping[str, Any], number: int, batch_size: int) -> dict[str, Any]:
    """The first rows of a batch.

    Args:
        inputs: Tensors with a row for each example, and other things, which stay.
        number: How many.
        batch_size: Rows of the batch.
    """
    return {
        name: value[:number] if isinstance(value, Tensor) and value.dim() and len(value) == batch_size else value
        for name, value in inputs.items()
    }
