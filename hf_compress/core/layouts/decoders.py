"""Text decoders."""

from __future__ import annotations

from dataclasses import replace

from hf_compress.core.layouts.layout import Architecture
from hf_compress.core.projections import Role


LLAMA = Architecture(
    layers="layers",
    attention="self_attn",
    projections={
        "self_attn.q_proj": (Role.QUERY,),
        "self_attn.k_proj": (Role.KEY,),
        "self_attn.v_proj": (Role.VALUE,),
        "self_attn.o_proj": (Role.ATTENTION_OUT,),
        "mlp.gate_proj": (Role.GATE,),
        "mlp.up_proj": (Role.FFN_IN,),
        "mlp.down_proj": (Role.FFN_OUT,),
    },
    activation="mlp.act_fn",
    head_size="head_dim",
    ffn_size="intermediate_size",
    pre_norm=True,
    causal=True,
    rotary=True,
    free_heads=True,
)

DECODERS: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, window_in_config=True),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "gpt2": Architecture(
        layers="h",
        attention="attn",
        projections={
            "attn.c_attn": (Role.QUERY, Role.KEY, Role.VALUE),
            "attn.c_proj": (Role.ATTENTION_OUT,),
            "mlp.c_fc": (Role.FFN_IN,),
            "mlp.c_proj": (Role.FFN_OUT,),
        },
        activation="mlp.act",
        head_size="head_dim",
        head_counters=("num_heads", "split_size*d"),
        ffn_size="n_inner",
        pre_norm=True,
        causal=True,
    ),
    # OPT reshapes with an explicit number of heads: a stale counter gives wrong numbers without an error.
    "opt": Architecture(
        layers="decoder.layers",
        attention="self_attn",
        projections={
            "self_attn.q_proj": (Role.QUERY,),
            "self_attn.k_proj": (Role.KEY,),
            "self_attn.v_proj": (Role.VALUE,),
            "self_attn.out_proj": (Role.ATTENTION_OUT,),
            "fc1": (Role.FFN_IN,),
            "fc2": (Role.FFN_OUT,),
        },
        activation="activation_fn",
        head_size="head_dim",
        head_counters=("num_heads",),
        ffn_size="ffn_dim",
        pre_norm="do_layer_norm_before",
        causal=True,
    ),
}
