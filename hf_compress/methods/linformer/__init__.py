"""Linear attention: keys and values compressed along time by learned matrices (Linformer, as CALD converts to it)."""

from hf_compress.core.method import Method, ModelPart, Paper
from hf_compress.methods.linformer.config import LinformerConfig as LinformerConfig
from hf_compress.methods.linformer.modeling import check, compress, rebuild


METHOD = Method(
    name="linformer",
    config_class=LinformerConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    repeatable=False,
    needs=frozenset({ModelPart.ATTENTION, ModelPart.LAYER_FORWARD}),
    replaces=frozenset({ModelPart.ATTENTION}),
    paper=Paper(
        title="Joint Fine-tuning and Conversion of Pretrained Speech and Language Models towards Linear Complexity",
        identifier="2410.06846",
        bibtex="@article{he2024joint, title={Joint Fine-tuning and Conversion of Pretrained Speech and Language "
        "Models towards Linear Complexity}, author={He, Mutian and Garner, Philip N.}, "
        "journal={arXiv preprint arXiv:2410.06846}, year={2024}}",
    ),
)
