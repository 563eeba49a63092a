"""Vocabulary pruning: word embeddings, output layer and tokenizer lose the tokens that a corpus never uses."""

from hf_compress.core.method import Method, Paper
from hf_compress.methods.vocabulary_pruning.config import VocabularyPruningConfig as VocabularyPruningConfig
from hf_compress.methods.vocabulary_pruning.modeling import check, compress, plain, rebuild


METHOD = Method(
    name="vocabulary_pruning",
    config_class=VocabularyPruningConfig,
    compress=compress,
    rebuild=rebuild,
    check=check,
    plain=plain,
    repeatable=False,
    renumbers_inputs=True,
    paper=Paper(
        title="Load What You Need: Smaller Versions of Multilingual BERT",
        identifier="2010.05609",
        bibtex="@article{abdaoui2020load, title={Load What You Need: Smaller Versions of Multilingual BERT}, "
        "author={Abdaoui, Amine and Pradel, Camille and Sigel, Gr{\\'e}goire}, "
        "journal={arXiv preprint arXiv:2010.05609}, year={2020}}",
    ),
)
