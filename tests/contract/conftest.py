"""What the contract is tested on: one row for each method, applied to every architecture."""

import copy
from pathlib import Path

import pytest
import torch

import hf_compress as hc
from tests.conftest import ARCHITECTURES, _batches, _built
from tests.images_and_sounds import cast
from tests.rounding import assert_equal_to_rounding


# Method -> config, with settings under which every architecture changes and layers differ from each other.
METHOD_CONFIGS = {
    "linformer": lambda: hc.LinformerConfig(projected_length=8, seed=3),
    "token_pruning": lambda: hc.TokenPruningConfig(final_token_threshold=0.012),
    "structured_pruning": lambda: hc.StructuredPruningConfig(mac_ratio=0.55),
    "layer_selection": hc.LayerSelectionConfig,
    # Most ids get another row.
    "vocabulary_pruning": lambda: hc.VocabularyPruningConfig(kept_ids=[*range(5), *range(30, 85)]),
    "weight_pruning": lambda: hc.WeightPruningConfig(
        target_sparsity=0.6, criterion="magnitude", pruning_op_types=("Linear", "Conv1D")
    ),
    "weight_quantization": lambda: hc.WeightQuantizationConfig(bits=3, group_size=12),
}
# (method, architecture) -> the words of the refusal, which `test_refused_combinations` expects.
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "opt")
OWN_ATTENTION = ("mpnet", "deberta-v2")
DROPS_TOKENS = ("bert", "roberta", "electra", "distilbert")
REFUSED = {("linformer", name): "bidirectional encoder" for name in CAUSAL}
REFUSED |= {("linformer", name): "attention code of its own" for name in OWN_ATTENTION}
REFUSED |= {
    ("token_pruning", name): "must be an encoder of type" for name in ARCHITECTURES if name not in DROPS_TOKENS
}
REFUSED |= {
    ("vocabulary_pruning", name): "must have word embeddings" for name in ("vit", "wav2vec2", "wav2vec2-stable")
}
# Sounds have any length.
REFUSED |= {("linformer", name): "max_tokens must be given for wav2vec2" for name in ("wav2vec2", "wav2vec2-stable")}
# Methods that add to the dense shapes instead of changing them: without the import such a model opens as a dense one.
KEEPS_DENSE_SHAPES = {
    "linformer", "token_pruning", "weight_pruning", "layer_selection", "vocabulary_pruning", "weight_quantization",
}  # fmt: skip
# Methods that change values only, or what any config can say: a skeleton without the record has the same modules.
KEEPS_DENSE_MODULES = {"weight_pruning", "layer_selection", "vocabulary_pruning"}
# Methods after which weights cannot be changed any more, neither by training nor by another method.
FINAL = {"weight_quantization"}
CHANGEABLE = [name for name in METHOD_CONFIGS if name not in FINAL]


# Methods whose result depends on the head: on the tokens or words that it reads, or on the shapes in its file.
READS_THE_HEAD = {"token_pruning", "vocabulary_pruning", "structured_pruning"}
# Architectures of the usual modules, of `Conv1D` and of images: for trainers and adapters the others are like these.
TRAINED = ("bert", "gpt2", "vit")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Cells of the grid that run the same code as others are slow; every method still meets every architecture."""
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path.parent != Path(__file__).parent or "method" not in values:
            continue
        other_head = values.get("head") not in (None, "base", "sequence_classification")
        repeated = other_head and values["method"] not in READS_THE_HEAD
        if item.path.name == "test_ecosystem.py" and values["method"] in KEEPS_DENSE_MODULES:
            repeated |= values.get("architecture", "bert") not in TRAINED
        if repeated:
            item.add_marker(pytest.mark.slow)


def precise(name):
    """Whether a parameter stays in single precision whatever dtype a model is opened in."""
    return "token_thresholds" in name


def logits_of(model, batch):
    """Everything a model says about a batch, as one tuple of tensors."""
    with torch.no_grad():
        output = model.eval()(**cast(batch, model))
    return tuple(value for value in output.to_tuple() if torch.is_tensor(value))


def assert_same_outputs(model, other, batch):
    """Equal to rounding: the weights of one may lie at other alignments than those of the other."""
    ours, theirs = logits_of(model, batch), logits_of(other, batch)
    assert len(ours) == len(theirs) > 0
    for found, expected in zip(ours, theirs, strict=True):
        assert_equal_to_rounding(found, expected)


@pytest.fixture(params=list(METHOD_CONFIGS))
def method(request):
    """Runs a test once for each method."""
    return request.param


_compressed = {}


@pytest.fixture
def compressed():
    """`compressed(method, architecture, head="base")`: a private copy of a compressed tiny model."""

    def make(method, architecture, head="base"):
        key = method, architecture, head
        if (method, architecture) in REFUSED:
            pytest.skip(f"{method} refuses {architecture}")
        if key not in _compressed:
            model = copy.deepcopy(_built(architecture, head))
            _compressed[key] = hc.compress(model, METHOD_CONFIGS[method](), data=_batches(model.config))
        return copy.deepcopy(_compressed[key])

    return make


@pytest.fixture
def batch():
    """`batch(model)`: one batch of inputs that calibration has not seen."""
    return lambda model: _batches(model.config, count=1, seed=7)[0]
