"""The examples that a method reads when nothing is trained."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_compress.stages.arguments import StageArguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.inputs import calibration_batches, padded_batch
from hf_compress.tasks.task import Batch, Processor, Task


# Of windows that are drawn from a running text, as published.
_WINDOWS = 128
# Tokens of a batch of windows, which all have as many.
_TOKENS = 2**13


def calibration_of(
    arguments: StageArguments, task: Task, model: PreTrainedModel, processor: Processor, data: DataArguments
) -> tuple[list[Batch], dict[str, Any]]:
    """Draw what a method reads: training examples, or windows from random places of a running training text.

    Args:
        arguments: Of the stage; they say how many, and the seed.
        task: With the split `train`.
        model: That reads them.
        processor: Its tokenizer or image processor.
        data: How long an example may be.

    Returns:
        Batches for `data=` of `compress`, and what the results of the stage say about them.

    Raises:
        ValueError: If there is no training text, or too little of it.
    """
    seed: int = arguments.option("calibration_seed")
    length = task.longest(model, processor, data.max_length)
    asked: int = arguments.option("calibration_samples")
    windows = asked if "calibration_samples" in arguments.chosen() else _WINDOWS
    drawn = task.random_windows(processor, length, windows, seed)
    if drawn is None:
        rows = task.encode("train", processor, length)
        samples = arguments.calibration_samples(len(rows))
        batches = calibration_batches(rows, processor, samples, seed)
        return batches, {"calibration_samples": samples, "calibration_seed": seed}
    size = max(_TOKENS // length, 1)
    places = [range(start, min(start + size, windows)) for start in range(0, windows, size)]
    facts = {"calibration_samples": windows, "calibration_seed": seed, "calibration_context": length}
    return [padded_batch(drawn, place, processor) for place in places], facts
