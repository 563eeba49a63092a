"""What one forward pass notes down about the tokens that it drops.

Letters: B batch, S padded length, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.cost import projection_macs
from hf_compress.core.modes import is_exporting
from hf_compress.methods.token_pruning.packing import Packing


@dataclass
class LiveTokens:
    """Which tokens are still there, layer by layer, in one forward pass. Holds tensors on the model's device.

    Args:
        whole: Compute the rows of the last layer that no head reads, too: calibration wants them.
        attended: Layer -> [B] number of tokens its attention saw.
        fed: Layer -> [B] number of tokens its feed-forward sublayer saw.
        packings: Layer -> where the tokens that leave it stand.
        soft: Layer -> ([B, S] soft keep probabilities, [B, S] bool where they count).
    """

    whole: bool = False
    attended: dict[int, Tensor] = field(default_factory=dict)
    fed: dict[int, Tensor] = field(default_factory=dict)
    packings: dict[int, Packing] = field(default_factory=dict)
    soft: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def kept_after(self, layer: int) -> Tensor | None:
        """[B, S] bool of the tokens that leave a layer; None before it has run."""
        packing = self.packings.get(layer)
        return None if packing is None else packing.live()

    def macs(self, layers: Sequence[TransformerLayer]) -> tuple[Tensor, Tensor]:
        """Multiply-accumulates of the batch whose tokens were dropped on the way, and those without dropping.

        Returns:
            Two tensors [L] int64, for each layer summed over the batch.

        Source:
            LTP specification 7.3: `4 D^2 a + 2 D a^2 + 8 D^2 f` a layer and example, with a tokens in attention and f
            in the feed-forward sublayer, here with the real module shapes.
        """
        # Whole numbers stay exact, also where there is no double precision.
        initial = self.attended[0]
        macs, dense = [], []
        for layer in layers:
            attended, fed = self.attended[layer.index], self.fed[layer.index]
            width = layer.attention_out.in_features
            attending, feeding = projection_macs(layer)
            macs.append((attending * attended + 2 * width * attended * attended + feeding * fed).sum())
            dense.append(((attending + feeding) * initial + 2 * width * initial * initial).sum())
        return torch.stack(macs), torch.stack(dense)


def new_live_tokens(whole: bool) -> LiveTokens:
    """The state of a forward pass that begins.

    Raises:
        ValueError: If `torch.export` records it.
    """
    if is_exporting():
        raise ValueError(
            "torch.export cannot record a model that drops tokens: how many stay depends on the input. Export the "
            "model without this step, or run it with torch."
        )
    return LiveTokens(whole)
