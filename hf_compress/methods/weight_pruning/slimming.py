"""From zero channels to smaller layers: what no input can change is cut out, and its constant share goes into a bias.

Letters: U attention units (key-value heads), G query heads a unit, d head size, D hidden, F feed-forward width.
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
from hf_compress.core.forward_state import carries_state
from hf_compress.core.own_config import own_config_
from hf_compress.core.projections import Projection, Role
from hf_compress.core.record import append_step, record_of
from hf_compress.core.rollback import restored_on_failure
from hf_compress.core.surgery import keep_heads_, keep_neurons_, plain_sizes, resize_layers_, unit_columns
from hf_compress.methods.weight_pruning.config import NAME, WeightPruningConfig
from hf_compress.methods.weight_pruning.expressions import matches


logger = logging.getLogger(__name__)

# The step of a model whose zeros came from elsewhere, or whose weight pruning is further back: nothing new was pruned.
_NOTHING = {"pattern": "1xchannel", "target_sparsity": 0.0, "criterion": "magnitude", "achieved_sparsity": 0.0}


@dataclass(frozen=True)
class Cut:
    """What stays of one sublayer.

    Args:
        keep: Ascending indices of the heads or neurons that stay.
        bias: [D] the next layer's bias with the constants of what goes; None: unchanged.
    """

    keep: list[int]
    bias: Tensor | None


def _zero_rows(linear: Projection) -> Tensor:
    """[out] bool"""
    return ~(linear.weight.detach() != 0).any(1)


def _zero_columns(linear: Projection) -> Tensor:
    """[in] bool"""
    return ~(linear.weight.detach() != 0).any(0)


def _bias(linear: Projection) -> Tensor:
    """[out], zeros where a layer has none."""
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def _fold(out: Projection, columns: Tensor, constants: Tensor) -> Tensor | None:
    """The bias of a layer some of whose inputs never change; None when they add nothing.

    Args:
        out: The layer.
        columns: [k] the inputs that go.
        constants: [in] their values.
    """
    shift = out.weight.detach()[:, columns].double() @ constants[columns].double()
    return out.bias.detach().double() + shift if shift.any() else None


def _kept(gone: Tensor, round_to: int) -> list[int]:
    """Indices that stay: at least one, and a multiple of `round_to` while there are so many."""
    stay = int((~gone).sum())
    wanted = min(-(-max(stay, 1) // round_to) * round_to, len(gone))
    gone = gone.clone()
    gone[gone.nonzero().flatten()[: wanted - stay]] = False
    return (~gone).nonzero().flatten().tolist()


def _activated(block: TransformerLayer, values: Tensor) -> Tensor:
    # Some activations look at the number of dimensions.
    return block.activation(values.view(1, 1, -1)).view(-1)


def dead_neurons(block: TransformerLayer) -> tuple[Tensor, Tensor]:
    """Feed-forward neurons whose value is the same for every input, or that nobody reads.

    Args:
        block: A layer; its activation works element by element, as all of transformers do.

    Returns:
        [F] bool, True for what may go, and [F] the constant value of such a neuron (0 where nobody reads it).
    """
    out, entering = block.ffn_out, block.projection(Role.FFN_IN)
    zero, bias = _zero_rows(entering), _bias(entering)
    if block.architecture.gated:
        gate = block.projection(Role.GATE)
        first_zero, second_zero, second = _zero_rows(gate), zero, bias
        first = _activated(block, _bias(gate))
        constants = first * second
        # One factor that is always zero is enough.
        fixed = (first_zero & (second_zero | (first == 0))) | (second_zero & (second == 0))
    else:
        constants, fixed = _activated(block, bias), zero
    if out.bias is None:
        fixed = fixed & (constants == 0)
    unread = _zero_columns(out)
    return fixed | unread, constants.where(fixed & ~unread, 0)


def dead_units(block: TransformerLayer) -> tuple[Tensor, Tensor]:
    """Attention units that add the same to every token, or nothing.

    A position of a head counts as dead when its row of the value projection is zero (softmax weights sum to one, so
    its context is the bias) or its column of the output projection is; a unit when all of its positions are.

    Returns:
        [U] bool, True for what may go, and [U * G * d] the constant context of such positions.
    """
    out, d, values = block.attention_out, block.head_size, block.projection(Role.VALUE)
    zero, bias = _zero_rows(values), _bias(values)
    # A replaced attention core need not give weights that sum to one.
    constant = bias == 0 if out.bias is None or hasattr(block.attention, CORE) else torch.ones_like(zero)
    shape = (block.num_units, block.queries_per_unit, d)
    fixed = (zero & constant).view(-1, 1, d).expand(shape)
    unread = _zero_columns(out).view(shape)
    context = bias.view(-1, 1, d).expand(shape).where(fixed & ~unread, 0)
    return (fixed | unread).flatten(1).all(1), context.flatten()


def plan(block: TransformerLayer, prune_heads: bool, round_to: int) -> tuple[Cut, Cut]:
    """What stays of a layer: heads, neurons. Nothing is changed."""
    gone, context = dead_units(block)
    heads = _kept(gone if prune_heads else torch.zeros_like(gone), 1)
    units = [unit for unit in range(block.num_units) if unit not in set(heads)]
    columns = unit_columns(units, block.unit_size).to(context.device)
    attention = Cut(heads, _fold(block.attention_out, columns, context) if units else None)
    gone, constants = dead_neurons(block)
    neurons = _kept(gone, round_to)
    gone = torch.ones_like(gone)
    gone[neurons] = False
    columns = gone.nonzero().flatten()
    return attention, Cut(neurons, _fold(block.ffn_out, columns, constants) if len(columns) else None)


@torch.no_grad()
def slim(model: PreTrainedModel, round_to: int = 1) -> PreTrainedModel:
    """Cut out the channels that weight pruning left dead, so that zeros become smaller and faster layers.

    Removed are feed-forward neurons whose incoming weights are all zero (what the activation makes of their bias goes
    into the next bias) or whose outgoing weights are, and attention heads without value rows or output columns. In
    evaluation mode the outputs stay the same but for rounding. Zero rows and columns elsewhere stay as they are: heads
    of one layer have one size. The last step of the record, when it is weight pruning, gets the sizes; otherwise a
    step of its own. When nothing can be removed, a warning says so and the model is unchanged.

    Args:
        model: A supported architecture, after training; changed in place. Layers pruned as N:M or in blocks of more
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
    blocks = layers_of(model)
    steps = record_of(model.config)["steps"]
    # Where tokens are dropped by the attention they get from all heads, a dead head still has a say.
    plans = [plan(block, not carries_state(model), round_to) for block in blocks]
    removed_heads = sum(block.num_units - len(heads.keep) for block, (heads, _) in zip(blocks, plans, strict=True))
    removed_neurons = sum(block.num_neurons - len(cut.keep) for block, (_, cut) in zip(blocks, plans, strict=True))
    if not removed_heads and not removed_neurons:
        logger.warning(
            "Nothing to remove: no whole head and no feed-forward neuron is zero in any of %d layers. Prune with "
            "pattern='1xchannel' and op_names that select the feed-forward layers, e.g. '.*intermediate.dense'.",
            len(blocks),
        )
        return model
    sizes = {
        "heads_per_layer": [len(heads.keep) for heads, _ in plans],
        "neurons_per_layer": [len(neurons.keep) for _, neurons in plans],
    }
    goes_on = bool(steps) and steps[-1]["method"] == NAME
    values = {name: value for name, value in steps[-1].items() if name != "method"} if goes_on else _NOTHING
    completed = dataclasses.replace(WeightPruningConfig(**values), **sizes)
    with restored_on_failure(model):
        for block, (heads, neurons) in zip(blocks, plans, strict=True):
            if len(heads.keep) < block.num_units:
                keep_heads_(block, heads.keep, bias=heads.bias)
            if len(neurons.keep) < block.num_neurons:
                keep_neurons_(block, torch.tensor(neurons.keep), bias=neurons.bias)
        own_config_(model)
        append_step(model.config, NAME, completed, instead_of=-1 if goes_on else None)
    logger.info("Removed %d heads and %d neurons; left: %s.", removed_heads, removed_neurons, sizes)
    return model


def rebuild(model: PreTrainedModel, config: WeightPruningConfig) -> None:
    """Nothing to do while the zeros are in ordinary weights; after `slim`, give a skeleton its sizes.

    Raises:
        ValueError: If the config was never applied or its sizes do not fit the model.
    """
    if config.achieved_sparsity is None:
        raise ValueError("achieved_sparsity must be recorded, got a config that was never applied.")
    # Later on names are matched in the middle of trainings: what takes too long is to be said now.
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
