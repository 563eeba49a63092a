"""The config of a model with linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_compress.core.method import MethodConfig


# The largest number of tokens and of slots: larger matrices fit into no memory.
_LARGEST = 2**20


@dataclass(kw_only=True)
class LinformerConfig(MethodConfig):
    """Learned matrices E and F compress keys and values along the time axis to a fixed number of slots.

    Args:
        projected_length: k, the number of slots. For n tokens, attention costs `4 n k` instead of `2 n^2`
            multiply-accumulates per feature, so it pays from n = 2 k on.
        share: Which layers share the matrices E and F. `none`: E and F for each layer; `kv`: F is E; `layer`: one
            matrix for keys and values of all layers.
        slot_mask: Leave out slots that no token reaches (from index number of tokens / `slot_stride` on). If false, as
            published, they take part with a score of zero.
        seed: Random seed of the initial matrices.
        max_tokens: Longest input in tokens. Left out: the number of the model's positions. If it is larger, the
            position embeddings are continued periodically.
        initialization: Initial values of the matrices. `normal`: standard normal entries, as published; `pooling`:
            slot j averages the `slot_stride` neighbouring tokens from `j * slot_stride` on, which is close to dense
            attention from the start.
        length_scaling: Divide by the square root of the number of tokens, as published. `pooling` is an exact average
            without it.
        slot_stride: Number of tokens that a slot averages at the start with `pooling`. Left out:
            `max_tokens / projected_length`, rounded up.

    Source:
        Linformer (arXiv 2006.04768); CALD (arXiv 2410.06846) for the scale, the sharing modes and the random start
        on pretrained weights. `slot_mask`, `pooling` and longer inputs are ours.

    Example:
        >>> LinformerConfig(share="head")
        Traceback (most recent call last):
            ...
        ValueError: share must be one of 'none', 'kv', 'layer', got 'head'.
    """

    projected_length: int = 256
    share: Literal["none", "kv", "layer"] = "none"
    slot_mask: bool = False
    seed: int = 0
    max_tokens: int | None = None
    initialization: Literal["normal", "pooling"] = "normal"
    length_scaling: bool = True
    slot_stride: int | None = None

    def check(self) -> None:
        for name in ("projected_length", "max_tokens", "slot_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
            if value is not None and value > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, got {value}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2**63 - 1, got {self.seed}.")
        if self.slot_stride not in (None, 1) and self.initialization != "pooling":
            raise ValueError(f"slot_stride must go with initialization='pooling', got {self.slot_stride}.")
