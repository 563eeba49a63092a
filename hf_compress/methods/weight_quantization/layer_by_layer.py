"""Quantises a model whose layers are in memory one at a time."""

from __future__ import annotations

from hf_compress.core.layer_passes import LayerPasses
from hf_compress.methods.weight_quantization.config import WeightQuantizationConfig
from hf_compress.methods.weight_quantization.modeling import (
    completed,
    quantize_in_order,
    rebuild_layers,
    round_layer_,
)


def compress_layers(passes: LayerPasses, config: WeightQuantizationConfig) -> WeightQuantizationConfig:
    """Quantise as `compress` does; each layer is loaded once.

    Raises:
        ValueError: If layers do not run one after the other, or inputs are not finite or too few.
    """
    config, prefix = completed(passes.model, config), passes.model.base_model_prefix
    if config.algorithm == "rtn":
        visit = passes.visit("quantised")
        rebuild_layers(passes.layers[: visit.first], config, prefix)
        for index in visit:
            round_layer_(passes.layers[index], config, prefix)
        return config
    walk = passes.walk("quantised", changes=True, two_streams=config.correction == "dense")
    rebuild_layers(passes.layers[: walk.first], config, prefix)
    quantize_in_order(walk, passes.layers, config, prefix)
    return config
