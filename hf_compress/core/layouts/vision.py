"""Image encoders."""

from __future__ import annotations

from dataclasses import replace

import transformers
from packaging.version import Version

from hf_compress.core.layouts.encoders import BERT
from hf_compress.core.layouts.layout import Architecture
from hf_compress.core.projections import Role


# transformers 5.9 gave the modules new names; the files of saved models keep the old ones.
if Version(transformers.__version__) >= Version("5.9"):
    _VIT = Architecture(
        layers="layers",
        attention="attention",
        projections={
            "attention.q_proj": (Role.QUERY,),
            "attention.k_proj": (Role.KEY,),
            "attention.v_proj": (Role.VALUE,),
            "attention.o_proj": (Role.ATTENTION_OUT,),
            "mlp.fc1": (Role.FFN_IN,),
            "mlp.fc2": (Role.FFN_OUT,),
        },
        activation="mlp.activation_fn",
        head_size="head_dim",
        head_counters=("num_attention_heads",),
        ffn_size="intermediate_size",
        pre_norm=True,
        free_heads=True,
    )
else:
    _VIT = replace(
        BERT,
        norms=None,
        attention="attention.attention",
        projections={
            "attention.attention.query": (Role.QUERY,),
            "attention.attention.key": (Role.KEY,),
            "attention.attention.value": (Role.VALUE,),
            "attention.output.dense": (Role.ATTENTION_OUT,),
            "intermediate.dense": (Role.FFN_IN,),
            "output.dense": (Role.FFN_OUT,),
        },
        pre_norm=True,
        counts_heads=True,
    )

VISION: dict[str, Architecture] = {"vit": _VIT, "deit": _VIT}
