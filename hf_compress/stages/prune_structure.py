"""Shrink a model's structure without training and save it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_compress.api import compress, steps_of
from hf_compress.core.architectures import layers_of
from hf_compress.core.batches import base_inputs, seen_tokens
from hf_compress.core.cost import count_cost
from hf_compress.methods.structured_pruning import StructuredPruningConfig
from hf_compress.methods.structured_pruning.correction import require_tokens
from hf_compress.methods.structured_pruning.modeling import check
from hf_compress.stages.arguments import (
    CalibrationArguments,
    DeviceArguments,
    MemoryArguments,
    OutputArguments,
    StageArguments,
)
from hf_compress.stages.calibration import calibration_of
from hf_compress.stages.layer_by_layer import compress_layers
from hf_compress.stages.models import ModelArguments, fit_labels, open_pair, task_for
from hf_compress.stages.saved import save_stage
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.task import Batch


# Tokens of the printed cost, where the examples are not looked at first and `max_length` says nothing.
_SEQ_LEN = 128


@dataclass(frozen=True, kw_only=True)
class PruneStructure(StageArguments):
    """What `prune_structure` takes.

    Args:
        model: A fine-tuned model.
        pruning: What to remove.
        calibration: Which training examples pruning looks at.
        data: The task.
        output: Where the pruned model goes.
        device: Where it is computed.
        memory: Whether all of the model is in memory.
    """

    model: ModelArguments
    pruning: StructuredPruningConfig
    calibration: CalibrationArguments = CalibrationArguments()
    data: DataArguments
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()
    memory: MemoryArguments = MemoryArguments()


def prune_structure(arguments: PruneStructure) -> dict[str, Any]:
    """Remove heads and neurons from a fine-tuned model and save it.

    Returns:
        The recorded step, the cost before and after, and the seconds it took.

    Raises:
        ValueError: If the budget cannot be met or model and data do not fit together.
    """
    model_args, data, config = arguments.model, arguments.data, arguments.pruning
    if arguments.memory.layer_by_layer:
        return compress_layers(
            arguments, model_args, config, data, arguments.output.output_dir, arguments.device.device,
            config.seq_len or data.max_length or _SEQ_LEN,
        )  # fmt: skip
    task = task_for(model_args.model_name_or_path, data)
    tokenizer, model = open_pair(model_args, task)
    task = fit_labels(task, model, model_args.model_name_or_path)
    arguments.device.place_(model)
    batches, drawn = calibration_of(arguments, task, model, tokenizer, data)
    lengths = _lengths(model, batches)
    seq_len = config.seq_len or sum(lengths) / len(lengths)
    # The method would find out only after its pass over the data.
    require_tokens(layers_of(model), config, sum(lengths))
    check(model, dataclasses.replace(config, seq_len=seq_len))
    before = count_cost(model, seq_len)
    start = time.perf_counter()
    compress(model, config, data=batches)
    seconds = time.perf_counter() - start
    after = count_cost(model, seq_len)
    results = {
        "step": steps_of(model)[-1],
        "before": before.to_dict(),
        "after": after.to_dict(),
        "mac_ratio": (after.macs or 0) / (before.macs or 1),
        "seconds": round(seconds, 3),
        **drawn,
    }
    save_stage(arguments.output.output_dir, model, tokenizer, results, task)
    return results


def _lengths(model: PreTrainedModel, batches: list[Batch]) -> list[int]:
    """How many real tokens the layers see of each example: of an image, its patches and the tokens before them."""
    return [length for batch in batches for length in seen_tokens(model, base_inputs(model, batch)).sum(1).tolist()]
