"""Layer selection: a shallower model out of some layers of a deeper one, with its embeddings and head."""

from hf_compress.core.method import Method, Paper
from hf_compress.methods.layer_selection.config import LayerSelectionConfig as LayerSelectionConfig
from hf_compress.methods.layer_selection.modeling import check, compress, plain, rebuild


METHOD = Method(
    name="layer_selection",
    config_class=LayerSelectionConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    plain=plain,
    repeatable=False,
    first=True,
    paper=Paper(
        title="DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
        identifier="1910.01108",
        bibtex="@article{sanh2019distilbert, title={DistilBERT, a distilled version of BERT: smaller, faster, cheaper "
        "and lighter}, journal={arXiv preprint arXiv:1910.01108}, year={2019}}",
    ),
)
