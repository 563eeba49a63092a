"""Adapters on a compressed model: what they are saved with must lead back to that model."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from hf_compress.api import steps_of
from hf_compress.core.record import quantized_by_another


logger = logging.getLogger(__name__)


def _saved_steps(name: str) -> list[dict[str, Any]] | None:
    """The record of a saved model; None where there is none on this machine."""
    try:
        return steps_of(AutoConfig.from_pretrained(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def warn_of_unsaved_base(model: Any, core: PreTrainedModel) -> None:
    """Say that adapters will be saved with the name of another model than the compressed one they are trained on.

    Args:
        model: With adapters of PEFT.
        core: The model below them.
    """
    steps = [] if quantized_by_another(core.config) else steps_of(core)
    if not steps:
        return
    for name in dict.fromkeys(config.base_model_name_or_path for config in model.peft_config.values()):
        if not name or _saved_steps(name) != steps:
            logger.warning(
                "The adapter names %r as its base, which is not the compressed model that it is trained on: it could "
                "not be opened again. Save that model first and put the adapter on AutoModel....from_pretrained("
                "folder), or save the result of merge_and_unload() instead of the adapter.",
                name,
            )
