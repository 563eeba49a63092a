"""A config object for one model alone."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PretrainedConfig


def own_config_(model: nn.Module) -> None:
    """Give a model and its modules a config that no other model shares, with the same content.

    Two models built from one config object both hold that very object. What is written into it when one of them is
    compressed would be said of the other, too.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = BertModel(config)
        >>> own_config_(model)
        >>> model.config is config, model.encoder.config is model.config
        (False, True)
    """
    shared: dict[int, Any] = {}
    # `deepcopy` notes every object it meets, so the parts of composite configs are here, too.
    copy.deepcopy(model.config, shared)
    own = {key: value for key, value in shared.items() if isinstance(value, PretrainedConfig)}
    for module in model.modules():
        # Layers may carry plain objects that read the config in every forward pass.
        for holder in (module, *vars(module).values()):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if id(value) in own:
                    vars(holder)[name] = own[id(value)]
