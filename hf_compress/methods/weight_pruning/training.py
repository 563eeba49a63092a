"""Weight pruning in the later training of a pruned model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback

from hf_compress.core.method_training import MethodTraining
from hf_compress.methods.weight_pruning.callbacks import WeightPruningCallback
from hf_compress.methods.weight_pruning.zeros import HeldZerosCallback


class WeightPruningTraining(MethodTraining):
    """Keeps zeros zero, unless a callback of the user decides about them."""

    def callbacks(self, present: Sequence[TrainerCallback]) -> list[TrainerCallback]:
        decided = any(isinstance(callback, WeightPruningCallback | HeldZerosCallback) for callback in present)
        return [] if decided else [HeldZerosCallback()]
