"""The config of a model that knows only some of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_compress.core.method import MethodConfig
from hf_compress.methods.vocabulary_pruning.runs import numbers_of, runs_of


@dataclass(kw_only=True)
class VocabularyPruningConfig(MethodConfig):
    """Of all tokens, those stay that a corpus uses, and those that other texts fall back to.

    Args:
        corpus: Files with the texts whose tokens stay: text files, of which each line is a text, or tables (parquet,
            tsv, csv, json, jsonl), of which every column of texts is read.
        min_count: How often the corpus must use a token. With 1, every text of the corpus is read as before; with
            more, rare tokens go too, and words that need them are put together of other tokens.
        characters: Which single characters stay for words that the corpus does not have. `all`: every one that the
            tokenizer has; `corpus`: those that the corpus has, so that other scripts become unknown. Tokenizers that
            fall back to bytes keep the bytes and need no characters.
        kept_ids: Filled in by `compress`: the ids that the remaining tokens had, in ascending order; a token's place
            among them is its new id. When they are given, no corpus is read. `config.json` holds them as runs.

    Example:
        >>> VocabularyPruningConfig(kept_ids=[0, 1, 2, 9]).to_record()["kept_ids"]
        '0-2,9'
    """

    corpus: list[str] | None = None
    min_count: int = 1
    characters: Literal["all", "corpus"] = "all"
    kept_ids: list[int] | str | None = field(default=None, metadata={"output": True})

    def check(self) -> None:
        if self.corpus is not None and not self.corpus:
            raise ValueError("corpus must name at least one file of texts, got none.")
        if self.min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {self.min_count}.")
        if isinstance(self.kept_ids, str):
            self.kept_ids = numbers_of(self.kept_ids)
        ids = self.kept_ids
        if ids is not None and (not ids or ids[0] < 0 or any(a >= b for a, b in zip(ids, ids[1:], strict=False))):
            raise ValueError("kept_ids must be ascending ids from 0, at least one.")

    @property
    def ids(self) -> list[int]:
        """`kept_ids`, which must be there."""
        if not isinstance(self.kept_ids, list):
            raise ValueError("kept_ids must be recorded, got a config that was never applied.")
        return self.kept_ids

    def to_record(self) -> dict[str, Any]:
        values = super().to_record()
        return values if self.kept_ids is None else {**values, "kept_ids": runs_of(self.ids)}
