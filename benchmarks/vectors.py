"""Sentence vectors of an encoder: means over its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


LONGEST = 256


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))


@torch.no_grad()
def vectors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """[texts, D]: means over real tokens, of length one."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = encoded(tokenizer, [texts[row] for row in rows])
        live = batch["attention_mask"].unsqueeze(-1)
        states = model(**batch).last_hidden_state * live
        means = torch.nn.functional.normalize(states.sum(1) / live.sum(1), dim=-1)
        found.update(zip(rows, means, strict=True))
    return torch.stack([found[row] for row in range(len(texts))])
