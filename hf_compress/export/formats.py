"""The formats that models are exported to: how each is written, opened and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hf_compress.core.exported import ExportedModel
from hf_compress.export import onnx_model, openvino_model, recorded_model
from hf_compress.export.graph import write_graph
from hf_compress.export.inputs import Inputs
from hf_compress.export.onnx_model import GRAPH, INT8_GRAPH, REPORT, OnnxModel, export_report
from hf_compress.export.openvino_model import OpenvinoModel, write_openvino
from hf_compress.export.recorded_model import RecordedModel, write_recorded


_ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        runtime: What computes it.
        file: The main file of its folders.
        packages: That must be installed to write it.
        install: How they are installed.
        write: `(model, inputs, names of the outputs, file)`; raises `ValueError` for a model that it cannot write.
        open: `(file, config)`.
    """

    runtime: str
    file: str
    packages: Sequence[str]
    install: str
    write: Callable[[PreTrainedModel, Inputs, Sequence[str], Path], None]
    open: Callable[[Path, PretrainedConfig | None], ExportedModel]

    def require_packages(self) -> None:
        """Raise `ValueError` unless they are installed."""
        for name in self.packages:
            try:
                version(name)
            except PackageNotFoundError as error:
                raise ValueError(f"The package {name} must be installed to export: {self.install}.") from error

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("hf_compress", "transformers", "torch", *self.packages)}


FORMATS = {
    "onnx": Format(OnnxModel.runtime, GRAPH, _ONNX, onnx_model.INSTALL, write_graph, OnnxModel),
    "openvino": Format(
        OpenvinoModel.runtime,
        openvino_model.FILE,
        ("onnx", "onnxscript", "openvino"),
        "pip install 'hf_compress[onnx,openvino]'",
        write_openvino,
        OpenvinoModel,
    ),
    "torch-export": Format(
        RecordedModel.runtime, recorded_model.FILE, (), "", write_recorded, RecordedModel
    ),
}  # fmt: skip
_SUFFIXES = {Path(each.file).suffix: name for name, each in FORMATS.items()}


def exported_file(name: str) -> Path | None:
    """The exported file that a name stands for; None where it stands for a model of transformers.

    Args:
        name: An exported file, a folder that was exported (its graph of single precision), or a Hub name or folder of
            a model.

    Example:
        >>> exported_file("small_onnx/model_int8.onnx").name, exported_file("google-bert/bert-base-uncased")
        ('model_int8.onnx', None)
    """
    path = Path(name)
    if path.suffix in _SUFFIXES:
        return path
    if not (path / REPORT).is_file():
        return None
    format_ = FORMATS.get(str(export_report(path).get("format")), FORMATS["onnx"])
    return path / format_.file


def open_exported(file: Path) -> ExportedModel:
    """A model in a folder that was exported.

    Raises:
        ValueError: If it is none, its runtime is not installed, or its folder does not say what was exported.
    """
    int8, format_ = file.name == INT8_GRAPH, FORMATS[_SUFFIXES[file.suffix]]
    if not int8 and file.name != format_.file:
        names = ", ".join([INT8_GRAPH, *(each.file for each in FORMATS.values())])
        raise ValueError(f"{str(file)!r} must be a file that export wrote, one of {names}.")
    if not file.is_file():
        raise ValueError(f"{str(file.parent)!r} has no {file.name}: export the model{' with int8' * int8} first.")
    model, facts = format_.open(file, AutoConfig.from_pretrained(file.parent)), export_report(file.parent)
    if "size" not in facts:
        raise ValueError(f"{str(file.parent)!r} has no {REPORT} with the size of the model: export it again.")
    model.facts, model.numbers = facts, "int8" if int8 else "float32"
    return model
