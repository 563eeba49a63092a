"""A tokenizer with some of its tokens, from files as they will be saved."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_compress.methods.vocabulary_pruning.tokenizer_file import content_of, fixed_ids, with_tokens


_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


def trimmed(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that knows some of its tokens under new ids.

    It is opened from files, because classes of transformers build parts of a tokenizer themselves.

    Args:
        tokenizer: A fast one of the type WordPiece, BPE or Unigram.
        kept: The ids that stay, ascending; a token's new id is its place.

    Raises:
        ValueError: If the tokenizer cannot lose tokens, or an id is missing that it names elsewhere.
    """
    content = content_of(tokenizer)
    missing = (fixed_ids(content) | set(tokenizer.all_special_ids)) - set(kept)
    if missing:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(missing))))
        raise ValueError(f"kept_ids must hold the special and added tokens of the tokenizer, got none for {names}.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, _FILE).write_text(json.dumps(with_tokens(content, kept), ensure_ascii=False), encoding="utf-8")
        _renumber_settings_(Path(folder, _SETTINGS), kept)
        result: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    # The folder is gone.
    result.name_or_path = tokenizer.name_or_path
    for name, value in list(result.init_kwargs.items()):
        if isinstance(value, str) and value.startswith(folder):
            result.init_kwargs[name] = tokenizer.init_kwargs.get(name)
    _require_tokens(tokenizer, result, kept)
    return result


def _renumber_settings_(file: Path, kept: Sequence[int]) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in settings:
        places = {index: place for place, index in enumerate(kept)}
        old = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {str(places[int(index)]): token for index, token in old}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _require_tokens(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, kept: Sequence[int]) -> None:
    """Raise `ValueError` unless every kept token has its new id."""
    names = {index: token for token, index in before.get_vocab().items()}
    expected = {names[index]: place for place, index in enumerate(kept) if index in names}
    found = after.get_vocab()
    if found != expected:
        token = next(iter(sorted(expected.items() ^ found.items())))[0]
        raise ValueError(
            f"tokenizer cannot lose tokens: {type(before).__name__} builds a vocabulary of its own; {token!r} would "
            f"have the id {found.get(token)} instead of {expected.get(token)}."
        )
