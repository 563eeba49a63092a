"""Records the layers of an encoder with fewer and larger operators than PyTorch runs.

A runtime spends much of a small model's time between operators. So queries, keys and values come from one product, the
scale of the scores is part of its weights, the mask is added as it comes, GELU is written as a runtime knows it, and
the last layer of a classifier computes the token that the head reads, and no other.

Letters: B batch, S padded length, H heads, d head size, D hidden.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from hf_compress.core.architectures import TransformerLayer, layers_of
from hf_compress.core.forward_state import carries_state
from hf_compress.core.projections import Role
from hf_compress.core.surgery import KEPT_HEADS
from hf_compress.methods.token_pruning.layers import FINISH
from hf_compress.methods.token_pruning.modeling import reads_first_token
from hf_compress.methods.weight_quantization.packed import PackedModule


# Child of a layer while it is recorded.
MERGED = "merged_projections"
# Attention functions of transformers whose masks are [B, 1, S or 1, S], the same for every query of an encoder.
_PLAIN_ATTENTION = ("sdpa", "eager")


def _finish_mpnet(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    attention = layer.attention
    attended = attention.LayerNorm(attention.attn.o(context) + residual)
    rows: Tensor = layer.output(layer.intermediate(attended), attended)
    return rows


# Makes masks in transformers, and leaves one of four axes as it is. MPNet of older releases has a way of its own.
_MASKS = "create_bidirectional_mask"
# What follows attention, by model type.
_FINISH: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {**FINISH, "mpnet": _finish_mpnet}


def first_token_suffices(model: PreTrainedModel) -> bool:
    """Whether the head of a model that `lean_layers` changes reads the first token of the last layer and no other."""
    return bool(_changed(model)) and reads_first_token(model) and bool(_layers(model)[-1].num_units)


def _layers(model: PreTrainedModel) -> list[TransformerLayer]:
    # Their projections are called, whatever they are.
    return layers_of(model, adapted=True)


def _changed(model: PreTrainedModel) -> list[TransformerLayer]:
    """The layers of a model that can be recorded in another way."""
    if model.config.model_type not in _FINISH or getattr(model.config, "is_decoder", False):
        return []
    # Linear attention and dropped tokens have graphs of their own.
    if carries_state(model) or model.config._attn_implementation not in _PLAIN_ATTENTION:
        return []
    layers = [layer for layer in _layers(model) if layer.num_units]
    # Classes of other packages may compute anything under a known type.
    classes = {type(module) for layer in layers for module in (layer.module, layer.attention)}
    return layers if all(each.__module__.startswith("transformers.models.") for each in classes) else []


@contextmanager
def lean_layers(model: PreTrainedModel, narrow: bool, merge: bool = True) -> Iterator[None]:
    """Inside the `with` statement, the layers of an encoder compute the same in fewer operators.

    Models of other architectures, and layers without heads, stay as they are. Masks must be [B, S], and nobody may ask
    for attention weights.

    Args:
        model: In evaluation mode; the same as before afterwards.
        narrow: The last layer gives the first token alone: keys and values are those of all tokens; query, output
            projection and feed-forward part are those of the first, which saves about five sixths of its arithmetic.
            Only for models with `first_token_suffices`.
        merge: One product for queries, keys and values, and GELU as a compiled runtime knows it.
    """
    layers = _changed(model)
    last = _layers(model)[-1].index if layers else None
    with ExitStack() as stack, torch.no_grad():
        if layers and hasattr(sys.modules[type(model.base_model).__module__], _MASKS):
            stack.enter_context(_additive_masks(model.base_model))
        for layer in _layers(model) if layers else []:
            stack.enter_context(_biases_alone(layer.module))
        for layer in layers:
            if merge:
                stack.enter_context(_plain_gelus(layer.module))
            alone = narrow and layer.index == last
            if merge or alone:
                stack.enter_context(_recorded_as(layer, _FINISH[model.config.model_type], alone, merge))
        yield


@contextmanager
def _forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the `with` statement, a module computes something else."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _additive_masks(base: Any) -> AbstractContextManager[None]:
    """A model makes nothing of its mask [B, S] but zeros and lowest numbers to add: [B, 1, 1, S].

    Its own way, which knows of causal and packed texts, is twenty operators long.
    """
    original = base.forward

    @wraps(original)
    def forward(*args: Any, **more: Any) -> Any:
        mask = more.get("attention_mask")
        if torch.is_tensor(mask) and mask.ndim == 2:
            more["attention_mask"] = (mask[:, None, None] == 0).to(base.dtype) * torch.finfo(base.dtype).min
        return original(*args, **more)

    return _forward_of(base, forward)


@contextmanager
def _biases_alone(layer: nn.Module) -> Iterator[None]:
    """Output projections without inputs give their bias, and what made those inputs is left out of the graph."""
    with ExitStack() as stack:
        for module in layer.modules():
            if type(module) is nn.Linear and not module.in_features:
                stack.enter_context(_forward_of(module, partial(_bias_of, module)))
        yield


def _bias_of(module: nn.Linear, states: Tensor) -> Tensor:
    # [D], which is added to every token.
    return states.new_zeros(()) if module.bias is None else module.bias


@contextmanager
def _plain_gelus(layer: nn.Module) -> Iterator[None]:
    """GELU in the order of operations that ONNX Runtime replaces by a single one; what exporters write it does not."""
    with ExitStack() as stack:
        for module in layer.modules():
            if type(module) is GELUActivation or (type(module) is nn.GELU and module.approximate == "none"):
                stack.enter_context(_forward_of(module, _gelu))
        yield


def _gelu(states: Tensor) -> Tensor:
    return states * (1 + torch.erf(states / math.sqrt(2))) * 0.5


@contextmanager
def _recorded_as(
    layer: TransformerLayer, finish: Callable[[Any, Tensor, Tensor], Tensor], alone: bool, merge: bool
) -> Iterator[None]:
    module: Any = layer.module
    query, key, value = (
        attrgetter(layer.architecture.paths[role])(module) for role in (Role.QUERY, Role.KEY, Role.VALUE)
    )
    # The first token's query is a product of its own.
    together = [key, value] if alone else [query, key, value]
    scale = layer.head_size**-0.5
    merged = _merged(together, [1.0] * 2 if alone else [scale, 1.0, 1.0]) if merge else None
    heads, kept = layer.num_units, getattr(layer.attention, KEPT_HEADS, None)

    def by_heads(states: Tensor) -> Tensor:
        found: Tensor = states.unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]  # of torch
        return found

    def all_products(states: Tensor) -> tuple[Tensor, ...]:
        """Queries (unless there is one alone), keys and values, each [B, H, S, d]."""
        if merged is None:
            found = [by_heads(part(states)) for part in together]
            return tuple(found) if alone else (found[0] * scale, *found[1:])
        # Apart before heads are: of five axes the runtime's transposition takes three times as long as of four.
        return tuple(by_heads(part) for part in merged(states).chunk(len(together), -1))

    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
        *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        asking = hidden_states[:, :1] if alone else hidden_states
        *queries, keys, values = all_products(hidden_states)
        scores = (by_heads(query(asking) * scale) if alone else queries[0]) @ keys.transpose(-1, -2)
        if position_bias is not None:
            # The same for all examples; those of the dense model's heads.
            bias = position_bias[:1] if kept is None else position_bias[:1].index_select(1, kept)
            scores = scores + (bias[:, :, :1] if alone else bias)
        if attention_mask is not None:
            scores = scores + _additive(attention_mask[:, :, :1], scores.dtype)
        context = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        out = finish(module, context, asking)
        return (out,) if finish is _finish_mpnet else out

    if merged is not None:
        module.add_module(MERGED, merged)
    try:
        with _forward_of(module, forward):
            yield
    finally:
        if merged is not None:
            delattr(module, MERGED)


def _merged(parts: Sequence[Any], scales: Sequence[float]) -> nn.Linear | None:
    """One layer that gives the outputs of several, each times a factor, side by side; None if they are not plain."""
    plain = all(type(part) is nn.Linear or (isinstance(part, PackedModule) and part.is_computed) for part in parts)
    if not plain or len({part.bias is None for part in parts}) > 1:
        return None
    weights, biases = ([getattr(part, name) for part in parts] for name in ("weight", "bias"))
    first, bias = weights[0], biases[0] is not None
    # Made without drawing weights: an export leaves the random state alone.
    found: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]  # of torch
        nn.Linear, first.shape[1], sum(map(len, weights)), bias=bias, device=first.device, dtype=first.dtype
    )
    found.weight.copy_(torch.cat([weight * scale for weight, scale in zip(weights, scales, strict=True)]))
    if bias:
        found.bias.copy_(torch.cat([bias * scale for bias, scale in zip(biases, scales, strict=True)]))
    return found.eval()


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores; transformers' own may be True where attention goes."""
    if mask.dtype != torch.bool:
        return mask
    # The lowest number, not infinity: an example without tokens has a softmax, too.
    return torch.where(mask, 0.0, torch.finfo(dtype).min)
