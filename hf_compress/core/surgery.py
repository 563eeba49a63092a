"""Cutting linear layers: fewer heads, fewer neurons, with the bookkeeping that each architecture needs.

Every function works on live weights and on meta-device skeletons alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer, architecture_of, layers_of
from hf_compress.core.attention import DeferredLinear, defer_


def _set(block: TransformerLayer, path: str, linear: nn.Linear) -> None:
    parent, _, name = path.rpartition(".")
    holder = block.layer.get_submodule(parent)
    old = getattr(holder, name)
    setattr(holder, name, linear)
    if isinstance(old, DeferredLinear):
        defer_(linear, old.owner)


def _like(old: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with the given values and the old one's dtype, mode and `requires_grad`."""
    with torch.device("meta"):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    new.weight = nn.Parameter(weight.detach().to(old.weight.dtype).clone(), requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(old.bias.dtype).clone(), requires_grad=old.bias.requires_grad)
    return new.train(old.training)


def keep_outputs(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """A linear layer that computes only the given outputs.

    Args:
        linear: Any linear layer; not changed.
        rows: [k] int64, indices of the outputs that stay, in their new order.
    """
    rows = rows.to(linear.weight.device)
    return _like(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def keep_inputs(
    linear: nn.Linear, columns: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> nn.Linear:
    """A linear layer that reads only the given inputs.

    Args:
        linear: Any linear layer; not changed.
        columns: [k] int64, indices of the inputs that stay, in their new order.
        weight: [out, k] replacement for the kept columns, when they were corrected; cast to the layer's dtype.
        bias: [out] replacement for the bias.
    """
    columns = columns.to(linear.weight.device)
    weight = linear.weight[:, columns] if weight is None else weight.to(linear.weight.device)
    bias = linear.bias if bias is None else bias.to(linear.weight.device)
    return _like(linear, weight, bias)


def unit_columns(units: Sequence[int], size: int) -> Tensor:
    """The columns that the given units own when each owns `size` neighbours.

    Example:
        >>> unit_columns([0, 2], 2)
        tensor([0, 1, 4, 5])
    """
    starts = torch.as_tensor(list(units), dtype=torch.int64)[:, None] * size
    return (starts + torch.arange(size)).flatten()


def keep_heads_(
    block: TransformerLayer, units: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Remove all attention units but the given ones from a layer, physically.

    Args:
        block: The layer to change.
        units: Ascending indices of the units that stay; at least one.
        weight: [D, kept columns] corrected output projection.
        bias: [D] corrected output bias.
    """
    row, d = block.architecture, block.head_size
    context = unit_columns(units, block.unit_size)
    queries, keys = context, unit_columns(units, d)
    out = keep_inputs(block.attention_out, context, weight, bias)
    if row.fused_attention:
        width = block.attention_out.in_features
        _set(
            block,
            row.queries,
            keep_outputs(block.linear(row.queries), torch.cat([queries + i * width for i in range(3)])),
        )
    else:
        for path, rows in ((row.queries, queries), (row.keys, keys), (row.values, keys)):
            _set(block, path, keep_outputs(block.linear(path), rows))
    _set(block, row.attention_out, out)
    for counter in row.head_counters:
        name, _, times_head_size = counter.partition("*")
        setattr(block.attention, name, len(units) * (d if times_head_size else 1))


def keep_neurons_(
    block: TransformerLayer, neurons: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Remove all feed-forward neurons but the given ones from a layer, physically.

    Args:
        block: The layer to change.
        neurons: [k] int64, ascending indices of the neurons that stay; at least one.
        weight: [D, k] corrected output projection.
        bias: [D] corrected output bias.
    """
    row = block.architecture
    rows = torch.cat([neurons, neurons + block.num_neurons]) if row.fused_gate else neurons
    out = keep_inputs(block.ffn_out, neurons, weight, bias)
    for path in row.ffn_in:
        _set(block, path, keep_outputs(block.linear(path), rows))
    _set(block, row.ffn_out, out)


def resize_(block: TransformerLayer, num_units: int, num_neurons: int) -> None:
    """Give a skeleton layer the shapes of a pruned one; which weights are kept does not matter here."""
    if num_units != block.num_units:
        keep_heads_(block, range(num_units))
    if num_neurons != block.num_neurons:
        keep_neurons_(block, torch.arange(num_neurons))


def resize_layers_(model: PreTrainedModel, heads: Sequence[int], neurons: Sequence[int]) -> None:
    """Give a skeleton the sizes that a record names.

    Args:
        model: Its layers are at least as large.
        heads: Attention units of each layer.
        neurons: Feed-forward neurons of each layer.

    Raises:
        ValueError: If the sizes do not fit the model.
    """
    blocks = layers_of(model)
    if len(heads) != len(blocks) or len(neurons) != len(blocks):
        raise ValueError(
            f"heads_per_layer and neurons_per_layer must have {len(blocks)} entries, "
            f"got {len(heads)} and {len(neurons)}."
        )
    for block, num_units, num_neurons in zip(blocks, heads, neurons, strict=True):
        if num_units > block.num_units or num_neurons > block.num_neurons:
            raise ValueError(
                f"Layer {block.index} must have at most {block.num_units} heads and {block.num_neurons} neurons, "
                f"got {num_units} and {num_neurons}."
            )
        resize_(block, num_units, num_neurons)


def plain_sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The ordinary config fields of a model whose layers all have the same sizes.

    Raises:
        ValueError: Names the layer that stock transformers cannot build.
    """
    row, blocks = architecture_of(model), layers_of(model)
    first = blocks[0]
    for block in blocks:
        if block.num_neurons != first.num_neurons:
            raise ValueError(
                f"Layer {block.index} has {block.num_neurons} neurons, layer 0 has {first.num_neurons}: "
                f"no single {row.ffn_size}."
            )
        if block.num_units != first.num_units:
            raise ValueError(
                f"Layer {block.index} has {block.num_units} heads, layer 0 has {first.num_units}: no single number."
            )
    fields: dict[str, Any] = {row.ffn_size: first.num_neurons}
    if first.attention_out.in_features != first.hidden_size:
        if getattr(model.config, "head_dim", None) is None or not hasattr(model.config, "num_key_value_heads"):
            raise ValueError(
                f"Layer 0 has {first.num_units} heads of size {first.head_size}; {model.config.model_type} derives "
                "the head size from the number of heads and cannot have fewer. Structured pruning keeps them with "
                "prune_heads=False."
            )
        fields["num_key_value_heads"] = first.num_units
        fields["num_attention_heads"] = first.num_units * first.queries_per_unit
    return fields
