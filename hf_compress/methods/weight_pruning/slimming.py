"""Cuts dead channels out of layers: what no input can change is removed, and its constant part goes into a bias.

Letters: U attention units (key-value heads), G query heads of a unit, d head size, D hidden, F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.attention import CORE
from hf_compress.core.expressions import matches
from hf_compress.core.forward_state import carries_state
from hf_compress.core.own_config import own_config_
from hf_compress.core.projections import Projection, Role
from hf_compress.core.record import append_step, record_of
from hf_compress.core.rollback import restored_on_failure
from hf_compress.core.surgery import keep_heads_, keep_neurons_, plain_sizes, resize_layers_, unit_columns
from hf_compress.methods.weight_pruning.config import NAME, WeightPruningConfig
from hf_compress.methods.weight_pruning.outcome import config_of


logger = logging.getLogger(__name__)

# The step of a model whose zeros came from elsewhere, or whose weight pruning is further back: nothing new was pruned.
_NOTHING = {"pattern": "1xchannel", "target_sparsity": 0.0, "criterion": "magnitude", "achieved_sparsity": 0.0}


@dataclass(frozen=True)
class Cut:
    """The units that one sublayer keeps.

    Args:
        keep: Ascending indices of the heads or neurons that stay.
        bias: [D] bias of the output projection, with the constants of the removed units added; None: unchanged.
    """

    keep: list[int]
    bias: Tensor | None


def _zero_rows(projection: Projection) -> Tensor:
    """[out] bool"""
    return ~(projection.weight.detach() != 0).any(1)


def _zero_columns(projection: Projection) -> Tensor:
    """[in] bool"""
    return ~(projection.weight.detach() != 0).any(0)


def _bias(projection: Projection) -> Tensor:
    """[out], zeros where there is none."""
    bias = projection.bias
    return projection.weight.new_zeros(projection.out_features) if bias is None else bias.detach()


def _fold(out: Projection, columns: Tensor, constants: Tensor) -> Tensor | None:
    """The bias of a projection some of whose inputs never change; None when they add nothing.

    Args:
        out: The projection.
        columns: [k] the inputs that go.
        constants: [in] their values, 0 where there is no bias to take them.
    """
    shift = out.weight.detach()[:, columns].double() @ constants[columns].double()
    return _bias(out).double() + shift if shift.any() else None


def _kept(gone: Tensor, round_to: int) -> list[int]:
    """Indices that stay: at least one, and a multiple of `round_to` where there are enough."""
    stay = int((~gone).sum())
    wanted = min(-(-max(stay, 1) // round_to) * round_to, len(gone))
    gone = gone.clone()
    gone[gone.nonzero().flatten()[: wanted - stay]] = False
    return [int(index) for index in (~gone).nonzero()]


def _activated(layer: TransformerLayer, values: Tensor) -> Tensor:
    # Some activations look at the number of dimensions.
    activated: Tensor = layer.activation(values.view(1, 1, -1))
    return activated.view(-1)


def dead_neurons(layer: TransformerLayer) -> tuple[Tensor, Tensor]:
    """Feed-forward neurons whose value is the same for every input, or is not read.

    Args:
        layer: Its activation works element by element, as all of transformers do.

    Returns:
        [F] bool, True for what may go, and [F] the constant value of such a neuron (0 where it is not read).
    """
    out, entering = layer.ffn_out, layer.projection(Role.FFN_IN)
    zero, bias = _zero_rows(entering), _bias(entering)
    if layer.architecture.gated:
        gate = layer.projection(Role.GATE)
        first_zero, second_zero, second = _zero_rows(gate), zero, bias
        first = _activated(layer, _bias(gate))
        constants = first * second
        # One factor that is always zero is enough.
        fixed = (first_zero & (second_zero | (first == 0))) | (second_zero & (second == 0))
    else:
        constants, fixed = _activated(layer, bias), zero
    if out.bias is None:
        fixed = fixed & (constants == 0)
    unread = _zero_columns(out)
    return fixed | unread, constants.where(fixed & ~unread, 0)


def dead_units(layer: TransformerLayer) -> tuple[Tensor, Tensor]:
    """Attention units that add the same to every token, or nothing.

    A position of a head counts as dead when its row of the value projection is zero (softmax weights sum to one, so
    its context is the bias) or its column of the output projection is; a unit when all of its positions are.

    Returns:
        [U] bool, True for what may go, and [U * G * d] the constant context of such positions.
    """
    out, d, values = layer.attention_out, layer.head_size, layer.projection(Role.VALUE)
    zero, bias = _zero_rows(values), _bias(values)
    # A replaced attention core need not give weights that sum to one.
    constant = bias == 0 if out.bias is None or hasattr(layer.attention, CORE) else torch.ones_like(zero)
    shape = (layer.num_units, layer.queries_per_unit, d)
    fixed = (zero & constant).view(-1, 1, d).expand(shape)
    unread = _zero_columns(out).view(shape)
    context = bias.view(-1, 1, d).expand(shape).where(fixed & ~unread, 0)
    return (fixed | unread).flatten(1).all(1), context.flatten()


def plan(layer: TransformerLayer, prune_heads: bool, round_to: int) -> tuple[Cut, Cut]:
    """Find what a layer's two sublayers keep. Nothing is changed."""
    gone, context = dead_units(layer)
    heads = _kept(gone if prune_heads else torch.zeros_like(gone), 1)
    units = [unit for unit in range(layer.num_units) if unit not in set(heads)]
    columns = unit_columns(units, layer.unit_size).to(context.device)
    attention = Cut(heads, _fold(layer.attention_out, columns, context) if units else None)
    gone, constants = dead_neurons(layer)
    neurons = _kept(gone, round_to)
    gone = torch.ones_like(gone)
    gone[neurons] = False
    columns = gone.nonzero().flatten()
    return attention, Cut(neurons, _fold(layer.ffn_out, columns, constants) if len(columns) else None)


@torch.no_grad()
def slim(model: PreTrainedModel, round_to: int = 1) -> PreTrainedModel:
    """Cut out the channels that weight pruning left dead, so that zeros become smaller and faster layers.

    It removes feed-forward neurons whose incoming or outgoing weights are all zero, and attention heads without value
    rows or output columns. What a neuron without incoming weights or a head without value rows adds is constant; it
    goes into the next bias. In evaluation mode the outputs stay the same but for rounding. Zero rows and columns
    elsewhere stay, because all heads of a layer have one size. The sizes are written into the last step of the record
    when that is weight pruning, otherwise into a step of their own. When nothing can be removed, a warning says so
    and the model is unchanged.

    Args:
        model: A supported architecture, after training; changed in place. Weights pruned as N:M or in blocks of more
            than one row or column lose that alignment: slim before such a pattern is applied.
        round_to: Keep a multiple of this many neurons in each layer.

    Returns:
        The same model.

    Raises:
        ValueError: If the architecture is not supported or a projection is not an ordinary linear layer. The model is
            unchanged then.

    Source:
        Intel Neural Compressor 2.6, "auto slim", which removes multiples of 32 channels, drawn at random.

    Example:
        >>> import hf_compress as hc
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> channels = hc.WeightPruningConfig(pattern="1xchannel", target_sparsity=0.5, criterion="magnitude",
        ...                                   op_names=[".*intermediate.dense"])
        >>> model = hc.slim(hc.compress(BertModel(tiny), channels))
        >>> hc.steps_of(model)[0]["neurons_per_layer"]
        [8]
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}.")
    layers = layers_of(model)
    steps = record_of(model.config)["steps"]
    # Where tokens are dropped by the attention they get from all heads, a dead head still has a say.
    plans = [plan(layer, not carries_state(model), round_to) for layer in layers]
    removed_heads = sum(layer.num_units - len(heads.keep) for layer, (heads, _) in zip(layers, plans, strict=True))
    removed_neurons = sum(layer.num_neurons - len(cut.keep) for layer, (_, cut) in zip(layers, plans, strict=True))
    if not removed_heads and not removed_neurons:
        logger.warning(
            "Nothing to remove: no whole head and no feed-forward neuron is zero in any of %d layers. Prune with "
            "pattern='1xchannel' and op_names that select the feed-forward layers, e.g. '.*intermediate.dense'.",
            len(layers),
        )
        return model
    goes_on = bool(steps) and steps[-1]["method"] == NAME
    completed = dataclasses.replace(
        config_of(steps[-1] if goes_on else _NOTHING),
        heads_per_layer=[len(heads.keep) for heads, _ in plans],
        neurons_per_layer=[len(neurons.keep) for _, neurons in plans],
    )
    with restored_on_failure(model):
        for layer, (heads, neurons) in zip(layers, plans, strict=True):
            if len(heads.keep) < layer.num_units:
                keep_heads_(layer, heads.keep, bias=heads.bias)
            if len(neurons.keep) < layer.num_neurons:
                keep_neurons_(layer, torch.tensor(neurons.keep), bias=neurons.bias)
        own_config_(model)
        append_step(model.config, NAME, completed, instead_of=-1 if goes_on else None)
    left = {"heads": completed.heads_per_layer, "neurons": completed.neurons_per_layer}
    logger.info("Removed %d heads and %d neurons; each layer keeps: %s.", removed_heads, removed_neurons, left)
    return model


def rebuild(model: PreTrainedModel, config: WeightPruningConfig) -> None:
    """Give a skeleton the sizes that `slim` left; zeros in ordinary weights need nothing.

    Raises:
        ValueError: If the config was never applied or its sizes do not fit the model.
    """
    if config.achieved_sparsity is None:
        raise ValueError("achieved_sparsity must be recorded, got a config that was never applied.")
    # Later on names are matched in the middle of trainings: refuse now what takes too long.
    expressions = [
        x for entry in config.resolved() for x in (*(entry.op_names or ()), *(entry.excluded_op_names or ()))
    ]
    for name, _ in model.named_modules() if expressions else ():
        for expression in expressions:
            matches(name, [expression])
    if config.heads_per_layer is not None and config.neurons_per_layer is not None:
        resize_layers_(model, config.heads_per_layer, config.neurons_per_layer)


def plain(model: PreTrainedModel, config: WeightPruningConfig) -> dict[str, Any]:
    """Config fields that stock transformers needs: none, but for the sizes of a slimmed model."""
    return {} if config.heads_per_layer is None else plain_sizes(model)
