"""Which tokens of a tokenizer stay: those that texts use, and those that others need."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_compress.methods.vocabulary_pruning.fallback import (
    bare,
    fallback_tokens,
    matched_pieces,
    merged_from,
    vocabulary_of,
)
from hf_compress.methods.vocabulary_pruning.tokenizer_file import Content, content_of, fixed_ids, is_byte_level


# Texts that are read at once.
_CHUNK = 4096


def whole_reader(content: Content) -> Tokenizer:
    """A tokenizer that neither cuts texts nor pads them."""
    return Tokenizer.from_str(json.dumps({**content, "truncation": None, "padding": None}))


def readings(reader: Tokenizer, texts: Sequence[str]) -> Iterator[Encoding]:
    """Read texts one after the other."""
    for start in range(0, len(texts), _CHUNK):
        yield from reader.encode_batch(list(texts[start : start + _CHUNK]))


def kept_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], min_count: int = 1, characters: str = "all"
) -> list[int]:
    """The ids of the tokens that stay, ascending.

    Args:
        tokenizer: A fast one of the type WordPiece, BPE or Unigram.
        texts: The corpus; at least one.
        min_count, characters: As in `VocabularyPruningConfig`.

    Raises:
        ValueError: If there is no text, or the tokenizer cannot lose tokens.
    """
    if not texts:
        raise ValueError("corpus must hold at least one text, got none.")
    content = content_of(tokenizer)
    model, vocab = content["model"], vocabulary_of(content["model"])
    reader, counts, unknown = whole_reader(content), Counter[int](), []
    unknown_id = vocab.get(model.get("unk_token") or "")
    for text, reading in zip(texts, readings(reader, texts), strict=True):
        counts.update(reading.ids)
        if model["type"] == "WordPiece" and unknown_id in reading.ids:
            unknown.append(text)
    tokens = {index: token for token, index in vocab.items()}
    used = {tokens[index] for index, count in counts.items() if count >= min_count and index in tokens}
    fixed = fixed_ids(content) | set(tokenizer.all_special_ids)
    seen = {char for index in counts.keys() & tokens.keys() - fixed for char in bare(tokens[index], model)}
    needed = fallback_tokens(model, is_byte_level(content), None if characters == "all" else seen)
    if model["type"] == "BPE":
        needed |= merged_from(used, model)
    needed |= {piece for text in unknown for word in _words(reader, text) for piece in matched_pieces(word, model)}
    ids = {vocab[token] for token in used | needed if token in vocab}
    return sorted(ids | fixed)


def _words(reader: Tokenizer, text: str) -> list[str]:
    text = reader.normalizer.normalize_str(text) if reader.normalizer else text
    return [word for word, _ in reader.pre_tokenizer.pre_tokenize_str(text)] if reader.pre_tokenizer else [text]


def count_covered(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, kept: Sequence[int], texts: Sequence[str]
) -> int:
    """Count the texts whose tokens all stayed, and check that each of them is read as before.

    Args:
        before, after: The tokenizer, and what was made of it.
        kept: The ids that stayed, ascending.
        texts: The texts to read.

    Raises:
        ValueError: If the smaller tokenizer reads one of them otherwise.
    """
    places: Mapping[int, Any] = {index: place for place, index in enumerate(kept)}
    covered = 0
    pair = [readings(whole_reader(content_of(one)), texts) for one in (before, after)]
    for text, old, new in zip(texts, *pair, strict=True):
        expected = [places.get(index) for index in old.ids]
        if None not in expected:
            covered += 1
            if expected != new.ids:
                raise ValueError(
                    f"tokenizer cannot lose tokens: of {type(before).__name__}, the smaller one reads {text[:40]!r} "
                    "otherwise."
                )
    return covered
