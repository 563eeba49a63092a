"""Writes packed weights in the layout `pack-quantized` of compressed-tensors, which transformers and vLLM read.

Letters: R outputs, C inputs, G groups, b bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.api import steps_of, to_plain
from hf_compress.core.cost import count_size
from hf_compress.methods.weight_quantization.packed import PackedModule, Storage
from hf_compress.methods.weight_quantization.packing import pack, packed_width, unpack


FORMAT = "compressed-tensors"
# Its releases pack other numbers of bits in different ways, and vLLM reads none of them.
_BITS = (4, 8)


@dataclass(frozen=True)
class PackedModel:
    """What is written of a model.

    Args:
        original: As `WeightQuantizationConfig` left it.
        plain: Its config says the layout, its record is gone.
        layers: Name -> each layer of the original with a packed weight.
        scheme: How their weights are stored, in the words of the layout.
    """

    original: PreTrainedModel
    plain: PreTrainedModel
    layers: Mapping[str, PackedModule]
    scheme: dict[str, Any]

    def write(self, folder: Path) -> dict[str, Any]:
        """Write config and weights, and read the weights back.

        Returns:
            The scheme of the weights, how many layers have it, the record's steps, the original's size.
        """
        state = self.plain.state_dict()
        for name, module in self.layers.items():
            del state[f"{name}.weight"]
            state.update({f"{name}.{part}": tensor for part, tensor in _tensors(module).items()})
        self.plain.save_pretrained(folder, state_dict=state)
        _read_back(folder, self.layers)
        return {
            "model": type(self.original).__name__,
            "layers": len(self.layers),
            "weights": self.scheme["weights"],
            "steps": steps_of(self.original),
            "size": count_size(self.original),
        }


def packed_model(model: PreTrainedModel) -> PackedModel:
    """Find out what to write of a model with packed weights, which is not changed.

    Raises:
        ValueError: If the layout cannot say what the model holds.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    storage = _checked(model, packed)
    try:
        plain = to_plain(copy.deepcopy(model))
    except ValueError as error:
        raise ValueError(f"format {FORMAT} must have a model that stock transformers can build: {error}") from error
    scheme = _scheme(storage, _ordered(model))
    others = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    plain.config.quantization_config = {
        "quant_method": FORMAT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": others,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return PackedModel(model, plain, packed, scheme)


def _checked(model: PreTrainedModel, packed: Mapping[str, PackedModule]) -> Storage:
    """How all of the packed modules are stored, in a way that the layout knows."""
    if not packed:
        raise ValueError(
            f"format {FORMAT} must have a model with packed weights, got a {type(model).__name__} without: quantise "
            "it first (hf-compress quantize)."
        )
    storage = next(iter(packed.values())).storage
    if storage.bits not in _BITS:
        raise ValueError(
            f"format {FORMAT} must have weights of 4 or 8 bits, which all that reads it can unpack, got "
            f"{storage.bits}: quantise with bits=4 or bits=8."
        )
    if storage.lists_groups:
        raise ValueError(
            f"format {FORMAT} must have groups of neighbouring inputs, got those of act_order, which its releases "
            "no longer read: quantise with static_groups=True, with group_size=-1 or with act_order=False."
        )
    for name, module in packed.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"format {FORMAT} must have weights of linear layers, got the Conv1D {name}: nothing that reads it "
                "knows such layers."
            )
        if storage.group_size != -1 and module.columns % storage.group_size:
            raise ValueError(
                f"format {FORMAT} must have whole groups, got {module.columns} inputs of {name} and "
                f"group_size={storage.group_size}: quantise with a group_size that divides them, or -1."
            )
    return storage


def _ordered(model: PreTrainedModel) -> bool:
    """Whether columns were rounded in the order of their inputs: the layout tells, though nothing depends on it."""
    return any(bool(step.get("act_order")) for step in steps_of(model))


def _scheme(storage: Storage, ordered: bool) -> dict[str, Any]:
    grouped = storage.group_size != -1
    return {
        "targets": ["Linear"],
        "weights": {
            "num_bits": storage.bits,
            "type": "int",
            "symmetric": storage.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": storage.group_size if grouped else None,
            "actorder": "weight" if ordered else None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _words(numbers: Tensor, bits: int) -> Tensor:
    """[R, ceil(C b / 32)] int32 of numbers [R, C], each row without gaps, the lowest bits first."""
    packed = pack(numbers, bits)
    filled = nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return filled.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _numbers(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `_words`."""
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return unpack(packed[:, : packed_width(columns, bits)], bits, columns)


def _tensors(module: PackedModule) -> dict[str, Tensor]:
    """What the layout stores of a layer: its signed integers are ours less `2**(b - 1)`, which packing adds again."""
    bits, rounded, scales = module.storage.bits, module.rounded(), module.scales.detach()
    found = {
        "weight_packed": _words(rounded.codes, bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    if not module.storage.symmetric:
        # Those of a group of all outputs together.
        zeros = rounded.grid.zero.to(torch.uint8).T.contiguous()
        found["weight_zero_point"] = _words(zeros, bits).T.contiguous()
    return found


def _read_back(folder: Path, packed: Mapping[str, PackedModule]) -> None:
    """Raise `ValueError` unless the files give the weights bit for bit."""
    saved = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for name, module in packed.items():
        bits, scale = module.storage.bits, saved[f"{name}.weight_scale"]
        rows, columns = (int(size) for size in saved[f"{name}.weight_shape"])
        codes = _numbers(saved[f"{name}.weight_packed"], bits, columns)
        zeros = torch.full_like(scale, 2 ** (bits - 1))
        if not module.storage.symmetric:
            zeros = _numbers(saved[f"{name}.weight_zero_point"].T, bits, rows).T.to(scale)
        repeats = columns // scale.shape[1]
        weight = (codes.to(scale) - zeros.repeat_interleave(repeats, 1)) * scale.repeat_interleave(repeats, 1)
        if not torch.equal(weight, module.weight.cpu()):
            raise ValueError(f"format {FORMAT} must give the weights bit for bit, but {name} came back changed.")
