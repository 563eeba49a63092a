"""Short names for long contents: two models with one digest have the same weights."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of names, shapes, types and bits of a model's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
