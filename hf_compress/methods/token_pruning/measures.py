"""Measures of a forward pass that drops tokens: its arithmetic, and how much its soft masks keep."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import layers_of
from hf_compress.methods.token_pruning.live_tokens import LiveTokens


def relative_cost(model: PreTrainedModel, state: LiveTokens) -> dict[str, tuple[Tensor, Tensor]]:
    """Multiply-accumulates and kept tokens, each with those of the unpruned model on the same real lengths.

    Returns:
        Empty before a forward pass, and after one of the soft phase, which drops nothing.
    """
    if not state.attended or state.soft:
        return {}
    layers = layers_of(model, adapted=True)
    macs, dense = (by_layer.sum() for by_layer in state.macs(layers))
    initial = state.attended[0].sum()
    kept = torch.stack([state.fed[layer.index].sum() for layer in layers]).sum()
    return {"relative_macs": (macs, dense), "keep_rate": (kept, initial * len(layers))}


def regularizer(state: LiveTokens) -> Tensor:
    """Sum over layers of the mean soft mask over live tokens (with `compat="ltp"`, over padding too).

    Returns:
        Scalar: the mean over examples of the mean over their tokens, summed over pruning layers.

    Source:
        LTP specification 5. The released code also averages over padding, which pushes early thresholds up.
    """
    means = []
    for mask, inside in state.soft.values():
        live = inside.to(mask.dtype)
        means.append(((mask * live).sum(1) / live.sum(1).clamp(min=1)).mean())
    return torch.stack(means).sum()
