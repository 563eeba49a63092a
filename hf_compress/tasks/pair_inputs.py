"""Pairs of texts for models that read each text by itself: `second_input_ids` beside `input_ids`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


_SECOND = "second_"
SECOND_IDS = f"{_SECOND}input_ids"
_READ = ("input_ids", "attention_mask")


def read_pairs_separately_(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Mark a tokenizer as that of a model with `pair_mode="separate"`; the mark is saved with it.

    A task then encodes the texts of a pair one by one for that model. Other callers, for example `pipeline`, get token
    types beside the joint encoding, by which the model tells the texts apart.

    Returns:
        The tokenizer.
    """
    if not reads_separately(tokenizer):
        names = [*tokenizer.model_input_names, "token_type_ids", *(f"{_SECOND}{name}" for name in _READ)]
        tokenizer.model_input_names = list(dict.fromkeys(names))
    # What `save_pretrained` writes.
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return tokenizer


def reads_separately(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer was marked by `read_pairs_separately_`."""
    return SECOND_IDS in tokenizer.model_input_names


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[str], second: Sequence[str], max_length: int
) -> dict[str, list[list[int]]]:
    """Encode the two texts of each pair by themselves, each with the tokens that open and close a text.

    Args:
        tokenizer: Usually the teacher's.
        first, second: As many texts each.
        max_length: Tokens of one text at most; longer ones are cut.

    Returns:
        `input_ids` and `attention_mask` of the first texts, `second_input_ids` and `second_attention_mask` of the
        second ones, unpadded.

    Raises:
        ValueError: If the numbers of texts differ.
    """
    if len(first) != len(second):
        raise ValueError(f"Pairs must have as many first as second texts, got {len(first)} and {len(second)}.")
    found = {}
    for prefix, texts in (("", first), (_SECOND, second)):
        encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
        found.update({f"{prefix}{name}": encoded[name] for name in _READ})
    return found


@dataclass
class PairCollator:
    """Pads the first and the second texts of a batch, each to their longest.

    For a teacher that reads both texts as one sequence, it is the `student` of a `TeacherStudentCollator`.

    Args:
        tokenizer: Knows the padding token.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]"))
        >>> collator = PairCollator(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]"))
        >>> rows = [{"input_ids": [1], "second_input_ids": [1, 1]}, {"input_ids": [1, 1], "second_input_ids": [1]}]
        >>> collator(rows)["second_attention_mask"].tolist()
        [[1, 1], [1, 0]]
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if any(SECOND_IDS not in feature for feature in features):
            raise ValueError(
                f"A row for a model that reads two texts separately must hold {SECOND_IDS}, got "
                f"{', '.join(sorted(features[0]))}: encode pairs with encode_pairs."
            )
        batch: dict[str, Tensor] = {}
        for prefix in ("", _SECOND):
            # Masks are made anew: a row need not bring any.
            texts = [{"input_ids": feature[f"{prefix}input_ids"]} for feature in features]
            padded = self.tokenizer.pad(texts, return_attention_mask=True, return_tensors="pt")
            batch.update({f"{prefix}{name}": padded[name] for name in _READ})
        for name in ("labels", "label"):
            if name in features[0]:
                batch["labels"] = torch.tensor([feature[name] for feature in features])
        return batch
