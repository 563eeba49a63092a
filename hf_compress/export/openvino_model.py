"""Exported models in OpenVINO, called as their originals are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.errors import first_line
from hf_compress.core.exported import ExportedModel
from hf_compress.export.graph import write_graph
from hf_compress.export.inputs import Inputs


FILE = "openvino_model.xml"


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ValueError("OpenVINO must be installed to run it: pip install 'hf_compress[openvino]'.") from error
    return openvino


class OpenvinoModel(ExportedModel):
    """An exported model that is called as the original is; OpenVINO computes it on the CPU, in single precision.

    Args:
        file: The `.xml` file; its weights are in the `.bin` beside it.
        config: Of the original.
        threads: That compute one operation; None: as many as torch uses now.

    Raises:
        ValueError: If OpenVINO is not installed, or cannot read the file.
    """

    runtime = "OpenVINO"

    def __init__(self, file: Path, config: PretrainedConfig | None = None, threads: int | None = None) -> None:
        settings = {
            # Processors with matrix units would compute in half precision otherwise.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        }
        openvino = _openvino()
        try:
            compiled = openvino.Core().compile_model(str(file), "CPU", settings)
        except Exception as error:
            # Its errors have no class of their own in Python.
            raise ValueError(f"OpenVINO cannot open {str(file)!r}: {first_line(error)}") from error
        inputs, outputs = ([end.get_any_name() for end in ends] for ends in (compiled.inputs, compiled.outputs))
        super().__init__(file, inputs, outputs, config)
        self._compiled = compiled

    def num_bytes(self) -> int:
        return super().num_bytes() + self.file.with_suffix(".bin").stat().st_size

    def compute(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = self._compiled({name: value.numpy() for name, value in inputs.items()})
        # The next call writes into the same memory.
        return [torch.from_numpy(found[end].copy()) for end in self._compiled.outputs]


def write_openvino(model: PreTrainedModel, inputs: Inputs, names: Sequence[str], file: Path) -> None:
    """Write a model as a graph of OpenVINO, by way of an ONNX file; arguments and errors as for `write_graph`."""
    openvino, graph = _openvino(), file.with_name("recorded.onnx")
    write_graph(model, inputs, names, graph)
    try:
        openvino.save_model(openvino.convert_model(str(graph)), str(file), compress_to_fp16=False)
    except Exception as error:
        raise ValueError(f"OpenVINO cannot convert {type(model).__name__}: {first_line(error)}") from error
    finally:
        graph.unlink(missing_ok=True)
