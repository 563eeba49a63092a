"""What stands in a `tokenizer.json`, and the same file with fewer tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_compress.methods.vocabulary_pruning.fallback import pairs_of


Content = dict[str, Any]
TYPES = ("WordPiece", "BPE", "Unigram")


def content_of(tokenizer: PreTrainedTokenizerBase) -> Content:
    """The `tokenizer.json` of a tokenizer.

    Raises:
        ValueError: If it has none, or a model that cannot lose tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer must be a fast one, of the tokenizers library, got {type(tokenizer).__name__}: open it with "
            "AutoTokenizer."
        )
    content: Content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") not in TYPES:
        raise ValueError(
            f"tokenizer must be of the type {', '.join(TYPES)}, got {model.get('type')}: it has no smaller tokens "
            "that words without a token of their own could be put together of."
        )
    if model["type"] == "BPE" and (model.get("continuing_subword_prefix") or model.get("dropout")):
        field = "dropout" if model.get("dropout") else "continuing_subword_prefix"
        raise ValueError(f"tokenizer must be a BPE model without {field}, got {model[field]!r}.")
    return content


def is_byte_level(content: Content) -> bool:
    """Whether texts come to the model as characters that each stand for a byte."""
    parts = [content.get("pre_tokenizer") or {}, content.get("normalizer") or {}]
    for part in parts:
        # A sequence lists its parts.
        parts.extend([*part.get("pretokenizers", ()), *part.get("normalizers", ())])
    return any(part.get("type") == "ByteLevel" for part in parts)


def fixed_ids(content: Content) -> set[int]:
    """The ids that a tokenizer names outside of its vocabulary: added and special tokens, padding, unknown."""
    found: set[int] = set()

    def seen(index: int) -> int:
        found.add(index)
        return index

    _renumber_(copy.deepcopy({key: value for key, value in content.items() if key != "model"}), seen)
    model = content["model"]
    if model.get("unk_id") is not None:
        found.add(model["unk_id"])
    if model.get("unk_token") in model["vocab"] and isinstance(model["vocab"], dict):
        found.add(model["vocab"][model["unk_token"]])
    return found


def _renumber_(content: Content, new: Callable[[int], int]) -> None:
    """Replace every id outside of the model, in place."""
    for token in content.get("added_tokens") or ():
        token["id"] = new(token["id"])
    if content.get("padding"):
        content["padding"]["pad_id"] = new(content["padding"]["pad_id"])
    processors = [content.get("post_processor") or {}]
    for processor in processors:
        processors.extend(processor.get("processors") or ())
        for token in (processor.get("special_tokens") or {}).values():
            token["ids"] = [new(index) for index in token["ids"]]
        for name in ("sep", "cls"):
            if name in processor:
                processor[name][1] = new(processor[name][1])


def with_tokens(content: Content, kept: Sequence[int]) -> Content:
    """The content with the kept tokens alone.

    Args:
        content: As `content_of` gives it; it is not changed.
        kept: The ids that stay, ascending, `fixed_ids` among them; a token's new id is its place.

    Raises:
        ValueError: If the vocabulary is a list with fewer entries than ids.
    """
    places = {index: place for place, index in enumerate(kept)}
    result = copy.deepcopy(content)
    model = result["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][index] for index in kept if index < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = places[model["unk_id"]]
    else:
        model["vocab"] = {token: places[index] for token, index in model["vocab"].items() if index in places}
    if model["type"] == "BPE":
        vocab = model["vocab"]
        model["merges"] = [
            [left, right] for left, right in pairs_of(model) if {left, right, left + right} <= vocab.keys()
        ]
    _renumber_(result, places.__getitem__)
    return result
