"""Gives a model a config object that no other model shares."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PretrainedConfig


def own_config_(model: nn.Module) -> None:
    """Give a model and its modules a copy of their config.

    Two models built from one config object both hold that very object: a record written into it when one of them is
    compressed would describe the other one, too. Whatever else reads the config does so through a module.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = BertModel(config)
        >>> own_config_(model)
        >>> model.config is config, model.encoder.config is model.config
        (False, True)
    """
    shared: dict[int, Any] = {}
    # The memo of `deepcopy` lists every object that it copies, parts of composite configs included.
    copy.deepcopy(model.config, shared)
    own = {key: value for key, value in shared.items() if isinstance(value, PretrainedConfig)}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in own:
                vars(module)[name] = own[id(value)]
