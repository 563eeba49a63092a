"""The record: which steps made this model, kept in `config.json` under `quantization_config`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin


QUANT_METHOD = "hf_compress"
RECORD_VERSION = 1


@dataclass
class CompressionConfig(QuantizationConfigMixin):
    """The list of compression steps of a model, in the order in which they were applied.

    transformers calls the slot "quantization_config"; it is the only public socket through which plain
    `from_pretrained` lets a package reshape a model before its weights are read.

    Args:
        version: Format of the record. A model written by a newer release is refused, not half understood.
        steps: One dict a step: `{"method": <folder name>, ...}`.

    Example:
        >>> CompressionConfig(steps=[{"method": "structured_pruning"}]).to_dict()["version"]
        1
    """

    quant_method: str = QUANT_METHOD
    version: int = RECORD_VERSION
    steps: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "version": self.version, "steps": copy.deepcopy(self.steps)}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
