"""Text encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from hf_compress.core.layouts.decoders import LLAMA
from hf_compress.core.layouts.layout import Architecture, Norms, PositionWork
from hf_compress.core.projections import Role


BERT = Architecture(
    layers="encoder.layer",
    attention="attention.self",
    projections={
        "attention.self.query": (Role.QUERY,),
        "attention.self.key": (Role.KEY,),
        "attention.self.value": (Role.VALUE,),
        "attention.output.dense": (Role.ATTENTION_OUT,),
        "intermediate.dense": (Role.FFN_IN,),
        "output.dense": (Role.FFN_OUT,),
    },
    activation="intermediate.intermediate_act_fn",
    head_size="attention_head_size",
    head_counters=("num_attention_heads", "all_head_size*d"),
    ffn_size="intermediate_size",
    norms=Norms("attention.output.LayerNorm", "output.LayerNorm"),
)

# Like Llama in names and shapes, but post-norm and bidirectional.
_NOMIC = replace(LLAMA, pre_norm=False, causal=False)


def _deberta_positions(attention: nn.Module) -> PositionWork:
    """The work of disentangled attention on embeddings of relative positions."""
    module: Any = attention
    if not module.relative_attention:
        return PositionWork(0, 0, 0)
    products = sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
    # With shared projections the model computes both, even if it uses one.
    return PositionWork(2 * module.pos_ebd_size, 2 if module.share_att_key else products, products)


ENCODERS: dict[str, Architecture] = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "data2vec-text": BERT,
    "ernie": BERT,
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        projections={
            "attention.q_lin": (Role.QUERY,),
            "attention.k_lin": (Role.KEY,),
            "attention.v_lin": (Role.VALUE,),
            "attention.out_lin": (Role.ATTENTION_OUT,),
            "ffn.lin1": (Role.FFN_IN,),
            "ffn.lin2": (Role.FFN_OUT,),
        },
        activation="ffn.activation",
        head_size="attention_head_size",
        head_counters=("n_heads",),
        ffn_size="hidden_dim",
        norms=Norms("sa_layer_norm", "output_layer_norm"),
    ),
    "mpnet": replace(
        BERT,
        attention="attention.attn",
        projections={
            "attention.attn.q": (Role.QUERY,),
            "attention.attn.k": (Role.KEY,),
            "attention.attn.v": (Role.VALUE,),
            "attention.attn.o": (Role.ATTENTION_OUT,),
            "intermediate.dense": (Role.FFN_IN,),
            "output.dense": (Role.FFN_OUT,),
        },
        attention_interface=False,
        head_bias="position_bias",
        norms=Norms("attention.LayerNorm", "output.LayerNorm"),
    ),
    # Positions have projections of their own only where `share_att_key` is off; DeBERTa-v3 shares those of the tokens.
    "deberta-v2": replace(
        BERT,
        attention="attention.self",
        projections={
            "attention.self.query_proj": (Role.QUERY,),
            "attention.self.key_proj": (Role.KEY,),
            "attention.self.value_proj": (Role.VALUE,),
            "attention.self.pos_query_proj": (Role.POSITION_QUERY,),
            "attention.self.pos_key_proj": (Role.POSITION_KEY,),
            "attention.output.dense": (Role.ATTENTION_OUT,),
            "intermediate.dense": (Role.FFN_IN,),
            "output.dense": (Role.FFN_OUT,),
        },
        attention_interface=False,
        # Its embeddings are multiplied by the mask, and a convolution may lie between layers.
        norms=None,
        position_work=_deberta_positions,
    ),
    "eurobert": replace(LLAMA, causal=False),
    "nomic_bert": _NOMIC,
    "gte": _NOMIC,
    "modernbert": Architecture(
        layers="layers",
        attention="attn",
        projections={
            "attn.Wqkv": (Role.QUERY, Role.KEY, Role.VALUE),
            "attn.Wo": (Role.ATTENTION_OUT,),
            "mlp.Wi": (Role.GATE, Role.FFN_IN),
            "mlp.Wo": (Role.FFN_OUT,),
        },
        activation="mlp.act",
        head_size="head_dim",
        ffn_size="intermediate_size",
        pre_norm=True,
        rotary=True,
    ),
}
