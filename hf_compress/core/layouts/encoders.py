"""Text encoders."""

from __future__ import annotations

from hf_compress.core.layouts.layout import Architecture
from hf_compress.core.projections import Role


_BERT = Architecture(
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
)

ENCODERS: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
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
    ),
    "mpnet": Architecture(
        layers="encoder.layer",
        attention="attention.attn",
        projections={
            "attention.attn.q": (Role.QUERY,),
            "attention.attn.k": (Role.KEY,),
            "attention.attn.v": (Role.VALUE,),
            "attention.attn.o": (Role.ATTENTION_OUT,),
            "intermediate.dense": (Role.FFN_IN,),
            "output.dense": (Role.FFN_OUT,),
        },
        activation="intermediate.intermediate_act_fn",
        head_size="attention_head_size",
        head_counters=("num_attention_heads", "all_head_size*d"),
        ffn_size="intermediate_size",
        attention_interface=False,
        head_bias="position_bias",
    ),
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
