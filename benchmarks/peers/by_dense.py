"""The dense model itself, for ONNX Runtime in eight bits: nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from benchmarks.peers.setting import Setting


SETTINGS = "dynamic int8 with one scale for each output of a product (our export), and with one for each matrix"
EXPORTED = True


def make(setting: Setting, folder: Path) -> PreTrainedModel:
    return setting.open()


def opened(setting: Setting, folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    return setting.opened(Path(setting.args.dense), model)
