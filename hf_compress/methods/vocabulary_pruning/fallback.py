"""The tokens that others need: those that unknown words fall back to, and those that longer tokens are merged from.

`model` is the part `model` of a `tokenizer.json`; characters are single ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, without added tokens that stand outside of the model."""
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}


def bare(token: str, model: Mapping[str, Any]) -> str:
    """A token without the mark that it continues a word or ends it.

    Example:
        >>> bare("##s", {"continuing_subword_prefix": "##"}), bare("s</w>", {"end_of_word_suffix": "</w>"})
        ('s', 's')
    """
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    if prefix and token != prefix:
        token = token.removeprefix(prefix)
    return token.removesuffix(suffix) if token != suffix else token


def fallback_tokens(model: Mapping[str, Any], byte_level: bool, characters: set[str] | None) -> set[str]:
    """The tokens of which words are put together that have no token of their own.

    Args:
        model: Of the type WordPiece, BPE or Unigram.
        byte_level: Whether texts come to it as characters that each stand for a byte.
        characters: Those that stay; None: all.

    Returns:
        The 256 characters of the bytes, the 256 tokens of bytes, or single characters, at the beginning of a word and
        inside of it; of Unigram also the piece of the lowest score, which sets the score of unknown characters.
    """
    vocab = vocabulary_of(model)
    if byte_level:
        kept = vocab.keys() & set(ByteLevel.alphabet())
    elif model.get("byte_fallback"):
        kept = {token for token in vocab if _BYTE.fullmatch(token)}
    else:
        single = {token: bare(token, model) for token in vocab}
        kept = {t for t, one in single.items() if len(one) == 1 and (characters is None or one in characters)}
    if model["type"] == "Unigram":
        kept.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return kept


def merged_from(tokens: Iterable[str], model: Mapping[str, Any]) -> set[str]:
    """The tokens that a BPE model passes through on its way to the given ones.

    Inside of a token, the merges that make it are the same in every word and happen in the same order as when the
    token stands alone: pairs compare by rank, and none across its ends was merged. With all of them kept, a word whose
    tokens are kept is read as before.

    Example:
        >>> merges = [["b", "c"], ["a", "bc"], ["a", "b"]]
        >>> sorted(merged_from({"abc"}, {"merges": merges}))
        ['a', 'abc', 'b', 'bc', 'c']
    """
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(pairs_of(model))))}
    suffix = model.get("end_of_word_suffix") or ""
    made: set[str] = set()
    for token in tokens:
        parts = list(bare(token, model))
        if token != bare(token, model):
            parts[-1] += suffix
        made.update(parts)
        while found := [
            (ranks[pair], at) for at, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks
        ]:
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            made.add(parts[at])
    return made


def pairs_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, in the order of their ranks."""
    return [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]


def matched_pieces(word: str, model: Mapping[str, Any]) -> Iterator[str]:
    """The pieces that WordPiece finds in a word, longest first, up to the place where it gives up.

    A word that ends as unknown must still be unknown without the tokens that nobody else uses: shorter pieces might
    lead to its end.

    Example:
        >>> vocab = dict.fromkeys(["ab", "a", "##b", "##bc"], 0)
        >>> list(matched_pieces("abc", {"vocab": vocab, "continuing_subword_prefix": "##"}))
        ['ab']
    """
    vocab, prefix, start = model["vocab"], model["continuing_subword_prefix"], 0
    while start < len(word):
        mark = prefix if start else ""
        end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in vocab), None)
        if end is None:
            return
        yield mark + word[start:end]
        start = end
