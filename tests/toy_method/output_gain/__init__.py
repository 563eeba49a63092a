"""Output gains: the smallest method that uses all of the seam."""

from hf_compress.core.method import Method, Paper
from output_gain.config import OutputGainConfig
from output_gain.modeling import compress, data_needs, rebuild
from output_gain.training import OutputGainTraining


METHOD = Method(
    name="output_gain",
    config_class=OutputGainConfig,
    compress=compress,
    rebuild=rebuild,
    data_needs=data_needs,
    repeatable=False,
    training=OutputGainTraining,
    paper=Paper(title="Output gains", identifier="toy", bibtex="@misc{toy, title={Output gains}, note={toy}}"),
)
