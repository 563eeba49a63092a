"""Token pruning: tokens that receive little attention are dropped on the way through the layers (LTP)."""

from hf_compress.core.method import Method, ModelPart, Paper
from hf_compress.methods.token_pruning.config import TokenPruningConfig as TokenPruningConfig
from hf_compress.methods.token_pruning.modeling import check, compress, rebuild
from hf_compress.methods.token_pruning.training import TokenPruningTraining, implied


METHOD = Method(
    name="token_pruning",
    config_class=TokenPruningConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    repeatable=False,
    needs=frozenset({ModelPart.ATTENTION}),
    replaces=frozenset({ModelPart.LAYER_FORWARD}),
    implied=implied,
    training=TokenPruningTraining,
    paper=Paper(
        title="Learned Token Pruning for Transformers",
        identifier="2107.00910",
        bibtex="@inproceedings{kim2022ltp, title={Learned Token Pruning for Transformers}, author={Kim, Sehoon and "
        "Shen, Sheng and Thorsley, David and Gholami, Amir and Kwon, Woosuk and Hassoun, Joseph and Keutzer, Kurt}, "
        "booktitle={KDD}, year={2022}, note={arXiv:2107.00910}}",
    ),
)
