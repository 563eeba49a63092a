"""What a model costs: parameters, non-zeros, multiply-accumulates, bytes, counted on its real modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.batches import base_inputs, seen_tokens
from hf_compress.core.data_needs import readable_data
from hf_compress.core.forward_state import forward_state, state_in
from hf_compress.core.modes import evaluating
from hf_compress.core.projections import NEURON_ROLES, OPTIONAL_ROLES, PackedWeight, Role


@dataclass(frozen=True)
class Cost:
    """Size and arithmetic of a model.

    Args:
        params: Number of parameters, shared ones once; of packed weights as many as they stand for.
        nonzero_params: Those that are not exactly zero; None where weights are on the meta device.
        macs: Multiply-accumulates of one forward pass of the given batch through the layers, without LayerNorm,
            softmax, embeddings (those of patches and the feature encoder of sounds are such) and task head; None
            where they were not counted. DeBERTa projects its embeddings of distances once a batch, and is counted
            so; on real data they count once a sequence.
        bytes: Size of the parameters in their dtype; of packed weights as they are stored.
        macs_by_layer: The MACs of each layer, in order; they sum to `macs`.
    """

    params: int
    nonzero_params: int | None
    macs: float | None
    bytes: int
    macs_by_layer: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@runtime_checkable
class CountsItself(Protocol):
    """A model that is no stack of transformer layers and knows its own arithmetic."""

    def macs_by_layer(self, tokens: float) -> list[float]:
        """Multiply-accumulates of each layer for one sequence of that many tokens, which may be an average."""

    def tokens_read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B] the tokens of each sequence of a batch that the layers read."""


def weights_of(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What a model computes with, and what is stored of it: its parameters both, unless weights are packed."""
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    stored = {id(tensor): tensor for module in packed for tensor in module.stored().values()}
    ordinary: list[Tensor] = [p for p in model.parameters() if id(p) not in stored]
    return ordinary + [cast(Tensor, module.weight) for module in packed], [*ordinary, *stored.values()]


def count_size(model: PreTrainedModel) -> dict[str, Any]:
    """`params`, `nonzero_params` and `bytes` of a `Cost`; of any architecture."""
    weights, stored = weights_of(model)
    empty = any(weight.is_meta for weight in weights)
    return {
        "params": sum(weight.numel() for weight in weights),
        "nonzero_params": None if empty else sum(int(weight.count_nonzero()) for weight in weights),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
    }


def projection_macs(layer: TransformerLayer) -> tuple[int, int]:
    """Multiply-accumulates of one token in the projections of attention and of the feed-forward sublayer."""
    attention = feed_forward = 0
    for role, projection in layer.projections.items():
        macs = projection.in_features * projection.out_features
        if role in (*NEURON_ROLES, Role.FFN_OUT):
            feed_forward += macs
        elif role not in OPTIONAL_ROLES:
            attention += macs
    return attention, feed_forward


def layer_macs(layer: TransformerLayer, seq_len: float, batch_size: int = 1) -> float:
    """Multiply-accumulates of one layer for a batch of equally long sequences, from the shapes of its projections."""
    each = seq_len * sum(projection_macs(layer)) + layer.attention_macs(seq_len)
    return batch_size * each + layer.position_macs


def _own_macs(model: CountsItself, seq_len: float, data: Iterable[Mapping[str, Any]] | None) -> list[float]:
    """Mean multiply-accumulates a sequence in each layer, as the model counts them."""
    if data is None:
        return model.macs_by_layer(seq_len)
    lengths = [length for batch in data for length in model.tokens_read(batch).tolist()]
    if not lengths:
        raise ValueError("data must hold at least one batch, got none.")
    counted = [model.macs_by_layer(length) for length in lengths]
    return [sum(layer) / len(lengths) for layer in zip(*counted, strict=True)]


@torch.no_grad()
def _macs_on(model: PreTrainedModel, layers: list[TransformerLayer], data: Iterable[Mapping[str, Any]]) -> list[float]:
    """Mean multiply-accumulates a sequence in each layer, on real inputs."""
    total, sequences = [0.0] * len(layers), 0
    with evaluating(model):
        for batch in data:
            inputs = base_inputs(model, batch)
            lengths = seen_tokens(model, inputs).sum(1)
            sequences += len(lengths)
            # All of the last layer: what a head does not read is not the method's merit.
            arguments = forward_state(model)
            if (state := state_in(arguments)) is not None:
                model.base_model(**inputs, **arguments)
                found = state.macs(layers)[0].tolist()
            else:
                found = [sum(layer_macs(layer, length) for length in lengths.tolist()) for layer in layers]
            total = [sum(pair) for pair in zip(total, found, strict=True)]
    if not sequences:
        raise ValueError("data must hold at least one batch, got none.")
    return [macs / sequences for macs in total]


def count_cost(
    model: PreTrainedModel,
    seq_len: float = 128,
    batch_size: int = 1,
    data: Iterable[Mapping[str, Any]] | None = None,
) -> Cost:
    """Count parameters, non-zeros, bytes and multiply-accumulates of a model.

    Args:
        model: A supported architecture, compressed or not, or a `BiLSTMForSequenceClassification`.
        seq_len: Tokens of a sequence that the layers see, without padding, of both texts where a model reads two; may
            be an average. Of an image these are its patches and the class token, of a sound the frames of the feature
            encoder, not its samples.
        batch_size: Sequences.
        data: Batches of inputs: texts, images or sounds. When given, the model runs on them, what it drops is not
            counted, and the multiply-accumulates are the mean over their sequences; `seq_len` is not read then.

    Raises:
        ValueError: If the architecture is not supported or a size is not positive.

    Source:
        The MAC model of Kwon et al. 2022 (arXiv 2204.09656), counted on module shapes instead of masks.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> count_cost(BertModel(tiny), seq_len=10).macs   # 10*(4*8*8 + 2*8*16) + 2*10*10*8
        6720.0
    """
    if seq_len <= 0 or batch_size <= 0:
        raise ValueError(f"seq_len and batch_size must be positive, got {seq_len} and {batch_size}.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Weights must be loaded to be counted, got a model on the meta device.")
    if data is not None:
        data = readable_data(model, data, 1)
    if isinstance(model, CountsItself):
        by_layer = [batch_size * macs for macs in _own_macs(model, seq_len, data)]
        return Cost(**count_size(model), macs=sum(by_layer), macs_by_layer=by_layer)
    if data is None:
        return cost_of_shapes(model, seq_len, batch_size)
    by_layer = [batch_size * macs for macs in _macs_on(model, layers_of(model, packed=True), data)]
    return Cost(**count_size(model), macs=sum(by_layer), macs_by_layer=by_layer)


def cost_of_shapes(model: PreTrainedModel, seq_len: float, batch_size: int = 1) -> Cost:
    """Count what `count_cost` counts without data, of a model that may be on the meta device."""
    by_layer = [float(layer_macs(layer, seq_len, batch_size)) for layer in layers_of(model, packed=True)]
    return Cost(**count_size(model), macs=sum(by_layer), macs_by_layer=by_layer)
