"""Audio encoders: a convolutional feature encoder turns samples into frames, which the transformer layers read."""

from __future__ import annotations

import transformers
from packaging.version import Version

from hf_compress.core.layouts.layout import Architecture
from hf_compress.core.projections import Role


_WAV2VEC2 = Architecture(
    layers="encoder.layers",
    attention="attention",
    projections={
        "attention.q_proj": (Role.QUERY,),
        "attention.k_proj": (Role.KEY,),
        "attention.v_proj": (Role.VALUE,),
        "attention.out_proj": (Role.ATTENTION_OUT,),
        "feed_forward.intermediate_dense": (Role.FFN_IN,),
        "feed_forward.output_dense": (Role.FFN_OUT,),
    },
    activation="feed_forward.intermediate_act_fn",
    head_size="head_dim",
    head_counters=("num_heads",),
    ffn_size="intermediate_size",
    pre_norm="do_stable_layer_norm",
    mean_pooled=True,
    # Until transformers 5.16, room for a cache that is never there.
    attention_returns=2 if Version(transformers.__version__) >= Version("5.16") else 3,
)

AUDIO: dict[str, Architecture] = {"wav2vec2": _WAV2VEC2, "hubert": _WAV2VEC2}
