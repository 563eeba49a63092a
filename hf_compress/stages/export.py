"""Export a model for another runtime, and measure it there beside PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from hf_compress.core.exported import ExportedModel
from hf_compress.core.saving import write_json
from hf_compress.export.folder import export_model, require_bound, require_format
from hf_compress.export.formats import FORMATS, open_exported
from hf_compress.export.onnx_model import INT8_GRAPH
from hf_compress.report.latency import measure_latency, speedups, unpadded_batches
from hf_compress.report.machine import OtherWork, environment
from hf_compress.report.quality import Measured, evaluated
from hf_compress.stages.arguments import DeviceArguments, OutputArguments, StageArguments
from hf_compress.stages.evaluate import opened_task
from hf_compress.stages.measured import measured
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.inputs import calibration_batches


logger = logging.getLogger(__name__)

_TORCH = "PyTorch"
# Of the draw of the examples that outputs are compared on, and how many are padded to one length.
_SEED, _BATCH = 0, 16


@dataclass
class ExportArguments:
    """What is exported, to which format, and what is measured.

    Args:
        model_name_or_path: Hub name or folder of the model to export, dense or compressed.
        format: onnx, openvino (where that package is installed), torch-export, or compressed-tensors: packed weights
            of 4 or 8 bits for transformers and vLLM.
        int8: Also write the model with weights of eight bits, in the format onnx; if the outputs move too far,
            products get scales, then layers stay in float.
        int8_bound: How far int8 may move the outputs: the root mean square of their change over their standard
            deviation on real examples.
        check_examples: How many real examples the exported outputs are compared on.
        split: Which split is measured: train, validation or test. Left out: validation, or test where there is none.
        latency_batch_sizes: Batch sizes whose latency is timed, beside PyTorch.
        latency_repeats: How many rounds are timed; PyTorch and the other runtime take turns in each.
        latency_examples: How many examples are timed, evenly spread over the lengths.
    """

    model_name_or_path: str
    format: str = "onnx"
    int8: bool = False
    int8_bound: float = 0.1
    check_examples: int = 64
    split: str | None = None
    latency_batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    latency_repeats: int = 7
    latency_examples: int = 64

    def __post_init__(self) -> None:
        require_format(self.format, self.int8)
        require_bound(self.int8_bound)
        for name in ("check_examples", "latency_repeats", "latency_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if min(self.latency_batch_sizes, default=0) < 1:
            raise ValueError(f"latency_batch_sizes must be at least 1, got {self.latency_batch_sizes}.")


@dataclass(frozen=True, kw_only=True)
class Export(StageArguments):
    """What `export` takes.

    Args:
        export: The model, the format and what is measured.
        data: The task, whose examples are the real inputs.
        output: Where the exported model goes.
        device: Not used: both runtimes are compared on the CPU.
    """

    export: ExportArguments
    data: DataArguments
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()


def export(arguments: Export) -> dict[str, Any]:
    """Export a model, check it against PyTorch on real examples, and measure quality and time side by side.

    Returns:
        What `export.json` holds as `export`; the metrics and latencies of PyTorch and of each exported file.

    Raises:
        ValueError: If the model or the data cannot be opened or do not fit, or the model cannot be exported.
    """
    wanted, data, folder = arguments.export, arguments.data, arguments.output.output_dir
    task, split = opened_task(data, wanted.split, [wanted.model_name_or_path])
    original = measured(wanted.model_name_or_path, task, split, data.max_length, "cpu")
    if wanted.format not in FORMATS:
        return _packed(original, folder, wanted.format)
    rows = original.rows
    batches = calibration_batches(
        rows, original.processor, min(wanted.check_examples, len(rows)), _SEED, batch_size=_BATCH
    )
    processor, runtime = original.processor, FORMATS[wanted.format].runtime
    report = export_model(original.model, folder, batches, processor, wanted.format, wanted.int8, wanted.int8_bound)
    exported = {runtime: open_exported(Path(folder, FORMATS[wanted.format].file))}
    if wanted.int8:
        exported[f"{runtime} int8"] = open_exported(Path(folder, INT8_GRAPH))
    models: dict[str, PreTrainedModel | ExportedModel] = {_TORCH: original.model, **exported}
    measures = {name: _with_model(original, model) for name, model in models.items()}
    results = {
        "export": report,
        "split": split,
        "num_examples": len(rows),
        "metrics": {name: evaluated(each).metrics() for name, each in measures.items()},
        "latency": _timed(measures, wanted),
        "environment": environment(),
    }
    write_json(Path(folder, "results.json"), results)
    return results


def _packed(original: Measured, folder: str, format_: str) -> dict[str, Any]:
    """Write packed weights, which other programs compute with: nothing is timed."""
    report = export_model(original.model, folder, [], original.processor, format_)
    results = {
        "export": report,
        "split": original.split,
        "num_examples": len(original.rows),
        "metrics": {_TORCH: evaluated(original).metrics()},
        "latency": [],
        "environment": environment(),
    }
    write_json(Path(folder, "results.json"), results)
    return results


def _with_model(original: Measured, model: PreTrainedModel | ExportedModel) -> Measured:
    """The same examples for another runtime's model, which is called and moved as a model of transformers is."""
    return replace(original, model=cast(PreTrainedModel, model))


def _timed(measures: Mapping[str, Measured], wanted: ExportArguments) -> list[dict[str, Any]]:
    """For each batch size, what every model took in one interleaved run, and the work that others did meanwhile."""
    models = {name: each.model for name, each in measures.items()}
    first = measures[_TORCH]
    found = []
    for size in _sizes(wanted.latency_batch_sizes, len(first.rows)):
        logger.info("Timing %d models at batch size %d, %d rounds.", len(models), size, wanted.latency_repeats)
        others = OtherWork()
        batches = unpadded_batches(first.rows, first.processor, size, wanted.latency_examples)
        latencies = measure_latency(models, batches, wanted.latency_repeats, warmup=1)
        faster = {name: asdict(each) for name, each in speedups(latencies, _TORCH).items()}
        timed = [each.to_dict() for each in latencies]
        found.append({"batch_size": size, "latencies": timed, "speedups": faster, "others": others.until_now()})
    return found


def _sizes(sizes: Sequence[int], rows: int) -> list[int]:
    return list(dict.fromkeys(min(size, rows) for size in sizes))
