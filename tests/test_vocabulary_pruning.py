"""Smaller vocabularies: texts of the corpus are read by the same tokens, others fall back, and models say the same."""

import copy
import json
import random
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLMRobertaTokenizer,
)

import hf_compress as hc
from hf_compress.methods.vocabulary_pruning.runs import numbers_of, runs_of
from hf_compress.methods.vocabulary_pruning.selection import kept_ids
from hf_compress.methods.vocabulary_pruning.trimming import trimmed
from tests.rounding import assert_equal_to_rounding


LINES = [line.strip() for name in ("assert", "import", "with", "try") for line in topics[name].splitlines()]
LINES = [line for line in LINES if line]
CORPUS = LINES[::12]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
UNSEEN = "Quizzical yaks: 价值 🙂 naïve œuvre"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def trained(model, trainer, *, pre, normalizer=None, decoder=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre, decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(LINES, trainer)
    return backend


def wordpiece(folder):
    trainer = trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=[*SPECIAL.values(), "[MASK]"], show_progress=False
    )
    bert = {"pre": pre_tokenizers.BertPreTokenizer(), "normalizer": normalizers.BertNormalizer()}
    backend = trained(models.WordPiece(unk_token="[UNK]"), trainer, **bert)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return opened(backend, BertTokenizer, folder, **SPECIAL, mask_token="[MASK]")


def byte_level(folder):
    special = [*ROBERTA.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend = trained(
        models.BPE(), trainer, pre=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel()
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return opened(backend, RobertaTokenizer, folder, **ROBERTA, cls_token="<s>", sep_token="</s>")


def unigram(folder):
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=[*ROBERTA.values()], unk_token="<unk>", show_progress=False
    )
    spaces = {"pre": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    backend = trained(models.Unigram(), trainer, **spaces)
    return opened(backend, XLMRobertaTokenizer, folder, **ROBERTA, cls_token="<s>", sep_token="</s>")


def unigram_with_bytes(folder):
    content = json.loads(unigram(folder).backend_tokenizer.to_str())
    content["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    return with_bytes(content, folder)


def bpe_with_bytes(folder):
    """As Llama's: spaces belong to words, words of the vocabulary are taken whole, the rest may become bytes."""
    names = [*ROBERTA.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False)
    backend = trained(models.BPE(unk_token="<unk>"), trainer, pre=pre_tokenizers.Metaspace())
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = True
    content["added_tokens"] = content["added_tokens"][: len(ROBERTA)]
    return with_bytes(content, folder)


def with_bytes(content, folder):
    content["model"]["byte_fallback"] = True
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return opened(Tokenizer.from_str(json.dumps(content)), PreTrainedTokenizerFast, folder, **ROBERTA)


def bpe_with_ends(folder):
    """As CLIP's: the last piece of a word is marked; unknown characters are unknown."""
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL.values()], end_of_word_suffix="</w>", show_progress=False
    )
    backend = trained(
        models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"), trainer, pre=pre_tokenizers.Whitespace()
    )
    return opened(backend, PreTrainedTokenizerFast, folder, **SPECIAL)


def opened(backend, kind, folder, **special):
    """Through files, as people open it; an added token stands behind the vocabulary."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)
    tokenizer.add_tokens(["<city>"])
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "tokenizer_class": kind.__name__}))
    return kind.from_pretrained(folder)


KINDS = {
    "wordpiece": wordpiece,
    "byte-level": byte_level,
    "unigram": unigram,
    "unigram with bytes": unigram_with_bytes,
    "bpe with bytes": bpe_with_bytes,
    "bpe with ends": bpe_with_ends,
}
_made = {}


@pytest.fixture
def tokenizer(tmp_path_factory):
    """`tokenizer(kind)`: trained on `LINES`."""

    def make(kind):
        if kind not in _made:
            _made[kind] = KINDS[kind](tmp_path_factory.mktemp("tokenizer"))
        return _made[kind]

    return make


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def bert(tokenizer, **more):
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZES, **more)
    ).eval()


def tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.fixture
def pruned(tokenizer, kind):
    before = tokenizer(kind)
    model = bert(before)
    smaller, after = hc.prune_vocabulary(copy.deepcopy(model), before, CORPUS)
    return model, before, smaller, after


def test_the_corpus_is_read_by_the_same_tokens_and_outputs_are_equal(pruned, tmp_path):
    model, before, smaller, after = pruned
    (step,) = hc.steps_of(smaller)
    kept = numbers_of(step["kept_ids"])
    assert len(kept) == len(after) == smaller.config.vocab_size < 0.9 * len(before)
    assert sorted(after.get_vocab().values()) == list(range(len(after)))
    assert before.convert_ids_to_tokens(kept) == after.convert_ids_to_tokens(list(range(len(after))))
    assert [tokens(after, text) for text in CORPUS] == [tokens(before, text) for text in CORPUS]
    assert tokens(after, "in <city> we")[-4:].count("<city>") == 1 or "<city>" in tokens(after, "in <city> we")
    for name in before.special_tokens_map:
        assert getattr(after, name) == getattr(before, name)
        assert kept[getattr(after, f"{name}_id")] == getattr(before, f"{name}_id")
    assert torch.equal(smaller.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight[kept])
    assert smaller.embeddings.word_embeddings.padding_idx == after.pad_token_id == smaller.config.pad_token_id
    old, new = (one(CORPUS[:9], return_tensors="pt", padding=True) for one in (before, after))
    assert_equal_to_rounding(smaller(**new)[0], model(**old)[0])
    smaller.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == after.get_vocab()
    assert again.special_tokens_map == before.special_tokens_map
    for text in (*CORPUS[:5], UNSEEN):
        assert again(text, "with a pair")["input_ids"] == after(text, "with a pair")["input_ids"]
    reopened = BertModel.from_pretrained(tmp_path)
    assert_equal_to_rounding(reopened(**new)[0], model(**old)[0])


def test_other_texts_fall_back(pruned):
    _, before, _, after = pruned
    # Most lines that the corpus lacks have words that are put together otherwise now.
    others = [text for text in LINES if tokens(after, text) != tokens(before, text)]
    assert others
    for text in others:
        assert after.unk_token not in tokens(after, text)
        assert after.decode(after(text)["input_ids"], skip_special_tokens=True).replace(" ", "") == before.decode(
            before(text)["input_ids"], skip_special_tokens=True
        ).replace(" ", "")
    lost = [tokens(one, UNSEEN).count(one.unk_token) for one in (before, after)]
    assert lost[0] == lost[1]


def test_texts_of_any_script_survive_bytes(tokenizer):
    for kind in ("byte-level", "unigram with bytes", "bpe with bytes"):
        before = tokenizer(kind)
        _, after = hc.prune_vocabulary(bert(before), before, ["a few words"])
        assert len(after) < 300
        for text in (UNSEEN, *LINES[:20]):
            read = [one.decode(one(text)["input_ids"], skip_special_tokens=True) for one in (before, after)]
            assert read[1] == read[0]
            assert kind != "byte-level" or read[1] == text


def test_any_corpus_is_read_by_the_same_tokens(tokenizer, kind):
    before, generator = tokenizer(kind), random.Random(0)
    for number in (1, 2, 5, 20):
        corpus = [*generator.sample(LINES, number), UNSEEN]
        after = trimmed(before, kept_ids(before, corpus))
        assert len(after) < len(before)
        assert [tokens(after, text) for text in corpus] == [tokens(before, text) for text in corpus]


def test_unknown_words_stay_unknown(tmp_path):
    """Without the long piece that leads nowhere, shorter ones would read the word."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "abcd", "ab", "##cde", "##f", "word"]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    before = opened(backend, PreTrainedTokenizerFast, tmp_path, **SPECIAL)
    assert tokens(before, "abcde word") == ["[UNK]", "word"]
    _, after = hc.prune_vocabulary(bert(before), before, ["abcde word"])
    assert tokens(after, "abcde word") == ["[UNK]", "word"]
    assert "abcd" in after.get_vocab()
    assert "ab" not in after.get_vocab()


LAST = (("[SEP]", 5), ("[CLS]", 4))
PROCESSORS = {
    "template": lambda: processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=LAST
    ),
    "bert": lambda: processors.BertProcessing(*LAST),
    "roberta": lambda: processors.RobertaProcessing(*LAST),
    "sequence": lambda: processors.Sequence([processors.ByteLevel(), processors.BertProcessing(*LAST)]),
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_special_tokens_that_stand_last_move(processor, tmp_path):
    names = ["long", "word", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "rare"]
    backend = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.post_processor = pre_tokenizers.BertPreTokenizer(), PROCESSORS[processor]()
    backend.enable_padding(pad_id=2, pad_token="[PAD]")
    before = opened(backend, PreTrainedTokenizerFast, tmp_path, **SPECIAL)
    model, after = hc.prune_vocabulary(bert(before), before, ["word"])
    assert json.loads(after.backend_tokenizer.to_str())["padding"]["pad_id"] == 1
    assert after.convert_ids_to_tokens(range(len(after))) == ["word", *SPECIAL.values(), "<city>"]
    assert model.embeddings.word_embeddings.padding_idx == model.config.pad_token_id == after.pad_token_id == 1
    assert after("word <city> x")["input_ids"] == [3, 0, 5, 2, 4]


def test_the_score_of_unknown_characters_stays(tmp_path):
    """It lies 10 below the lowest one. Without the unused piece that has it, `xyz` would be unknown and `yz`."""
    pieces = [("<unk>", 0.0), ("xy", -12.0), ("z", -12.0), ("yz", -1.0), ("unused", -15.0), ("also", -14.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    before = opened(backend, PreTrainedTokenizerFast, tmp_path, unk_token="<unk>", pad_token="<unk>")
    _, after = hc.prune_vocabulary(bert(before), before, ["xyz", "yz"])
    assert tokens(after, "xyz") == tokens(before, "xyz") == ["xy", "z"]
    assert set(after.get_vocab()) == {"<unk>", "xy", "z", "yz", "unused", "<city>"}


def test_merges_on_the_way_stay(tmp_path):
    """`abc` is made of `ab`, not of the rarer `bc`, which no text of the corpus passes through."""
    vocab = {name: index for index, name in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d", "ab", "bc", "abc", "cd"])}
    merges = [("a", "b"), ("ab", "c"), ("c", "d"), ("b", "c")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    before = opened(backend, PreTrainedTokenizerFast, tmp_path, pad_token="[PAD]", unk_token="[UNK]")
    _, after = hc.prune_vocabulary(bert(before), before, ["abc abcd"])
    assert set(after.get_vocab()) == {"[PAD]", "[UNK]", "a", "b", "c", "d", "ab", "abc", "<city>"}
    assert json.loads(after.backend_tokenizer.to_str())["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert tokens(after, "bcd") == ["b", "c", "d"]


def test_rare_tokens_and_foreign_characters_may_go(tokenizer):
    before = tokenizer("wordpiece")
    sizes = {}
    for name, config in (
        ("all", None),
        ("frequent", hc.VocabularyPruningConfig(min_count=3)),
        ("own", hc.VocabularyPruningConfig(characters="corpus")),
    ):
        _, after = hc.prune_vocabulary(bert(before), before, ["the cat", "the dog saw the cat"], config)
        sizes[name] = set(after.get_vocab())
    assert {"the"} <= sizes["frequent"] < sizes["all"]
    assert sizes["own"] < sizes["all"]
    seen = set("thecatdogsaw")
    assert {t.removeprefix("##") for t in sizes["own"] if len(t.removeprefix("##")) == 1} <= seen
    assert {t for t in before.get_vocab() if len(t.removeprefix("##")) == 1} <= sizes["all"]


HEADS = {
    "tied, with a bias": (AutoModelForMaskedLM, BertConfig, {}),
    "untied, with a bias": (AutoModelForMaskedLM, BertConfig, {"tie_word_embeddings": False}),
    "positions count from the padding id": (AutoModelForMaskedLM, RobertaConfig, {"pad_token_id": 5}),
    "untied": (AutoModelForCausalLM, LlamaConfig, {"tie_word_embeddings": False, "eos_token_id": [2, 97]}),
    "tied": (AutoModelForCausalLM, GPT2Config, {"eos_token_id": 98, "bos_token_id": 98}),
}


@pytest.mark.parametrize("head", HEADS)
def test_output_layers_lose_the_same_tokens(head, tmp_path):
    auto, kind, fields = HEADS[head]
    torch.manual_seed(0)
    model = auto.from_config(kind(vocab_size=99, **{"pad_token_id": 0, **SIZES, **fields})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    dense, wanted = copy.deepcopy(model), [7, 8, 20, 21, 22, 60, 90]
    hc.compress(model, hc.VocabularyPruningConfig(kept_ids=wanted))
    kept = numbers_of(hc.steps_of(model)[0]["kept_ids"])
    assert set(wanted) < set(kept)
    assert len(kept) <= len(wanted) + 7
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        old, new = getattr(dense.config, name), getattr(model.config, name)
        if old is not None:
            assert (kept[new] if isinstance(new, int) else [kept[index] for index in new]) == old
            if getattr(model, "generation_config", None) is not None:
                assert getattr(model.generation_config, name) in (new, None)
    ids = torch.tensor([[7, 20, 60, 90, 8]])
    places = torch.tensor([[kept.index(index) for index in row] for row in ids.tolist()])
    expected, found = dense(ids), model(places, labels=places)
    assert_equal_to_rounding(found.logits, expected.logits[..., kept])
    assert torch.isfinite(found.loss)
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    sizes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert sizes == {n: tuple(v.shape) for n, v in auto.from_config(model.config).state_dict().items()}
    hc.to_plain(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_equal_to_rounding(auto.from_pretrained(tmp_path)(places).logits, found.logits)


def test_the_models_own_tokenizer_reads_files(tokenizer, tmp_path):
    """`compress` with a corpus, and the tokenizer by the record, give what `prune_vocabulary` gives."""
    before = tokenizer("byte-level")
    model = bert(before)
    before.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("\n".join(CORPUS[:9]), encoding="utf-8")
    rows = [{"text": text, "words": text.split(), "label": 1} for text in CORPUS[9:]]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    cut = BertModel.from_pretrained(tmp_path / "model")
    hc.compress(cut, hc.VocabularyPruningConfig(corpus=files))
    texts = [*CORPUS, *(" ".join(row["words"]) for row in rows)]
    other, smaller = hc.prune_vocabulary(model, before, texts)
    (step,), (same,) = hc.steps_of(cut), hc.steps_of(other)
    assert step["corpus"] == ["a.txt", "b.jsonl"]
    assert step["kept_ids"] == same["kept_ids"]
    assert hc.trim_tokenizer(before, cut).get_vocab() == smaller.get_vocab()
    cut.save_pretrained(tmp_path / "cut")
    assert hc.steps_of(BertModel.from_pretrained(tmp_path / "cut")) == [step]


def test_tokens_may_be_added_afterwards(tokenizer, tmp_path):
    before = tokenizer("wordpiece")
    model, smaller = hc.prune_vocabulary(bert(before), before, CORPUS)
    smaller.add_tokens(["zebra"])
    model.resize_token_embeddings(len(smaller), mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert BertModel.from_pretrained(tmp_path).config.vocab_size == len(smaller)
    with pytest.raises(ValueError, match="Steps must not repeat vocabulary_pruning"):
        hc.prune_vocabulary(model, smaller, CORPUS)


def word_level():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_refusals_leave_the_model_as_it_was(tokenizer):
    before = tokenizer("wordpiece")
    model = bert(before)
    weight = model.embeddings.word_embeddings.weight
    small = BertModel(BertConfig(vocab_size=50, **SIZES))
    other = hc.compress(bert(before), hc.VocabularyPruningConfig(kept_ids=[0, 1, 9]))
    for call, message in (
        (lambda: hc.prune_vocabulary(model, before, []), "corpus must hold at least one text, got none"),
        (
            lambda: hc.prune_vocabulary(model, word_level(), CORPUS),
            "must be of the type WordPiece, BPE, Unigram, got Wo",
        ),
        (
            lambda: hc.prune_vocabulary(model, object(), CORPUS),
            "must be a fast one, of the tokenizers library, got obj",
        ),
        (lambda: hc.prune_vocabulary(small, before, CORPUS), "must have at most the model's 50 tokens, got 7"),
        (lambda: hc.compress(model, hc.VocabularyPruningConfig()), "corpus must name files of texts, got none"),
        (lambda: hc.compress(model, hc.VocabularyPruningConfig(corpus=["x"])), "was not opened from a folder"),
        (lambda: hc.compress(small, hc.VocabularyPruningConfig(kept_ids=[1, 50])), "model's 50 tokens, got 50"),
        (lambda: hc.trim_tokenizer(before, model), "must have gone through vocabulary_pruning"),
        (
            lambda: hc.trim_tokenizer(before, other),
            r"must hold the special and added tokens of .*, got none for .\[CLS\]",
        ),
        (lambda: hc.VocabularyPruningConfig(corpus=[]), "at least one file"),
        (lambda: hc.VocabularyPruningConfig(min_count=0), "min_count must be at least 1, got 0"),
        (lambda: hc.VocabularyPruningConfig(kept_ids=[3, 2]), "ascending"),
        (lambda: hc.VocabularyPruningConfig(kept_ids="1-"), "must look like"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.embeddings.word_embeddings.weight is weight
    assert hc.steps_of(model) == []


def test_models_without_words_or_with_two_stacks_are_refused(tokenizer):
    before, sizes = tokenizer("wordpiece"), {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = T5Config(vocab_size=len(before), decoder_start_token_id=0, **sizes)
    for model, message in (
        (ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)), "must have word embeddings, got ViTModel"),
        (T5ForConditionalGeneration(t5), "must be an encoder or a decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            hc.prune_vocabulary(model, before, CORPUS)


def test_encoders_that_no_other_method_knows(tokenizer):
    before, sizes = tokenizer("unigram"), {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=len(before), is_encoder_decoder=False, **sizes)).eval()
    old = model(**before(CORPUS[0], return_tensors="pt"))[0]
    model, after = hc.prune_vocabulary(model, before, CORPUS)
    assert_equal_to_rounding(model(**after(CORPUS[0], return_tensors="pt"))[0], old)


def test_runs():
    for numbers in ([0], [5], [0, 1], [0, 2], [0, 1, 2, 5, 7, 8, 100]):
        assert numbers_of(runs_of(numbers)) == numbers
