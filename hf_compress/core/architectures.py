"""Where each supported architecture keeps its projections: one row per `model_type`, and a view of one layer.

Letters: H heads, G query heads per key-value head, d head size, D hidden, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.core.attention import CORE, DeferredLinear


@dataclass(frozen=True)
class Architecture:
    """Paths inside one transformer layer (dots separate attributes).

    Args:
        layers: From the base model to the `ModuleList` of layers.
        attention: From a layer to the module that splits heads.
        queries, keys, values: Input projections of attention; all three name one module when it is fused.
        attention_out: The projection back to the hidden size; its input is the concatenated heads.
        ffn_in: Projections into the feed-forward width; two for a gated block, one when the gate is fused.
        ffn_out: The projection back; its input is the activated width.
        activation: What stands between them; of a gated block, the function of the first projection.
        head_size: Attribute of the attention module that holds d.
        head_counters: Attributes of the attention module that hold H; entries ending in `*d` hold H times d.
        ffn_size: Field of the model's config with the width, for models whose layers all have the same one.
        gated: The feed-forward block multiplies two projections.
    """

    layers: str
    attention: str
    queries: str
    keys: str
    values: str
    attention_out: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    activation: str
    head_size: str
    head_counters: tuple[str, ...]
    ffn_size: str
    gated: bool = False

    @property
    def fused_attention(self) -> bool:
        return self.queries == self.values

    @property
    def fused_gate(self) -> bool:
        return self.gated and len(self.ffn_in) == 1


_BERT = Architecture(
    layers="encoder.layer",
    attention="attention.self",
    queries="attention.self.query",
    keys="attention.self.key",
    values="attention.self.value",
    attention_out="attention.output.dense",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    activation="intermediate.intermediate_act_fn",
    head_size="attention_head_size",
    head_counters=("num_attention_heads", "all_head_size*d"),
    ffn_size="intermediate_size",
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        queries="attention.q_lin",
        keys="attention.k_lin",
        values="attention.v_lin",
        attention_out="attention.out_lin",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        activation="ffn.activation",
        head_size="attention_head_size",
        head_counters=("n_heads",),
        ffn_size="hidden_dim",
    ),
    "modernbert": Architecture(
        layers="layers",
        attention="attn",
        queries="attn.Wqkv",
        keys="attn.Wqkv",
        values="attn.Wqkv",
        attention_out="attn.Wo",
        ffn_in=("mlp.Wi",),
        ffn_out="mlp.Wo",
        activation="mlp.act",
        head_size="head_dim",
        head_counters=(),
        ffn_size="intermediate_size",
        gated=True,
    ),
    "llama": Architecture(
        layers="layers",
        attention="self_attn",
        queries="self_attn.q_proj",
        keys="self_attn.k_proj",
        values="self_attn.v_proj",
        attention_out="self_attn.o_proj",
        ffn_in=("mlp.gate_proj", "mlp.up_proj"),
        ffn_out="mlp.down_proj",
        activation="mlp.act_fn",
        head_size="head_dim",
        head_counters=(),
        ffn_size="intermediate_size",
        gated=True,
    ),
    # OPT reshapes with an explicit number of heads: a stale counter gives wrong numbers without an error.
    "opt": Architecture(
        layers="decoder.layers",
        attention="self_attn",
        queries="self_attn.q_proj",
        keys="self_attn.k_proj",
        values="self_attn.v_proj",
        attention_out="self_attn.out_proj",
        ffn_in=("fc1",),
        ffn_out="fc2",
        activation="activation_fn",
        head_size="head_dim",
        head_counters=("num_heads",),
        ffn_size="ffn_dim",
    ),
}


@dataclass(frozen=True)
class TransformerLayer:
    """One transformer layer of a live model, seen through its architecture row.

    A removable attention *unit* is one key-value head together with the query heads that share it, so that
    grouped-query attention keeps a whole number of queries per key; in ordinary attention a unit is one head.

    Args:
        index: Zero-based layer index.
        layer: The live layer.
        architecture: Its row.
    """

    index: int
    layer: nn.Module
    architecture: Architecture

    def linear(self, path: str) -> nn.Linear:
        return self.layer.get_submodule(path)

    @property
    def attention(self) -> nn.Module:
        return self.layer.get_submodule(self.architecture.attention)

    @property
    def attention_out(self) -> nn.Linear:
        return self.linear(self.architecture.attention_out)

    @property
    def ffn_out(self) -> nn.Linear:
        return self.linear(self.architecture.ffn_out)

    @property
    def activation(self) -> nn.Module:
        return self.layer.get_submodule(self.architecture.activation)

    @property
    def hidden_size(self) -> int:
        return self.attention_out.out_features

    @property
    def head_size(self) -> int:
        return getattr(self.attention, self.architecture.head_size)

    @property
    def queries_per_unit(self) -> int:
        return getattr(self.attention, "num_key_value_groups", 1)

    @property
    def unit_size(self) -> int:
        """Columns of the context that one attention unit owns."""
        return self.head_size * self.queries_per_unit

    @property
    def num_units(self) -> int:
        return self.attention_out.in_features // self.unit_size

    @property
    def num_neurons(self) -> int:
        return self.ffn_out.in_features

    def macs_per_unit(self, seq_len: float) -> float:
        """Multiply-accumulates of one attention unit for a sequence of `seq_len` tokens.

        Source:
            Kwon et al. 2022 (arXiv 2204.09656): `3 s D d + 2 s^2 d + s d D` a head; keys and values are counted
            once a group under grouped-query attention.
        """
        in_projections = (self.queries_per_unit + 2) * seq_len * self.hidden_size * self.head_size
        scores_and_mix = self.attention_macs(seq_len) / self.num_units
        return in_projections + scores_and_mix + seq_len * self.unit_size * self.hidden_size

    def attention_macs(self, seq_len: float) -> float:
        """Multiply-accumulates between the projections, unless attention was replaced.

        Two for each pair of tokens that see each other and each column of the context: `2 s^2` a column, or in a
        window that reaches `r` tokens to both sides `2 (s (2 r + 1) - r (r + 1))`, with `r` at most `s - 1`. Masked
        pairs are not counted there, although kernels without windows compute them; causal attention counts all pairs.
        """
        width, core = self.attention_out.in_features, getattr(self.attention, CORE, None)
        if core is not None:
            return core.macs(seq_len, width, self.hidden_size)
        # transformers stores the first distance that is out of reach.
        window = getattr(self.attention, "sliding_window", None)
        reach = seq_len - 1 if window is None else min(window - 1, seq_len - 1)
        return 2 * (seq_len * (2 * reach + 1) - reach * (reach + 1)) * width

    def macs_per_neuron(self, seq_len: float) -> float:
        """Multiply-accumulates of one feed-forward neuron: `2 s D`, or `3 s D` in a gated block."""
        return (3 if self.architecture.gated else 2) * seq_len * self.hidden_size


def base_of(model: Any) -> Any:
    """The transformers model below adapters; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The row of a model.

    Raises:
        ValueError: If there is none; names the supported types.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type must be one of {', '.join(ARCHITECTURES)}, got {kind!r} ({type(model).__name__})."
        )
    return ARCHITECTURES[kind]


def layers_of(model: PreTrainedModel, adapted: bool = False) -> list[TransformerLayer]:
    """The transformer layers of a model, from the first to the last.

    Args:
        model: A supported architecture.
        adapted: Whether adapters around the projections do no harm, because only shapes are read.

    Raises:
        ValueError: If the architecture is not supported, or if a projection is not an ordinary `nn.Linear` (an
            adapter or a quantised layer cannot be sliced without losing what it adds).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        >>> [block.num_neurons for block in layers_of(BertModel(tiny))]
        [16, 16]
    """
    row = architecture_of(model)
    layers = model.base_model.get_submodule(row.layers)
    blocks = [TransformerLayer(index, layer, row) for index, layer in enumerate(layers)]
    for block in () if adapted else blocks:
        for path in {row.queries, row.keys, row.values, row.attention_out, *row.ffn_in, row.ffn_out}:
            module = block.linear(path)
            if type(module) not in (nn.Linear, DeferredLinear) or torch.nn.utils.parametrize.is_parametrized(module):
                raise ValueError(
                    f"Layer {block.index} {path} must be a plain torch.nn.Linear, got {type(module).__name__}. "
                    "Merge adapters (merge_and_unload) or load the model unquantised first."
                )
    return blocks


def named_projections(block: TransformerLayer) -> Iterator[tuple[str, nn.Linear]]:
    """Each projection of a layer once, fused ones included."""
    row = block.architecture
    for path in dict.fromkeys((row.queries, row.keys, row.values, row.attention_out, *row.ffn_in, row.ffn_out)):
        yield path, block.linear(path)
