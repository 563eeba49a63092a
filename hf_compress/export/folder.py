"""Exports models to folders for ONNX Runtime, and compares what they compute before the folder is put in place."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.api import check_finite, steps_of
from hf_compress.core.batches import layer_mask
from hf_compress.core.cost import count_size
from hf_compress.core.exported import ExportedModel
from hf_compress.core.pooling import own_sentence_files
from hf_compress.core.saving import complete_or_absent, require_own_folder, write_json
from hf_compress.export import compressed_tensors
from hf_compress.export.formats import FORMATS, Format
from hf_compress.export.graph import OPSET, called_for_export, output_names, output_values
from hf_compress.export.inputs import Inputs, checked_inputs, example_inputs, read_inputs, size_of
from hf_compress.export.int8 import write_int8
from hf_compress.export.lean_layers import first_token_suffices, lean_layers
from hf_compress.export.onnx_model import GRAPH, INT8_GRAPH, REPORT
from hf_compress.export.rounding import Array


# Outputs of PyTorch and of another runtime may differ by so much, times the largest output if that exceeds 1.
TOLERANCE = 1e-4
# Outputs [examples, tokens].
_SCORES_OF_TOKENS = ("start_logits", "end_logits")
# Real examples that outputs are compared on at most.
_EXAMPLES = 64


def export_onnx(
    model: PreTrainedModel,
    output_dir: str | os.PathLike[str],
    data: Iterable[Mapping[str, Any]],
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None = None,
    int8: bool = False,
    int8_bound: float = 0.1,
) -> dict[str, Any]:
    """Export a dense or compressed model to a folder for ONNX Runtime, with free batch size and length.

    The folder has `model.onnx`, `config.json`, the processor's files and `export.json`, which says what was checked.
    It is put in place after ONNX Runtime has given PyTorch's outputs on real inputs of several batch sizes and
    lengths.

    Args:
        model: In single precision, on any device; not changed.
        output_dir: Folder to write.
        data: Real batches: dicts of tensors as the model takes them, padded. Labels are left out. At most 64 examples
            are read, in whole batches.
        processor: Tokenizer or image processor to save beside the graph.
        int8: Also write `model_int8.onnx`: weights of eight bits, one scale for each output of a product, activations
            of eight bits as they come. If the outputs move too far, products get scales, then layers stay in float.
        int8_bound: How far int8 may move the outputs on `data`: the root mean square of the change over the standard
            deviation of the outputs.

    Returns:
        What `export.json` holds: sizes and differences of the comparison, bytes of the files, with int8 how far the
        outputs moved and which layers stayed in float, the record's steps, the original's parameters and the versions
        of all packages.

    Raises:
        ValueError: Before anything is written, if packages are missing, the model cannot be exported, is not in single
            precision or not finite, or an output differs from PyTorch's by more than 1e-4 (times the largest value if
            that exceeds 1).

    Example:
        >>> import hf_compress as hc
        >>> hc.export_onnx(model, "exported", batches, tokenizer, int8=True)["int8"]["kept"]  # doctest: +SKIP
        []
    """
    return export_model(model, output_dir, data, processor, "onnx", int8, int8_bound)


def export_model(
    model: PreTrainedModel,
    output_dir: str | os.PathLike[str],
    data: Iterable[Mapping[str, Any]],
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    format_: str,
    int8: bool = False,
    int8_bound: float = 0.1,
) -> dict[str, Any]:
    """As `export_onnx`, to any of `FORMATS`; with int8 to ONNX only."""
    require_format(format_, int8)
    if format_ == compressed_tensors.FORMAT:
        return _export_packed(model, output_dir, processor)
    _require_exportable(model)
    require_bound(int8_bound)
    require_own_folder(output_dir, {"the model": getattr(model.config, "_name_or_path", None)})
    batches, target = read_inputs(model, data, _EXAMPLES), FORMATS[format_]
    with complete_or_absent(output_dir) as staged:
        report = {"format": format_, **_exported(model, staged, batches, target)}
        if int8:
            report["int8"] = _int8_report(model, staged, batches, report["outputs"], int8_bound)
        # Nothing but the format's files is there yet.
        report["bytes"] = {file.name: file.stat().st_size for file in sorted(staged.iterdir())}
        _write_beside(model, processor, staged)
        write_json(staged / REPORT, report)
    return report


def _export_packed(
    model: PreTrainedModel,
    output_dir: str | os.PathLike[str],
    processor: PreTrainedTokenizerBase | BaseImageProcessor | None,
) -> dict[str, Any]:
    """Write packed weights for other programs, which open the folder as one of transformers'."""
    require_own_folder(output_dir, {"the model": getattr(model.config, "_name_or_path", None)})
    found = compressed_tensors.packed_model(model)
    with complete_or_absent(output_dir) as staged:
        report = {"format": compressed_tensors.FORMAT, **found.write(staged)}
        report["bytes"] = {file.name: file.stat().st_size for file in sorted(staged.glob("*.safetensors"))}
        _write_processor(model, processor, staged)
    return report


def require_format(name: str, int8: bool = False) -> None:
    """Raise `ValueError` unless the format exists, its packages are installed, and it has int8 if that is asked."""
    if name not in FORMATS and name != compressed_tensors.FORMAT:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, {compressed_tensors.FORMAT}, got {name!r}.")
    if name in FORMATS:
        FORMATS[name].require_packages()
    if int8 and name != "onnx":
        raise ValueError(f"int8 must be left out for format {name}: only the graphs of ONNX Runtime have the guard.")


def _write_beside(
    model: PreTrainedModel, processor: PreTrainedTokenizerBase | BaseImageProcessor | None, folder: Path
) -> None:
    """What readers of a folder need beside the graph."""
    config = copy.deepcopy(model.config)
    # A config that was never saved does not say what head the model has.
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _write_processor(model, processor, folder)


def _write_processor(
    model: PreTrainedModel, processor: PreTrainedTokenizerBase | BaseImageProcessor | None, folder: Path
) -> None:
    """The processor, and how a sentence encoder pools."""
    if processor is not None:
        processor.save_pretrained(folder)
    source = getattr(model.config, "_name_or_path", "")
    for name, content in (own_sentence_files(source) if source else {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def require_bound(int8_bound: float) -> None:
    """Raise `ValueError` unless it is a positive number."""
    if not 0 < int8_bound < math.inf:
        raise ValueError(f"int8_bound must be positive, got {int8_bound}.")


def _require_exportable(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        hint = " Merge its adapters first (merge_and_unload)." if hasattr(model, "peft_config") else ""
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.{hint}")
    other = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if other:
        raise ValueError(
            f"model must be in single precision, got {', '.join(sorted(other))}: call model.float() first."
        )
    check_finite(model)


def _exported(model: PreTrainedModel, folder: Path, batches: Sequence[Inputs], target: Format) -> dict[str, Any]:
    """Write the graph of single precision and compare it; returns the report."""
    start = time.perf_counter()
    names = list(outputs_of(model, batches[0]))
    # Whoever asks for hidden states gets those of all tokens; lean layers have no attention weights to give.
    alone = names == ["logits"] and first_token_suffices(model)
    as_it_is = any(name.startswith("attentions") for name in names) or _masks_pairs(batches[0])
    with nullcontext() if as_it_is else lean_layers(model, narrow=alone, merge="onnx" in target.packages):
        target.write(model, example_inputs(batches[0]), names, folder / target.file)
    seconds = time.perf_counter() - start
    exported = target.open(folder / target.file, None)
    checks = [_compared(model, exported, batch) for batch in checked_inputs(batches)]
    return {
        **({"opset": OPSET} if "onnx" in target.packages else {}),
        "model": type(model).__name__,
        "steps": steps_of(model),
        "size": count_size(model),
        "inputs": list(batches[0]),
        "outputs": names,
        "first_token_alone": alone and not as_it_is,
        "checks": checks,
        "largest_difference": max(check["difference"] for check in checks),
        "seconds": round(seconds, 1),
        "versions": target.versions(),
    }


def _masks_pairs(batch: Inputs) -> bool:
    """Whether a mask says for every pair of tokens whether one sees the other, not only which tokens are padding."""
    mask = batch.get("attention_mask")
    return mask is not None and mask.ndim > 2


def outputs_of(model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
    """The tensors that a model returns, by the names of the exported graph; on the CPU."""
    with called_for_export(model):
        outputs = model(**batch)
    return {name: value.cpu() for name, value in zip(output_names(outputs), output_values(outputs), strict=True)}


def _counting(model: PreTrainedModel, batch: Inputs, outputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs without those of padding, which nobody reads: one row for each example or token."""
    mask = layer_mask(model, batch)
    live = None if mask is None else mask.cpu()

    def of_tokens(name: str, value: Tensor) -> bool:
        # [examples, classes] may have the shape of a mask.
        enough = value.ndim >= 3 or name in _SCORES_OF_TOKENS
        return live is not None and enough and value.shape[:2] == live.shape

    return [value[live] if of_tokens(name, value) else value for name, value in outputs.items()]


def _compared(model: PreTrainedModel, exported: ExportedModel, batch: Inputs) -> dict[str, Any]:
    """The size of a batch, and by how much the outputs of the other runtime differ from PyTorch's at most."""
    wanted = outputs_of(model, batch)
    both = (_counting(model, batch, outputs) for outputs in (wanted, exported(**batch)))
    largest = 0.0
    for name, expected, ours in zip(wanted, *both, strict=True):
        if expected.shape != ours.shape:
            raise ValueError(
                f"The exported {name} must have the shape {list(expected.shape)}, got {list(ours.shape)}: PyTorch "
                "recorded a size that should be free."
            )
        difference = float((ours.double() - expected.double()).abs().max()) if expected.numel() else 0.0
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
        if not difference <= allowed:
            raise ValueError(
                f"The exported {name} differs by {difference:.2g} from PyTorch's on a batch of size {size_of(batch)}; "
                f"at most {allowed:.2g} is allowed."
            )
        largest = max(largest, difference)
    return {"size": size_of(batch), "difference": largest}


def _int8_report(
    model: PreTrainedModel, folder: Path, batches: Sequence[Inputs], names: Sequence[str], bound: float
) -> dict[str, Any]:
    """Write the graph of eight bits, with outputs of these names; returns its part of the report."""
    feeds = [{name: value.cpu().numpy() for name, value in batch.items()} for batch in batches]

    def live(outputs: Sequence[Array], number: int) -> list[Array]:
        named = {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, outputs, strict=True)}
        return [value.numpy() for value in _counting(model, batches[number], named)]

    return asdict(write_int8(folder / GRAPH, folder / INT8_GRAPH, feeds, live, bound))
