"""Weight pruning in training: blocks, channels, N:M, at exactly the sparsity asked for."""

from hf_compress.core.method import Method, Paper
from hf_compress.methods.weight_pruning.acceleration import Acceleration as Acceleration
from hf_compress.methods.weight_pruning.acceleration import accelerate_for_inference as accelerate_for_inference
from hf_compress.methods.weight_pruning.callbacks import WeightPruningCallback as WeightPruningCallback
from hf_compress.methods.weight_pruning.config import NAME
from hf_compress.methods.weight_pruning.config import WeightPruningConfig as WeightPruningConfig
from hf_compress.methods.weight_pruning.modeling import check, compress, data_needs
from hf_compress.methods.weight_pruning.slimming import plain, rebuild
from hf_compress.methods.weight_pruning.slimming import slim as slim
from hf_compress.methods.weight_pruning.training import WeightPruningTraining
from hf_compress.methods.weight_pruning.zeros import HeldZerosCallback as HeldZerosCallback
from hf_compress.methods.weight_pruning.zeros import warn_of_lost_zeros


METHOD = Method(
    name=NAME,
    config_class=WeightPruningConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    plain=plain,
    check_loaded=warn_of_lost_zeros,
    data_needs=data_needs,
    training=WeightPruningTraining,
    paper=Paper(
        title="SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        identifier="1810.02340",
        bibtex="@article{lee2018snip, title={SNIP: Single-shot Network Pruning based on Connection Sensitivity}, "
        "author={Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S.}, "
        "journal={arXiv preprint arXiv:1810.02340}, year={2018}}",
    ),
)
