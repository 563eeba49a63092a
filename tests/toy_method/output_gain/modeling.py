"""How gains enter a model, and the modules back again."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.architectures import layers_of
from hf_compress.core.calibration import collect_inputs
from hf_compress.core.data_needs import Data, DataNeeds
from output_gain.config import OutputGainConfig


class OutputGain(nn.Module):
    """Multiplies the output of a module."""

    def __init__(self, config: PretrainedConfig, initial: float, like: Tensor) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.full((), initial, device=like.device, dtype=like.dtype))

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * self.gain.clamp(max=self.config.gain_limit)


class _Largest:
    def __init__(self) -> None:
        self.value = 0.0

    def update(self, rows: Tensor) -> None:
        self.value = max(self.value, float(rows.abs().amax()))


def data_needs(config: OutputGainConfig) -> DataNeeds:
    return DataNeeds(passes=1)


def compress(model: PreTrainedModel, config: OutputGainConfig, data: Data | None) -> OutputGainConfig:
    assert data is not None
    modules = {layer.index: layer.ffn_out.module for layer in layers_of(model)}
    statistics = {index: _Largest() for index in modules}
    collect_inputs(model, modules, statistics, data)
    completed = dataclasses.replace(config, largest_inputs=[statistics[index].value for index in sorted(modules)])
    rebuild(model, completed)
    return completed


def rebuild(model: PreTrainedModel, config: OutputGainConfig) -> None:
    assert config.largest_inputs is not None
    for layer, largest in zip(layers_of(model), config.largest_inputs, strict=True):
        gain = OutputGain(model.config, 1 - config.strength / (1 + largest), layer.ffn_out.weight)
        layer.module.add_module("output_gain", gain.train(layer.module.training))
        layer.ffn_out.module.register_forward_hook(gain.hook)


def gains_of(model: PreTrainedModel) -> list[nn.Parameter]:
    return [module.gain for module in model.modules() if isinstance(module, OutputGain)]
