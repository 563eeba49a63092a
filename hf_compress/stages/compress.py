"""Applies a method that has no stage of its own: opens a model, compresses it, saves it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from hf_compress.api import compress, steps_of
from hf_compress.core.cost import count_cost
from hf_compress.core.method import MethodConfig
from hf_compress.methods import METHODS
from hf_compress.stages.arguments import (
    CalibrationArguments,
    DeviceArguments,
    MemoryArguments,
    OutputArguments,
    StageArguments,
)
from hf_compress.stages.calibration import calibration_of
from hf_compress.stages.layer_by_layer import compress_layers
from hf_compress.stages.models import ModelArguments, fit_labels, has_head, open_pair, open_pretrained, task_for
from hf_compress.stages.saved import save_stage
from hf_compress.tasks.arguments import DataArguments


logger = logging.getLogger(__name__)

_SEQ_LEN = 128


@dataclass(frozen=True, kw_only=True)
class Compress(StageArguments):
    """What the stage of a method without one of its own takes.

    Args:
        model: A fine-tuned model.
        method: What the method makes of it; decides which method it is.
        calibration: Which training examples the method looks at, if it looks at any.
        data: The task; only read when the method looks at examples.
        output: Where the compressed model goes.
        device: Where it is computed.
        memory: Whether all of the model is in memory.
    """

    model: ModelArguments
    method: MethodConfig
    calibration: CalibrationArguments = CalibrationArguments()
    data: DataArguments
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()
    memory: MemoryArguments = MemoryArguments()


def compress_model(arguments: Compress) -> dict[str, Any]:
    """Compress a model by one method, without training, and save it.

    Returns:
        The recorded step, the cost before and after, and the seconds it took.

    Raises:
        ValueError: If the method cannot be applied, or model and data do not fit together.
    """
    if arguments.memory.layer_by_layer:
        return compress_layers(
            arguments, arguments.model, arguments.method, arguments.data, arguments.output.output_dir,
            arguments.device.device, _SEQ_LEN,
        )  # fmt: skip
    method = next(method for method in METHODS.values() if method.config_class is type(arguments.method))
    reads = method.needs_of(arguments.method).passes > 0
    # A method that looks at no data must not ask for a task.
    task = task_for(arguments.model.model_name_or_path, arguments.data) if reads else None
    if task is None and not has_head(arguments.model.model_name_or_path):
        tokenizer, model = open_pretrained(arguments.model)
    else:
        tokenizer, model = open_pair(arguments.model, task)
    arguments.device.place_(model)
    results: dict[str, Any] = {}
    batches = None
    if task is not None:
        task = fit_labels(task, model, arguments.model.model_name_or_path)
        batches, results = calibration_of(arguments, task, model, tokenizer, arguments.data)
    before = count_cost(model, _SEQ_LEN).to_dict()
    start = time.perf_counter()
    compress(model, arguments.method, data=batches)
    results["seconds"] = round(time.perf_counter() - start, 3)
    results |= {"step": steps_of(model)[-1], "before": before, "after": count_cost(model, _SEQ_LEN).to_dict()}
    save_stage(arguments.output.output_dir, model, tokenizer, results, task)
    return results
