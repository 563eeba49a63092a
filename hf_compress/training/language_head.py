"""The head of a causal language model: how its logits come from the last hidden states.

Letters: B batch, S padded length, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.modes import evaluating
from hf_compress.core.watching import watched
from hf_compress.training.output_terms import predicts_next_token


@dataclass(frozen=True)
class LanguageHead:
    """A linear layer whose outputs are scaled and capped.

    Args:
        layer: Its weight is [V, D].
        scale: What its outputs are multiplied by.
        cap: The largest size of a logit, which outputs approach smoothly; None: they are not capped.
    """

    layer: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    def shaped(self, outputs: Tensor) -> Tensor:
        """The logits from the outputs of the layer."""
        logits = outputs if self.scale == 1.0 else outputs * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the layer in the precision in which it computes here: autocast may have another one."""
        weight, bias = self.layer.weight, self.layer.bias
        if not torch.is_autocast_enabled(weight.device.type):
            return weight, bias
        dtype = torch.get_autocast_dtype(weight.device.type)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] from what the layer reads, [..., D]."""
        weight, bias = self.weights()
        return self.shaped(F.linear(hidden.to(weight.dtype), weight, bias))


def described_head(model: PreTrainedModel) -> LanguageHead | None:
    """The head that a model's config describes; None where its last layer is no plain linear one."""
    layer: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
    # Adapters, quantised and offloaded layers compute in another way.
    if type(layer) is not nn.Linear or hasattr(layer, "_hf_hook") or layer.weight.is_meta:
        return None
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LanguageHead(layer, scale, getattr(config, "final_logit_softcapping", None))


def language_head(model: PreTrainedModel) -> LanguageHead | None:
    """The head of a causal language model whose loss and logits are nothing but its outputs; None for other models.

    The model runs once on a few tokens: what its class does to the logits beyond its config, or adds to the loss,
    shows there.

    Args:
        model: Without the wrappers of adapters, on its device.
    """
    if not predicts_next_token(model) or model.main_input_name != "input_ids":
        return None
    # Too small a term of the loss for half precision to show.
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return None
    head = described_head(model)
    return head if head is not None and _explains(model, head) else None


@torch.no_grad()
def _explains(model: PreTrainedModel, head: LanguageHead) -> bool:
    ids = (torch.arange(8, device=head.layer.weight.device) * 7 % head.layer.out_features)[None]
    seen: list[Tensor] = []
    with evaluating(model), watched(before=[(head.layer, lambda args, kwargs: seen.extend(args[:1]))]):
        outputs = model(input_ids=ids, labels=ids, return_dict=True)
    if len(seen) != 1 or seen[0].shape[:-1] != ids.shape or outputs.get("loss") is None:
        return False
    logits = head.logits(seen[0])
    loss = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    return _close(logits, outputs.logits) and _close(loss, outputs.loss)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    # A forgotten factor is larger than the rounding of half precision.
    room = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 3e-2
    largest = float(theirs.abs().max())
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= room * max(largest, 1e-6)


@contextmanager
def reading_head(head: LanguageHead, read: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block a function gets what a head reads, [B, S, D]; the head computes one position of each row.

    The function runs within the model's forward pass, where the head's weights are whole and autocast is as in it. The
    graph of the one position holds all parameters of the model, which several processes look for in its outputs.
    """

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        read(args[0])
        return (args[0][:, :1],)

    handle = head.layer.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
