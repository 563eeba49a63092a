"""Token pruning: tokens that receive little attention are dropped on the way through the layers (LTP)."""

from hf_compress.core.method import Method, Paper
from hf_compress.methods.token_pruning.callbacks import warn_unsteered
from hf_compress.methods.token_pruning.config import TokenPruningConfig as TokenPruningConfig
from hf_compress.methods.token_pruning.modeling import check, compress, rebuild
from hf_compress.methods.token_pruning.training import (
    check_resume,
    implied,
    loss_terms,
    measures,
    parameter_groups,
    start_training,
)


METHOD = Method(
    name="token_pruning",
    config_class=TokenPruningConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    repeatable=False,
    needs=frozenset({"softmax attention"}),
    replaces=frozenset({"ordinary layers"}),
    implied=implied,
    start_training=start_training,
    training_callback=warn_unsteered,
    check_resume=check_resume,
    loss_terms=loss_terms,
    measures=measures,
    parameter_groups=parameter_groups,
    paper=Paper(
        title="Learned Token Pruning for Transformers",
        identifier="2107.00910",
        bibtex="@inproceedings{kim2022ltp, title={Learned Token Pruning for Transformers}, author={Kim, Sehoon and "
        "Shen, Sheng and Thorsley, David and Gholami, Amir and Kwon, Woosuk and Hassoun, Joseph and Keutzer, Kurt}, "
        "booktitle={KDD}, year={2022}, note={arXiv:2107.00910}}",
    ),
)
