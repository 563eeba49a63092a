"""Weights of few bits: GPTQ, its correction towards the dense model, and rounding to nearest."""

from hf_compress.core.method import Method, Paper
from hf_compress.methods.weight_quantization.config import WeightQuantizationConfig as WeightQuantizationConfig
from hf_compress.methods.weight_quantization.layer_by_layer import compress_layers
from hf_compress.methods.weight_quantization.modeling import (
    check,
    compress,
    compute_weights,
    data_needs,
    make_plain,
    plain,
    rebuild,
)
from hf_compress.methods.weight_quantization.modeling import quantize_in_order as quantize_in_order
from hf_compress.methods.weight_quantization.training import WeightQuantizationTraining


METHOD = Method(
    name="weight_quantization",
    config_class=WeightQuantizationConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    plain=plain,
    make_plain=make_plain,
    data_needs=data_needs,
    compress_layers=compress_layers,
    check_loaded=compute_weights,
    training=WeightQuantizationTraining,
    relation="quantized",
    repeatable=False,
    last=True,
    paper=Paper(
        title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        identifier="2210.17323",
        bibtex="@inproceedings{frantar2023gptq, title={GPTQ: Accurate Post-Training Quantization for Generative "
        "Pre-trained Transformers}, author={Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, "
        "Dan}, booktitle={ICLR}, year={2023}, note={arXiv:2210.17323}}",
    ),
)
