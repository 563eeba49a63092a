"""Estimates how long a job takes and how much it writes, from the sizes of models and data and a short measurement."""

from __future__ import annotations

import functools
import time

import torch
from transformers import TrainingArguments

from hf_compress.core.devices import chosen_device
from hf_compress.recipes.examples import Examples
from hf_compress.recipes.origins import Origin
from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.export import Export
from hf_compress.training.arguments import LearningTeacherArguments


_BYTES = 4
# Weights and two moments of each; the models' results and checkpoints are in single precision.
_CHECKPOINT = 3
# What a stage does beside arithmetic: open, read, save.
_OVERHEAD = 5.0
# What an export of a six-layer encoder spends on recording its graph, and on eight bits.
_RECORDING, _EIGHT_BITS = 30.0, 10.0
# The share of the speed of large products that layers of an encoder reach in eager PyTorch.
_REACHED = 0.35


@functools.cache
def multiply_accumulates_per_second(device: str, dtype: torch.dtype) -> float:
    """Measure products of matrices for a tenth of a second: the fastest, for others may be using the machine."""
    left = torch.ones(512, 512, device=device, dtype=dtype)
    seconds: list[float] = []
    while sum(seconds) < 0.1:
        start = time.perf_counter()
        # Reading one value waits for an accelerator.
        float((left @ left)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 512**3 / min(seconds)


def seconds_of(
    arguments: StageArguments, origin: Origin, examples: Examples | None, teacher: Origin | None, models: int
) -> float:
    """Estimate the seconds of a job, roughly.

    Args:
        arguments: Of its stage.
        origin: The model that it starts from.
        examples: What it reads; None: nothing.
        teacher: Of which model it learns.
        models: How many it measures.
    """
    if examples is None:
        return _OVERHEAD
    training = arguments.training_arguments
    overhead = _OVERHEAD
    if training is None:
        if isinstance(arguments, Export):
            # The original and its exported files are measured side by side.
            models = 2 + arguments.export.int8
            overhead += _RECORDING + _EIGHT_BITS * arguments.export.int8
        read = min(arguments.option("calibration_samples") or 0, examples.train) + models * examples.measured
        work = 2.0 * (read + models * _timed(arguments, examples)) * origin.working
    else:
        # A search trains the student that it has chosen once more.
        trainings = 1 + (arguments.option("trials") or 0)
        learned = trainings * _learned(training, examples)
        work = 3.0 * learned * origin.working + trainings * examples.measured * origin.working
        if teacher is not None:
            work += learned * teacher.working * (3 if isinstance(training, LearningTeacherArguments) else 1)
    speed = multiply_accumulates_per_second(*_products(arguments))
    return overhead + work * examples.tokens / (_REACHED * speed)


def _products(arguments: StageArguments) -> tuple[str, torch.dtype]:
    """Where a stage computes its products, and in which numbers."""
    training = arguments.training_arguments
    if training is None:
        return str(chosen_device(arguments.option("device") or "auto")), torch.float32
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    return str(training.device), half


def _timed(arguments: StageArguments, examples: Examples) -> int:
    """How often an example is read of each model whose latency is measured; one more round warms up."""
    sizes = arguments.option("latency_batch_sizes") or ()
    rounds = 1 + (arguments.option("latency_repeats") or 0)
    return len(sizes) * rounds * min(arguments.option("latency_examples") or 0, examples.measured)


def _learned(training: TrainingArguments, examples: Examples) -> float:
    """How many examples a training reads."""
    if training.max_steps > 0:
        return float(training.max_steps * training.train_batch_size * training.gradient_accumulation_steps)
    return training.num_train_epochs * examples.train


def bytes_of(arguments: StageArguments, origin: Origin) -> int:
    """Estimate the bytes that a job writes, at most: its model, and the states of its training."""
    training = arguments.training_arguments
    model = _BYTES * origin.parameters
    if training is None or training.save_strategy == "no":
        return model
    # The new one is written before the oldest is removed.
    kept = 1 + (training.save_total_limit or max(1, round(training.num_train_epochs)))
    return model + _CHECKPOINT * model * kept


def duration(seconds: float) -> str:
    """Write a time so that a person reads it.

    Example:
        >>> duration(8), duration(100), duration(7300)
        ('8 s', '2 min', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
