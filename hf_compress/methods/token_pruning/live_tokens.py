"""The state of a forward pass that drops tokens.

Letters: B batch, S padded length, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.cost import projection_macs
from hf_compress.core.modes import is_exporting
from hf_compress.methods.token_pruning.packing import Packing
from hf_compress.methods.token_pruning.recorded import RecordedTokens


@dataclass
class LiveTokens:
    """The live tokens after each layer of one forward pass. Tensors are on the model's device.

    Args:
        whole: Also compute the rows of the last layer that no head reads, for calibration.
        attended: Layer -> [B] number of tokens in its attention.
        fed: Layer -> [B] number of tokens in its feed-forward sublayer.
        packings: Layer -> positions of the tokens that it keeps.
        soft: Layer -> ([B, S] soft keep probabilities, [B, S] bool where they count).
    """

    whole: bool = False
    attended: dict[int, Tensor] = field(default_factory=dict)
    fed: dict[int, Tensor] = field(default_factory=dict)
    packings: dict[int, Packing] = field(default_factory=dict)
    soft: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def kept_after(self, layer: int) -> Tensor | None:
        """[B, S] bool, True for the tokens that a layer keeps; None before it has run."""
        packing = self.packings.get(layer)
        return None if packing is None else packing.live()

    def macs(self, layers: Sequence[TransformerLayer]) -> tuple[Tensor, Tensor]:
        """Multiply-accumulates of the batch with dropped tokens, and those without dropping.

        Returns:
            Two tensors [L] int64, one sum over the batch for each layer.

        Source:
            LTP specification 7.3: `4 D^2 a + 2 D a^2 + 8 D^2 f` a layer and example, with a tokens in attention and f
            in the feed-forward sublayer, here with the real module shapes.
        """
        # Integers stay exact on devices without double precision.
        initial = self.attended[0]
        macs, dense = [], []
        for layer in layers:
            attended, fed = self.attended[layer.index], self.fed[layer.index]
            width = layer.attention_out.in_features
            attending, feeding = projection_macs(layer)
            macs.append((attending * attended + 2 * width * attended * attended + feeding * fed).sum())
            dense.append(((attending + feeding) * initial + 2 * width * initial * initial).sum())
        return torch.stack(macs), torch.stack(dense)


def new_live_tokens(whole: bool) -> Any:
    """Make the state of a new forward pass; while `torch.export` runs, one that only the layers read."""
    return RecordedTokens() if is_exporting() else LiveTokens(whole)
