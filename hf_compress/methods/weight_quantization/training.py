"""Keeps packed weights out of trainings."""

from __future__ import annotations

from hf_compress.core.method_training import MethodTraining
from hf_compress.methods.weight_quantization.packed import NOT_TRAINABLE, PackedModule


class WeightQuantizationTraining(MethodTraining):
    """Refuses to train a model with packed weights, unless it is frozen below adapters."""

    def begin(self) -> None:
        if any(module.scales.requires_grad for module in self.model.modules() if isinstance(module, PackedModule)):
            raise ValueError(NOT_TRAINABLE)
