"""Cuts linear layers to fewer heads and neurons, and updates the sizes that each architecture stores.

Every function works on live weights and on meta-device skeletons alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.architectures import TransformerLayer, architecture_of, layers_of
from hf_compress.core.empty_attention import empty_attention_
from hf_compress.core.layers import specialise_
from hf_compress.core.projections import (
    HEAD_ROLES,
    NEURON_ROLES,
    InputlessConv1D,
    Projection,
    Role,
    matrix_of,
)


# Buffer of an attention module that lost heads: the indices of the dense model's heads that it still has.
KEPT_HEADS = "kept_heads"


def renewed(old: Tensor, values: Tensor) -> nn.Parameter:
    """A parameter with other values in place of an old one; device, dtype and `requires_grad` stay."""
    # A copy, because a view would keep the dense weight in memory.
    copy = values.detach().to(old.device, old.dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=old.requires_grad)


def _replace_(module: nn.Linear | Conv1D, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer another weight [outputs, inputs] and bias; dtype and `requires_grad` stay."""
    module.weight = renewed(module.weight, weight.T if isinstance(module, Conv1D) else weight)
    if bias is not None:
        module.bias = renewed(module.bias, bias)
    if isinstance(module, Conv1D):
        module.nf, module.nx = weight.shape
        if not module.nx and not isinstance(module, InputlessConv1D):
            specialise_(module, InputlessConv1D)
    else:
        module.out_features, module.in_features = weight.shape


def keep_outputs_(module: nn.Linear | Conv1D, rows: Tensor) -> None:
    """Let a linear layer compute only the given outputs.

    Args:
        module: Changed in place; it gets new parameters.
        rows: [k] int64, indices of the outputs that stay, in their new order.
    """
    rows = rows.to(module.weight.device)
    _replace_(module, matrix_of(module)[rows], None if module.bias is None else module.bias[rows])


def keep_inputs_(
    module: nn.Linear | Conv1D, columns: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Let a linear layer read only the given inputs.

    Args:
        module: Changed in place; it gets new parameters.
        columns: [k] int64, indices of the inputs that stay, in their new order.
        weight: [outputs, k] replacement for the kept columns, when they were corrected; cast to the layer's dtype.
        bias: [outputs] replacement for the bias.
    """
    columns = columns.to(module.weight.device)
    weight = matrix_of(module)[:, columns] if weight is None else weight.to(module.weight.device)
    bias = module.bias if bias is None else bias.to(module.weight.device)
    _replace_(module, weight, bias)


def unit_columns(units: Sequence[int], size: int) -> Tensor:
    """List the columns of the given units, each of which has `size` neighbouring columns.

    Example:
        >>> unit_columns([0, 2], 2)
        tensor([0, 1, 4, 5])
    """
    starts = torch.as_tensor(list(units), dtype=torch.int64)[:, None] * size
    return (starts + torch.arange(size)).flatten()


def _keep_role_outputs_(layer: TransformerLayer, kept: Mapping[Role, Tensor]) -> None:
    """Cut the outputs of several projections; projections that share a module are cut together.

    Args:
        layer: The layer to change.
        kept: Role -> [k] indices within the projection's own outputs; roles that the layer lacks are ignored.
    """
    modules: dict[str, list[Projection]] = {}
    for projection in layer.projections.values():
        if projection.role in kept:
            modules.setdefault(projection.path, []).append(projection)
    for projections in modules.values():
        rows = torch.cat([kept[projection.role] + projection.start for projection in projections])
        keep_outputs_(projections[0].module, rows)


def keep_heads_(
    layer: TransformerLayer, units: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Cut a layer to the given attention units.

    Args:
        layer: The layer to change.
        units: Ascending indices of the units that stay. Without any, the attention adds its output bias only.
        weight: [D, kept columns] corrected output projection.
        bias: [D] corrected output bias.
    """
    row, d, attention = layer.architecture, layer.head_size, layer.attention
    context, grouped = unit_columns(units, layer.unit_size), unit_columns(units, d)
    # A skeleton that loses no heads gets no list of them either.
    if row.head_bias is not None and len(units) < layer.num_units:
        _keep_head_bias_(attention, row.head_bias, units, layer.num_units)
    kept = {role: grouped if role in (Role.KEY, Role.VALUE) else context for role in HEAD_ROLES}
    _keep_role_outputs_(layer, kept)
    keep_inputs_(layer.attention_out.module, context, weight, bias)
    for counter in row.head_counters:
        name, _, times_head_size = counter.partition("*")
        setattr(attention, name, len(units) * (d if times_head_size else 1))
    if not len(units):
        empty_attention_(layer.module, row)


def _keep_head_bias_(attention: nn.Module, argument: str, units: Sequence[int], before: int) -> None:
    """Let an attention module pick the part of its own heads from a bias for all heads of the dense model.

    The indices of its heads are a buffer that is saved with the weights. A skeleton gets a buffer of the right size
    and reads its values with the weights, whichever step of the record removed the heads.
    """
    device = next(attention.parameters()).device
    kept = torch.tensor(list(units), dtype=torch.int64, device=device)
    earlier = getattr(attention, KEPT_HEADS, None)
    if earlier is None:
        position = list(inspect.signature(attention.forward).parameters).index(argument)
        attention.register_forward_pre_hook(_HeadBias(argument, position), with_kwargs=True)
    attention.register_buffer(KEPT_HEADS, kept if earlier is None else earlier[kept])


class _HeadBias:
    """A hook that cuts one argument, [B, H, S, S] and equal for all examples, to the heads that its module kept."""

    def __init__(self, argument: str, position: int) -> None:
        self.argument = argument
        self.position = position

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kept = getattr(module, KEPT_HEADS)
        if self.position < len(args) and args[self.position] is not None:
            narrowed = args[self.position][:1].index_select(1, kept)
            args = (*args[: self.position], narrowed, *args[self.position + 1 :])
        elif kwargs.get(self.argument) is not None:
            kwargs = {**kwargs, self.argument: kwargs[self.argument][:1].index_select(1, kept)}
        return args, kwargs


def keep_neurons_(
    layer: TransformerLayer, neurons: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Cut a layer to the given feed-forward neurons.

    Args:
        layer: The layer to change.
        neurons: [k] int64, ascending indices of the neurons that stay. Without any, the feed-forward sublayer adds
            its output bias only.
        weight: [D, k] corrected output projection.
        bias: [D] corrected output bias.
    """
    _keep_role_outputs_(layer, dict.fromkeys(NEURON_ROLES, neurons))
    keep_inputs_(layer.ffn_out.module, neurons, weight, bias)


def resize_(layer: TransformerLayer, num_units: int, num_neurons: int) -> None:
    """Give a skeleton layer the shapes of a pruned one; its weights are read later."""
    if num_units != layer.num_units:
        keep_heads_(layer, range(num_units))
    if num_neurons != layer.num_neurons:
        keep_neurons_(layer, torch.arange(num_neurons))


def resize_layers_(model: PreTrainedModel, heads: Sequence[int], neurons: Sequence[int]) -> None:
    """Give a skeleton the sizes that a record names.

    Args:
        model: Its layers are at least as large.
        heads: Number of attention units of each layer.
        neurons: Number of feed-forward neurons of each layer.

    Raises:
        ValueError: If the sizes do not fit the model.
    """
    layers = layers_of(model)
    if len(heads) != len(layers) or len(neurons) != len(layers):
        raise ValueError(
            f"heads_per_layer and neurons_per_layer must have {len(layers)} entries, "
            f"got {len(heads)} and {len(neurons)}."
        )
    for layer, num_units, num_neurons in zip(layers, heads, neurons, strict=True):
        if num_units > layer.num_units or num_neurons > layer.num_neurons:
            raise ValueError(
                f"Layer {layer.index} must have at most {layer.num_units} heads and {layer.num_neurons} neurons, "
                f"got {num_units} and {num_neurons}."
            )
        resize_(layer, num_units, num_neurons)


def _require_config(config: PretrainedConfig, fields: Mapping[str, Any], layer: TransformerLayer) -> None:
    """Refuse sizes that the config's class rejects: some need a number of heads that divides the hidden size."""
    values = {**config.to_dict(), **fields}
    values.pop("quantization_config", None)
    try:
        type(config).from_dict(values)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(
            f"Layer 0 has {layer.num_units} heads of size {layer.head_size}, with which {type(config).__name__} does "
            f"not open: {error.__cause__ or error}"
        ) from error


def plain_sizes(model: PreTrainedModel) -> dict[str, Any]:
    """Give the ordinary config fields of a model whose layers all have the same sizes.

    Raises:
        ValueError: Names the layer that stock transformers cannot build.
    """
    row, layers = architecture_of(model), layers_of(model, packed=True)
    first = layers[0]
    for layer in layers:
        if layer.num_neurons != first.num_neurons:
            raise ValueError(
                f"Layer {layer.index} has {layer.num_neurons} neurons, layer 0 has {first.num_neurons}: "
                f"no single {row.ffn_size}."
            )
        if layer.num_units != first.num_units:
            raise ValueError(
                f"Layer {layer.index} has {layer.num_units} heads, layer 0 has {first.num_units}: no single number."
            )
    if not (first.num_units and first.num_neurons):
        raise ValueError(
            f"Layer 0 has {first.num_units} heads and {first.num_neurons} neurons: ordinary layers have at least one."
        )
    fields: dict[str, Any] = {row.ffn_size: first.num_neurons}
    heads = first.num_units * first.queries_per_unit
    if heads != model.config.num_attention_heads:
        if not row.free_heads:
            raise ValueError(
                f"Layer 0 has {first.num_units} heads of size {first.head_size}; {model.config.model_type} derives "
                "the head size from the number of heads and cannot have fewer. Structured pruning keeps them with "
                "prune_heads=False."
            )
        fields["head_dim"] = first.head_size
        fields["num_attention_heads"] = heads
        if hasattr(model.config, "num_key_value_heads"):
            fields["num_key_value_heads"] = first.num_units
        _require_config(model.config, fields, first)
    return fields
