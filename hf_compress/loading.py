"""Lets plain `from_pretrained` open compressed models: it rebuilds the record's modules before weights are read.

This is the only file that touches `transformers.quantizers`. It is imported by `hf_compress` right after
transformers has imported its own registry, possibly in the middle of importing its models. So it imports the verbs
lazily, through the package, and nothing that needs a model.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

import hf_compress
from hf_compress.core.record import QUANT_METHOD, CompressionConfig
from hf_compress.core.weight_files import require_fit


register_quantization_config(QUANT_METHOD)(CompressionConfig)


@register_quantizer(QUANT_METHOD)
class CompressionLoader(HfQuantizer):
    """Rebuilds the modules of the record; the result is an ordinary model with ordinary weights."""

    requires_calibration = False
    # Class attributes, not properties: Trainer reads both and refuses "quantized" models otherwise.
    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers has not attached the record to the config of every head class yet.
        model.config.quantization_config = self.quantization_config
        hf_compress.rebuild(model)
        require_fit(kwargs.get("checkpoint_files") or (), model.state_dict(keep_vars=True), model.base_model_prefix)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Where weights are missing, transformers initialises its own modules; those of methods would hold random
        # memory.
        missing = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if any(method.defines(module) for method in hf_compress.METHODS.values())
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if name not in module._non_persistent_buffers_set
            and tensor is not None
            and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            more = f" (and {len(missing) - 3} others)" if len(missing) > 3 else ""
            raise ValueError(
                f"The saved weights do not fit the record in config.json: no {', '.join(missing[:3])}{more}."
            )
        # Otherwise .half() and .float() raise, and Trainer and PEFT take plain weights for quantised ones.
        model.__dict__.pop("hf_quantizer", None)
        model.__dict__.pop("quantization_method", None)
        model.is_quantized = False
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                module.config._is_quantized = False
        for name in dict.fromkeys(step["method"] for step in hf_compress.steps_of(model)):
            if (check := hf_compress.METHODS[name].check_loaded) is not None:
                check(model)
        return model
