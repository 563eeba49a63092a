"""What decides a teacher's outputs, as digests: the teacher itself, and each example that it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import live_tokens


# Names, versions and what is returned; the weights' dtype is read from the weights.
_COSMETIC = {
    "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "id2label",
    "label2id", "problem_type", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
    "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
    "experts_implementation", "_experts_implementation",
}  # fmt: skip
# Kernels of one formula, equal to rounding.
_EQUAL_ATTENTION = {None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"}


def _meaning(config: Any) -> Any:
    """A config without its cosmetic fields, also in the configs within it."""
    if isinstance(config, Mapping):
        return {str(name): _meaning(value) for name, value in config.items() if name not in _COSMETIC}
    return [_meaning(value) for value in config] if isinstance(config, list | tuple) else config


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def teacher_fingerprint(model: PreTrainedModel) -> str:
    """A digest of all that decides a model's outputs: another teacher has another one.

    It covers the class of every module, weights and buffers with their dtype, and the config with the record of what
    compressed the model. Fields that name or describe (`name_or_path`, versions, label names) do not count.
    """
    config = _meaning(model.config.to_dict())
    attention = getattr(model.config, "_attn_implementation", None)
    described = {
        "config": config,
        "attention": None if attention in _EQUAL_ATTENTION else attention,
        "modules": [(name, type(module).__qualname__) for name, module in model.named_modules()],
    }
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=repr).encode(), digest_size=16)
    # Buffers too that are not saved, such as rotary frequencies.
    for name, tensor in sorted({**model.state_dict(), **dict(model.named_buffers())}.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def example_keys(inputs: Mapping[str, Any]) -> list[bytes]:
    """One 16-byte key for each example of a batch: its live tokens and where they stand.

    Padding on the right does not change a key. Padding on the left does, because it moves the tokens to positions
    that many models read.

    Args:
        inputs: What the teacher reads, with `input_ids` [B, S].

    Raises:
        ValueError: If there is not one row of tokens for each example.
    """
    ids: Tensor | None = inputs.get("input_ids")
    live = None if ids is None else live_tokens(inputs).cpu()
    if ids is None or live is None or ids.ndim != 2 or live.shape != ids.shape:
        found = {name: tuple(value.shape) for name, value in inputs.items() if torch.is_tensor(value)}
        raise ValueError(
            "teacher_cache_dir needs a batch with input_ids and attention_mask of shape [batch, tokens]; the teacher "
            f"reads {found}. Leave teacher_cache_dir out."
        )
    rest = sorted((name, value) for name, value in inputs.items() if name != "attention_mask")
    keys = []
    for row, mask in enumerate(live):
        digest = hashlib.blake2b(np.flatnonzero(mask.numpy()).tobytes(), digest_size=16)
        for name, value in rest:
            digest.update(name.encode())
            if not torch.is_tensor(value):
                digest.update(repr(value).encode())
                continue
            if value.shape[:1] == live.shape[:1]:
                value = value[row][mask.to(value.device)] if value.shape[:2] == live.shape else value[row]
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(_bytes(value))
        keys.append(digest.digest())
    return keys
