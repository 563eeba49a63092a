"""Exported models in ONNX Runtime, called as their originals are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from hf_compress.core.errors import first_line
from hf_compress.core.exported import ExportedModel


# Files of an exported folder.
GRAPH, INT8_GRAPH, REPORT = "model.onnx", "model_int8.onnx", "export.json"
INSTALL = "pip install 'hf_compress[onnx]'"


def open_session(file: str | os.PathLike[str], threads: int | None = None) -> Any:
    """Open an ONNX file in ONNX Runtime, on the CPU.

    Args:
        file: The file.
        threads: That compute one operation; None: as many as torch uses.

    Raises:
        ValueError: If ONNX Runtime is not installed, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"ONNX Runtime must be installed to run an exported model: {INSTALL}.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Its idle threads would wait for work in a loop and take the cores of what else computes: on two cores PyTorch,
    # timed in turns with it, was seven times slower.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What it makes of a sum and a normalisation takes six times as long as the two (800 tokens x 384, AVX2: 1.5 ms).
    slower = ["SkipLayerNormFusion"]
    # Warnings are about the runtime's own rewriting of graphs.
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=slower
        )
    except Exception as error:
        # Its errors have no class of their own in Python.
        raise ValueError(f"ONNX Runtime cannot open {str(file)!r}: {first_line(error)}") from error


class OnnxModel(ExportedModel):
    """An exported model that is called as the original is, with tensors by name; ONNX Runtime computes it on the CPU.

    Args:
        file: An ONNX file whose outputs have the names of the original's.
        config: Of the original, for pipelines and tasks.
        threads: That compute one operation; None: as many as torch uses now.

    Raises:
        ValueError: If ONNX Runtime is not installed, or cannot read the file.

    Example:
        >>> model = OnnxModel.from_pretrained("exported", int8=True)  # doctest: +SKIP
        >>> model(**tokenizer(["a text"], return_tensors="pt")).logits  # doctest: +SKIP
        tensor([[-1.2031,  1.4410]])
    """

    runtime = "ONNX Runtime"

    def __init__(
        self, file: str | os.PathLike[str], config: PretrainedConfig | None = None, threads: int | None = None
    ) -> None:
        session = open_session(file, threads)
        inputs, outputs = ([entry.name for entry in ends] for ends in (session.get_inputs(), session.get_outputs()))
        super().__init__(Path(file), inputs, outputs, config)
        self.session = session

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], int8: bool = False, threads: int | None = None
    ) -> OnnxModel:
        """Open a folder that `export_onnx` wrote.

        Args:
            folder: The folder.
            int8: Whether to open the graph with weights of eight bits.
            threads: As for the class.

        Raises:
            ValueError: If the folder has no such graph.
        """
        file = Path(folder, INT8_GRAPH if int8 else GRAPH)
        if not file.is_file():
            asked = " with int8" if int8 and Path(folder, GRAPH).is_file() else ""
            raise ValueError(f"{str(folder)!r} has no {file.name}: export the model{asked} first.")
        model = cls(file, AutoConfig.from_pretrained(folder), threads)
        model.numbers = "int8" if int8 else "float32"
        model.facts = export_report(folder)
        return model

    def compute(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        values = self.session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in values]


def export_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the export noted in a folder; empty where there is nothing, or nothing that can be read."""
    try:
        found = json.loads(Path(folder, REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
