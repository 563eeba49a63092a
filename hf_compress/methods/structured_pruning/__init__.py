"""Structured pruning without retraining: fewer heads and neurons, by interpolative decompositions (STAT)."""

from hf_compress.core.method import Method, Paper
from hf_compress.methods.structured_pruning.config import StructuredPruningConfig as StructuredPruningConfig
from hf_compress.methods.structured_pruning.layer_by_layer import compress_layers
from hf_compress.methods.structured_pruning.modeling import check, compress, data_needs, plain, rebuild


METHOD = Method(
    name="structured_pruning",
    config_class=StructuredPruningConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    plain=plain,
    data_needs=data_needs,
    compress_layers=compress_layers,
    paper=Paper(
        title="STAT: Shrinking Transformers After Training",
        identifier="2406.00061",
        bibtex="@article{flynn2024stat, title={STAT: Shrinking Transformers After Training}, "
        "journal={arXiv preprint arXiv:2406.00061}, year={2024}}",
    ),
)
