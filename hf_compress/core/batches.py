"""What of a batch a model takes, and where.

Letters: B batch, S padded length.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def forward_names(module: nn.Module) -> list[str]:
    """The arguments that a module's `forward` names; `**kwargs` does not count as naming."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, entry in inspect.signature(module.forward).parameters.items() if entry.kind not in kinds]


def accepted_arguments(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a module's `forward` names."""
    named = set(forward_names(module))
    return {name: value for name, value in batch.items() if name in named}


def live_tokens(batch: Mapping[str, Any]) -> Tensor:
    """[B, S] bool, True where the attention mask of a batch keeps a token (everywhere when there is no mask)."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(batch["input_ids"].shape[:2], dtype=torch.bool, device=batch["input_ids"].device)
    return mask.bool()


def on_device(module: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch that a model's `forward` names, on its device."""
    return {k: v.to(module.device) for k, v in accepted_arguments(module, batch).items() if torch.is_tensor(v)}


def main_input(model: PreTrainedModel) -> str:
    """The input that a model cannot do without: `input_ids`, `pixel_values`, `input_values`, ..."""
    return getattr(model.base_model, "main_input_name", "input_ids")


def base_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the base model takes of a batch, on its device; choices [B, C, S] become examples [B C, S].

    Raises:
        ValueError: If the batch is not a dict with the model's main input as a tensor.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"data must be an iterable of dicts of tensors, got {type(batch).__name__} in it.")
    main = main_input(model)
    if not torch.is_tensor(batch.get(main)):
        remedy = " Tokenize the texts first: dataset.map(lambda row: tokenizer(row['text'], truncation=True))."
        raise ValueError(
            f"data must hold dicts with {main}, got the keys {sorted(batch)}."
            + (remedy if any(isinstance(value, str) for value in batch.values()) else "")
        )
    inputs, choices = on_device(model.base_model, batch), main == "input_ids" and batch[main].ndim == 3
    return {k: v.flatten(0, 1) if choices and v.ndim >= 3 else v for k, v in inputs.items()}


def token_masks(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The masks of what a model's layers see, [B, S] bool each: of its tokens, and of its decoder's.

    Images and sounds without an `attention_mask` have none.
    """
    masks = [live_tokens(inputs)] if "attention_mask" in inputs or "input_ids" in inputs else []
    targets = inputs.get("decoder_input_ids", inputs.get("labels"))
    if getattr(model.config, "is_encoder_decoder", False) and targets is not None:
        mask = inputs.get("decoder_attention_mask")
        masks.append(torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool())
    return masks
