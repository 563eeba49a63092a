"""Compresses a model for a stage layer by layer, where it does not fit into memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_compress.api import method_of, rebuild, steps_of
from hf_compress.core.cost import cost_of_shapes
from hf_compress.core.method import MethodConfig
from hf_compress.core.saved_weights import SavedWeights
from hf_compress.core.skeletons import empty_model
from hf_compress.layer_by_layer import compress_saved
from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.calibration import calibration_of
from hf_compress.stages.models import ModelArguments, fit_labels, kind_for, task_for
from hf_compress.stages.processors import check_vocabulary, open_processor
from hf_compress.stages.saved import save_beside
from hf_compress.tasks.arguments import DataArguments


def compress_layers(
    arguments: StageArguments,
    model_args: ModelArguments,
    config: MethodConfig,
    data: DataArguments,
    output_dir: str,
    device: str,
    seq_len: float,
) -> dict[str, Any]:
    """Compress the layers of a saved model one at a time, and save what a stage saves.

    Args:
        arguments: All arguments of the stage.
        model_args: The model: a folder.
        config: What the method makes of it.
        data: The task; not read by a method that looks at no examples.
        output_dir: Where the compressed model goes.
        device: Where a layer is computed.
        seq_len: Tokens for which the cost is counted.

    Returns:
        The recorded step, the cost before and after, without the number of non-zeros, and the seconds since the
        command was given, for the last time if it was interrupted.

    Raises:
        ValueError: As `compress_folder`, or if model and data do not fit together.
    """
    name = model_args.model_name_or_path
    if model_args.max_positions is not None:
        raise ValueError(f"max_positions must be left out with layer_by_layer, got {model_args.max_positions}.")
    folder, reads = Path(name), method_of(config).needs_of(config).passes > 0
    model = empty_model(folder, SavedWeights(folder), rebuild)
    task = task_for(name, data) if reads else None
    processor = open_processor(model_args.tokenizer_name or name, kind_for(model.config, task))
    check_vocabulary(model.config, processor)
    batches = None
    results: dict[str, Any] = {}
    if task is not None:
        task = fit_labels(task, model, name)
        batches, results = calibration_of(arguments, task, model, processor, data)
    # On the meta device tied weights are separate tensors, and would count twice.
    model.tie_weights()
    before, start = cost_of_shapes(model, seq_len), time.perf_counter()

    def beside(compressed: PreTrainedModel, staged: Path) -> None:
        after = cost_of_shapes(compressed, seq_len)
        results.update(
            step=steps_of(compressed)[-1],
            before=before.to_dict(),
            after=after.to_dict(),
            mac_ratio=(after.macs or 0) / (before.macs or 1),
            seconds=round(time.perf_counter() - start, 3),
        )
        save_beside(staged, output_dir, compressed, processor, results, task)

    compress_saved(folder, output_dir, [config], batches, device, beside)
    return results
