"""Round a model's weights to few bits and save them as packed integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_compress.methods.weight_quantization import WeightQuantizationConfig
from hf_compress.stages.arguments import (
    CalibrationArguments,
    DeviceArguments,
    MemoryArguments,
    OutputArguments,
    StageArguments,
)
from hf_compress.stages.compress import Compress, compress_model
from hf_compress.stages.models import ModelArguments
from hf_compress.tasks.arguments import DataArguments


@dataclass(frozen=True, kw_only=True)
class Quantize(StageArguments):
    """What `quantize` takes.

    Args:
        model: A fine-tuned model, pruned or not.
        quantization: How many bits, and how to round.
        calibration: Which training examples `gptq` looks at.
        data: The task; not read with `--algorithm rtn`.
        output: Where the quantised model goes.
        device: Where it is computed.
        memory: Whether all of the model is in memory.
    """

    model: ModelArguments
    quantization: WeightQuantizationConfig
    calibration: CalibrationArguments = CalibrationArguments()
    data: DataArguments
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()
    memory: MemoryArguments = MemoryArguments()


def quantize(arguments: Quantize) -> dict[str, Any]:
    """Round the projections of a model to few bits and save it.

    Returns:
        The recorded step, the cost before and after, and the seconds it took.

    Raises:
        ValueError: If the model cannot be quantised, or model and data do not fit together.
    """
    return compress_model(
        Compress(
            model=arguments.model,
            method=arguments.quantization,
            calibration=arguments.calibration,
            data=arguments.data,
            output=arguments.output,
            device=arguments.device,
            memory=arguments.memory,
            given=arguments.given,
        )
    )
