"""Tiny models built from configs, batches, a tokenizer and labelled sentences: no test needs a network or a download.

Every model has hidden size 32, heads of size 8, a vocabulary of 99, no dropout and weights that do not depend on the
order of the tests.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread unless asked otherwise: with matrices this small, waiting for a second one costs more than it saves, much
# more on a busy machine. Programs that tests start inherit the number.
THREADS = os.environ.get("HF_COMPRESS_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = THREADS
# Threads that wait sleep. Spinning ones take the cores from those that work: ten times as long with two test workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import copy  # noqa: E402
import gc  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402

import datasets  # noqa: E402, F401  (its log handler keeps the stderr that it meets when it is imported)
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from tests import images_and_sounds  # noqa: E402
from tests.guided_setup import dense  # noqa: E402
from tests.two_processes import TwoProcesses  # noqa: E402


# Reading them would put the folder on the path, and this process would find a method that it has not loaded.
collect_ignore = ["toy_method", "toy_program.py"]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(int(THREADS))

VOCABULARY = 99
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 66, "initializer_range": 0.2}
_WIDE = {**_SIZES, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_BERT_LIKE = {**_WIDE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _distilbert(**changes):
    sizes = {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 2, "dropout": 0.0, "attention_dropout": 0.0}
    heads = {"seq_classif_dropout": 0.0, "qa_dropout": 0.0}
    return transformers.DistilBertConfig(**_SIZES, **sizes, **heads, pad_token_id=0, **changes)


def _mpnet(**changes):
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return transformers.MPNetConfig(**_BERT_LIKE, **special, num_hidden_layers=2, **changes)


def _deberta(**changes):
    """As version 3: projections shared with positions, buckets of distances, no absolute positions."""
    relative = {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
    }
    plain = {
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "pooler_dropout": 0.0,
        "num_hidden_layers": 2,
    }
    return transformers.DebertaV2Config(**{**_BERT_LIKE, **relative, **plain, **changes})


def _modernbert(**changes):
    special = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    windows = {"local_attention": 8, "num_hidden_layers": 3}
    return transformers.ModernBertConfig(**_WIDE, **special, **windows, **changes)


def _llama(**changes):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlamaConfig(**_WIDE, **special, num_hidden_layers=2, num_key_value_heads=2, **changes)


def _llama_like(name):
    """A factory of configs with Llama's names: grouped queries, no biases unless the architecture has them."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    extra = {"qwen3": {"head_dim": 8}, "eurobert": {"mask_token_id": 4}, "mistral": {"sliding_window": None}}.get(
        name, {}
    )
    sizes = {**_WIDE, **special, "num_hidden_layers": 2, "num_key_value_heads": 2, **extra}
    return lambda **changes: transformers.AutoConfig.for_model(name, **{**sizes, **changes})


def _nomic_like(name):
    sizes = {**_BERT_LIKE, "num_hidden_layers": 2, "pad_token_id": 0}
    return lambda **changes: transformers.AutoConfig.for_model(name, **{**sizes, **changes})


def _gpt2(**changes):
    sizes = {"n_embd": 32, "n_head": 4, "n_inner": 64, "n_layer": 2, "n_positions": 66, "vocab_size": VOCABULARY}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    return transformers.GPT2Config(**sizes, **plain, **special, **changes)


def _opt(**changes):
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 4, "ffn_dim": 64}
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "init_std": 0.2}
    plain = {"num_hidden_layers": 2, "dropout": 0.0, "vocab_size": VOCABULARY, "max_position_embeddings": 66}
    return transformers.OPTConfig(**sizes, **special, **plain, **changes)


# Name -> config factory; layers of unequal purpose (ModernBERT's local windows) need three.
ARCHITECTURES = {
    "bert": lambda **changes: transformers.BertConfig(**_BERT_LIKE, num_hidden_layers=3, **changes),
    "roberta": lambda **changes: transformers.RobertaConfig(**_BERT_LIKE, num_hidden_layers=2, **changes),
    "electra": lambda **changes: transformers.ElectraConfig(
        **_BERT_LIKE, num_hidden_layers=2, embedding_size=16, **changes
    ),
    "distilbert": _distilbert,
    "mpnet": _mpnet,
    "deberta-v2": _deberta,
    "eurobert": _llama_like("eurobert"),
    "nomic_bert": _nomic_like("nomic_bert"),
    "gte": _nomic_like("gte"),
    "modernbert": _modernbert,
    "llama": _llama,
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3"),
    "smollm3": _llama_like("smollm3"),
    "gpt2": _gpt2,
    "opt": _opt,
    "vit": images_and_sounds.vit,
    "wav2vec2": images_and_sounds.wav2vec2,
    "wav2vec2-stable": images_and_sounds.wav2vec2_stable,
}

HEADS = {
    "base": transformers.AutoModel,
    # Of texts, images and sounds.
    "sequence_classification": images_and_sounds.WholeInputClassifier,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "causal_lm": transformers.AutoModelForCausalLM,
    "ctc": transformers.AutoModelForCTC,
}


# Built like another one in all that surgery sees. Their full battery is slow; contract/test_alike.py has a brief one.
ALIKE = ("roberta", "electra", "eurobert", "nomic_bert", "gte", "mistral", "qwen2", "smollm3")


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in ARCHITECTURES])
def architecture(request):
    """Runs a test once for each architecture; `parametrize("architecture", [...])` picks some."""
    return request.param


@cache
def _built(architecture, head):
    if architecture in ALIKE and architecture not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {architecture}")
    config = ARCHITECTURES[architecture]()
    if type(config) not in HEADS[head]._model_mapping:
        pytest.skip(f"transformers has no {head} model of {architecture}")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = HEADS[head].from_config(config).eval()
    # Fresh biases are zero and fresh norms are one: wrong bookkeeping of either would not show.
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name.lower():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    torch.set_rng_state(state)
    return model


@pytest.fixture
def model():
    """`model(architecture, head="base")`: a private copy of a seeded tiny model in eval mode."""
    return lambda architecture, head="base": copy.deepcopy(_built(architecture, head))


def _batches(config, count=8, size=8, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    others = images_and_sounds.batches(config, count, size, length, generator)
    if others is not None:
        return others
    result = []
    for _ in range(count):
        ids = torch.randint(3, min(VOCABULARY, config.vocab_size), (size, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (size,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        result.append({"input_ids": ids.where(mask.bool(), config.pad_token_id), "attention_mask": mask})
    return result


@pytest.fixture
def batches():
    """`batches(config, count=8, size=8, length=24, seed=0)`: random ids, padded on the right; about 1150 live.

    Images or sounds for configs that read those; sounds are padded on the right, too.
    """
    return _batches


WORDS = ("film", "plot", "cast", "scene", "very", "quite", "the", "a", "was", "and", "score", "story")


@pytest.fixture(scope="session")
def sentences():
    """64 pairs (text, label). The rule: label 1 exactly when the text has the word `good`, else it has `bad`."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for index in range(64):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (4 + index % 6,), generator=generator).tolist()]
        place = int(torch.randint(len(words) + 1, (1,), generator=generator))
        words.insert(place, ("bad", "good")[index % 2])
        result.append((" ".join(words), index % 2))
    return result


@pytest.fixture(scope="session")
def tokenizer():
    """Whole words, with [CLS] and [SEP]; the padding id is 0."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    words = {word: index for index, word in enumerate([*special, "good", "bad", *WORDS])}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, **dict(zip(names, special, strict=True))
    )


@pytest.fixture
def saved_states(tmp_path):
    """Three saved teachers, in folders whose alphabetical order is wrong."""
    for number, seed in ((2, 11), (9, 12), (10, 13)):
        dense(seed, 0.1).save_pretrained(tmp_path / "saved_states" / f"checkpoint-{number}")
    return str(tmp_path / "saved_states" / "checkpoint-*")


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Every training starts with a full garbage collection; what was imported need not be searched each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared():
    """The folder with reference data that lies beside a checkout; tests that need it are skipped elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(kilobytes)`: a folder on a disk of its own that is really full when it is full."""
    place = tmp_path / "disk"

    def mount(kilobytes):
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only the superuser may mount a small disk")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def pair():
    """Two ranks of one job; they start when a test first runs something in them."""
    processes = TwoProcesses()
    yield processes
    processes.close()
