"""What a model with output gains is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_compress.core.method import MethodConfig


@dataclass(kw_only=True)
class OutputGainConfig(MethodConfig):
    """One learned factor on the feed-forward output of every layer.

    Args:
        strength: How far the first factors are from 1.
        gain_limit: No factor acts as more than this.
        largest_inputs: Filled in by `compress`: the largest input of each layer's last projection.
    """

    flat: ClassVar[tuple[str, ...]] = ("gain_limit",)

    strength: float = 0.1
    gain_limit: float = 2.0
    largest_inputs: list[float] | None = field(default=None, metadata={"output": True})

    def check(self) -> None:
        if not 0 <= self.strength < 1:
            raise ValueError(f"strength must be in [0, 1), got {self.strength}.")
