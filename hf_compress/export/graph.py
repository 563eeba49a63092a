"""Writes a model as an ONNX graph whose batch size and length are free."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import main_input
from hf_compress.core.errors import first_line
from hf_compress.core.modes import evaluating
from hf_compress.export.inputs import Inputs
from hf_compress.export.lean_layers import MERGED


# The oldest set of operators that PyTorch's exporter writes, so that older runtimes read the file, too.
OPSET = 18
# One file of the protocol-buffer format holds no more.
_LARGEST_FILE = 2**31


def output_names(outputs: Mapping[str, Any]) -> list[str]:
    """Name the tensors of a model's output in the order in which they are exported."""
    names: list[str] = []
    for name, value in outputs.items():
        names += [name] if torch.is_tensor(value) else [f"{name}.{index}" for index in range(len(value))]
    return names


def output_values(outputs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a model's output in the order of `output_names`."""
    return [each for value in outputs.values() for each in ([value] if torch.is_tensor(value) else value)]


def _free_axes(name: str, tensor: Tensor, main: str) -> dict[int, str]:
    """The axes of an input whose size may change from call to call, and what they are called."""
    if main == "pixel_values":
        return {0: "batch"}
    length = "samples" if main == "input_values" else "second_tokens" if name.startswith("second_") else "tokens"
    # Multiple choice: [batch, choices, tokens].
    return {0: "batch", 1: length} if tensor.ndim == 2 else {0: "batch", 1: "choices", 2: length}


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Decoders return no cache of keys and values inside the `with` statement."""
    before = getattr(model.config, "use_cache", None)
    if before is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            model.config.use_cache = before


@contextmanager
def called_for_export(model: PreTrainedModel) -> Iterator[None]:
    """What a model computes inside the `with` statement is what its exported graph shall compute."""
    with evaluating(model), _without_cache(model), torch.no_grad():
        yield


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """PyTorch's exporter warns of its own future and of packages that no model here needs."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(before)


def write_graph(model: PreTrainedModel, inputs: Inputs, names: Sequence[str], file: Path) -> None:
    """Write a model as one ONNX file that holds its weights.

    Args:
        model: In single precision; not changed.
        inputs: Example inputs on the model's device, with at least two examples: the exporter takes an axis of size
            one for a constant.
        names: Of the outputs, as `output_names` gives them.
        file: Is written.

    Raises:
        ValueError: If PyTorch cannot record the model, or one file cannot hold it.
    """
    # Merged products stand in the file instead of those that they were made of.
    tensors = [tensor for name, tensor in model.state_dict().items() if MERGED not in name]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size >= _LARGEST_FILE:
        raise ValueError(
            f"{type(model).__name__} must have less than 2 GiB of weights to be exported into one ONNX file, got "
            f"{size / 2**30:.1f} GiB."
        )
    given, axes = _recording(model, inputs)
    with _recorded_as(model, "ONNX"):
        torch.onnx.export(
            model, (), str(file), dynamo=True, opset_version=OPSET, kwargs=given, dynamic_shapes=axes,
            input_names=list(given), output_names=list(names), external_data=False, verbose=False,
        )  # fmt: skip


def record_model(model: PreTrainedModel, inputs: Inputs) -> torch.export.ExportedProgram:
    """Record a model by `torch.export`, with free batch size and length.

    Args:
        model, inputs: As for `write_graph`.

    Raises:
        ValueError: If PyTorch cannot record the model.
    """
    given, axes = _recording(model, inputs)
    free = {name: dict.fromkeys(own, torch.export.Dim.DYNAMIC) for name, own in axes.items()}
    with _recorded_as(model, "torch.export"):
        return torch.export.export(model, (), given, dynamic_shapes=free)


def _recording(model: PreTrainedModel, inputs: Inputs) -> tuple[Inputs, dict[str, dict[int, str]]]:
    """The inputs to record with, and their free axes."""
    # Different tensors under every name: the exporter takes one tensor under two names for one input.
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    return given, {name: _free_axes(name, tensor, main_input(model)) for name, tensor in given.items()}


@contextmanager
def _recorded_as(model: PreTrainedModel, format_: str) -> Iterator[None]:
    """Record a model inside the `with` statement; what PyTorch says it cannot becomes one line."""
    try:
        with called_for_export(model), _quiet_exporter():
            yield
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        reason = first_line(_root(error))
        raise ValueError(f"{type(model).__name__} cannot be exported to {format_}: {reason}") from error


def _root(error: BaseException) -> BaseException:
    """The first error of a chain: the exporter wraps what happened in advice about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
