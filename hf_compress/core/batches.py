"""How a model reads a batch: which entries, on which device, and which tokens its layers see.

Letters: B batch, S padded length in tokens, T padded length in samples of sound.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.architectures import layers_of
from hf_compress.core.modes import evaluating
from hf_compress.core.watching import Stop, watched


# Main input of a model -> how the columns of a raw data set become that input.
_PREPARED_BY = {
    "input_ids": "Tokenize the texts first: dataset.map(lambda row: tokenizer(row['text'], truncation=True)).",
    "pixel_values": "Run the images through the model's image processor first: "
    "dataset.map(lambda row: {'pixel_values': processor(row['image'])['pixel_values'][0]}).",
    "input_values": "Run the sounds through the model's feature extractor first: "
    "dataset.map(lambda row: {'input_values': extractor(row['audio']['array'], sampling_rate=16000)"
    "['input_values'][0]}).",
}


def forward_names(module: nn.Module) -> list[str]:
    """The arguments that a module's `forward` names; `**kwargs` does not count as naming."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, entry in inspect.signature(module.forward).parameters.items() if entry.kind not in kinds]


def accepted_arguments(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a module's `forward` names."""
    named = set(forward_names(module))
    return {name: value for name, value in batch.items() if name in named}


def live_tokens(batch: Mapping[str, Any]) -> Tensor:
    """[B, S] bool, True where the attention mask of a batch of texts keeps a token (everywhere without a mask)."""
    mask: Tensor | None = batch.get("attention_mask")
    ids: Tensor = batch["input_ids"]
    return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()


def main_input(model: PreTrainedModel) -> str:
    """The main input of a model: `input_ids`, `pixel_values`, `input_values`, ..."""
    return str(getattr(model.base_model, "main_input_name", "input_ids"))


def on_device(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch that a model's `forward` names, on its device; images and sounds in its dtype, too."""
    found = {k: v.to(model.device) for k, v in accepted_arguments(model, batch).items() if torch.is_tensor(v)}
    main = main_input(model)
    if main in found and found[main].is_floating_point():
        found[main] = found[main].to(model.dtype)
    return found


def base_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch that the base model takes, on its device; choices [B, C, S] become examples [B C, S].

    Raises:
        ValueError: If the batch is not a dict with the model's main input as a tensor.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"data must be an iterable of dicts of tensors, got {type(batch).__name__} in it.")
    main = main_input(model)
    if not torch.is_tensor(batch.get(main)):
        raise ValueError(f"data must hold dicts with {main}, got the keys {sorted(batch)}.{_remedy(main, batch)}")
    inputs = on_device(cast(PreTrainedModel, model.base_model), batch)
    choices = main == "input_ids" and batch[main].ndim == 3
    return {k: v.flatten(0, 1) if choices and v.ndim >= 3 else v for k, v in inputs.items()}


def _remedy(main: str, batch: Mapping[str, Any]) -> str:
    """Say how raw examples become inputs, if a batch holds raw examples."""
    texts = any(isinstance(value, str) for value in batch.values())
    raw = texts if main == "input_ids" else "image" in batch or "audio" in batch
    return f" {_PREPARED_BY[main]}" if raw and main in _PREPARED_BY else ""


def _frame_mask(model: PreTrainedModel, mask: Tensor) -> Tensor | None:
    """[B, S] bool from a mask of samples [B, T], as a model for sound makes it; None for other models."""
    base: Any = model.base_model
    count = getattr(base, "_get_feat_extract_output_lengths", None)
    if count is None or main_input(model) != "input_values":
        return None
    # wav2vec2's adapter shortens the sequence once more, behind the last layer.
    before = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}
    frames = int(count(mask.new_tensor([mask.shape[-1]]), **before))
    found: Tensor = base._get_feature_vector_attention_mask(frames, mask, **before)
    return found.bool()


def layer_mask(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Find which of the tokens that a model's layers see are real.

    Args:
        model: Any transformers model.
        inputs: Its batch.

    Returns:
        [B, S] bool. For sounds S counts the frames of the feature encoder, and the mask of samples [B, T] becomes the
        one that the model itself makes of it. None where the batch says nothing about padding: all tokens are real.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return live_tokens(inputs) if "input_ids" in inputs else None
    frames = _frame_mask(model, mask)
    return mask.bool() if frames is None else frames


def token_masks(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The masks of the tokens that a model's layers see, [B, S] bool each: of its inputs, and of its decoder's.

    Images and sounds without an `attention_mask` have none.
    """
    mask = layer_mask(model, inputs)
    masks = [] if mask is None else [mask]
    targets = inputs.get("decoder_input_ids", inputs.get("labels"))
    if getattr(model.config, "is_encoder_decoder", False) and targets is not None:
        mask = inputs.get("decoder_attention_mask")
        masks.append(torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool())
    return masks


@torch.no_grad()
def seen_tokens(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The tokens that a model's layers see, and which of them are real.

    Args:
        model: A supported architecture. If its config does not tell how many tokens it makes of its input (patches
            of an image and tokens before them), it runs up to its first layer.
        inputs: Its batch, on its device.

    Returns:
        [B, S] bool, True on real tokens.
    """
    mask = layer_mask(model, inputs)
    values = inputs.get("input_values")
    if mask is None and values is not None:
        mask = _frame_mask(model, torch.ones(values.shape, dtype=torch.int64, device=values.device))
    if mask is not None:
        return mask
    shapes: list[torch.Size] = []

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append((args[0] if args else kwargs["hidden_states"]).shape[:2])
        raise Stop

    with evaluating(model), watched(before=[(layers_of(model, adapted=True)[0].module, look)]):
        model.base_model(**inputs)
    return torch.ones(shapes[0], dtype=torch.bool, device=model.device)
