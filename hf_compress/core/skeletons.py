"""Builds a model of which only the parts outside its layers are in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from hf_compress.core.errors import first_line, one_line
from hf_compress.core.layer_store import put_, require_finite
from hf_compress.core.loaded import require_complete
from hf_compress.core.saved_weights import SavedWeights
from hf_compress.core.weight_files import require_fit


_WHOLE = "Open the model whole, and use compress."


def empty_model(folder: Path, weights: SavedWeights, rebuild: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    """Build the model of a folder, as its config and record describe it, with every weight on the meta device.

    Args:
        folder: Of the saved model.
        weights: Those in the folder; they must fit.
        rebuild: Gives the model the modules of its record.

    Returns:
        The model, in eval mode. Its buffers that no file holds are in memory.

    Raises:
        ValueError: If the config or the record is broken, or the weights do not fit.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except Exception as error:
        # transformers reports a broken file as whatever it breaks first.
        raise ValueError(f"config.json in {str(folder)!r} cannot be read: {first_line(error)}") from error
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else weights.dtype
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
    # On the meta device nothing is drawn, but any class may draw random numbers.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        kind = kind._from_config if kind is not None else AutoModel.from_config
        model: PreTrainedModel = kind(config, dtype=dtype).eval()
    rebuild(model)
    if dtype != torch.float32 and model._keep_in_fp32_modules_strict:
        raise ValueError(
            f"{config.model_type} keeps some modules in float32, which is not possible layer by layer. {_WHOLE}"
        )
    expected = model.state_dict(keep_vars=True)
    unread = weights.match(expected, model.base_model_prefix)
    tied = _tied(model)
    missing = {name for name in expected if name not in weights and tied.get(name, "") not in weights}
    with one_line(f"{str(folder)!r} cannot be compressed layer by layer", ValueError):
        require_complete({"missing_keys": missing, "unexpected_keys": unread}, remedy=_WHOLE)
    require_fit(weights.files, expected, model.base_model_prefix)
    return model


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tensor -> name of the one that stands in for it where files lack it."""
    found = dict(model.all_tied_weights_keys)
    return {**found, **{source: target for target, source in found.items()}}


@torch.no_grad()
def load_outside_(
    model: PreTrainedModel, weights: SavedWeights, inside: Callable[[str], bool], device: torch.device
) -> None:
    """Load what lies outside the layers of an empty model, and put its buffers on a device.

    Where neither the type nor the device differs, these weights stay in the memory of their files: the system reads
    the rows that are used, and may take them away again.

    Args:
        model: As `empty_model` builds it.
        weights: Those of its folder.
        inside: Whether a tensor belongs to a layer.
        device: Where the model computes.

    Raises:
        ValueError: If a weight has the wrong shape or is not finite.
    """
    for name, empty in model.state_dict(keep_vars=True).items():
        if inside(name) or name not in weights:
            continue
        saved = weights.read([name])[name]
        if saved.shape != empty.shape or saved.is_floating_point() != empty.is_floating_point():
            raise ValueError(
                f"The saved weights do not fit config.json: {name} has shape {list(saved.shape)} and type "
                f"{saved.dtype} instead of {list(empty.shape)} and {empty.dtype}."
            )
        require_finite(name, saved)
        # Read once more, because what was looked at has all its pages in memory.
        del saved
        put_(model, name, weights.read([name])[name].to(device, empty.dtype))
    for target, source in _tied(model).items():
        if target not in weights and source in weights:
            put_(model, target, model.get_parameter(source))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
