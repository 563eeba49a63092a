"""Running text whose next token a model predicts.

Letters: B windows, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_compress.core.table_files import Table
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.column_choice import find_column, finds_label, text_columns
from hf_compress.tasks.inputs import IGNORED, collated, tokenizer_for
from hf_compress.tasks.metrics import Array
from hf_compress.tasks.task import Batch, Collator, Processor, Task, drawn


# What language models' papers put between the lines of WikiText.
_BETWEEN_ROWS = "\n\n"


@dataclass(frozen=True)
class TextLoss(Answers):
    """How surprised a model was by each window of a text.

    Args:
        losses: [B, 2] the sum of the negative log-likelihoods of the predicted tokens, in nats, and their number.
    """

    losses: Array

    def __len__(self) -> int:
        return len(self.losses)

    def metrics(self) -> dict[str, float]:
        """The loss per predicted token and its exponential; each window is predicted from its second token on."""
        loss = float(self.losses[:, 0].sum() / self.losses[:, 1].sum())
        return {"perplexity": float(np.exp(loss)), "loss_per_token": loss}

    def at(self, examples: npt.NDArray[np.int64]) -> TextLoss:
        return TextLoss(self.losses[examples])


@dataclass(frozen=True, kw_only=True)
class LanguageModeling(Task):
    """Texts in a column `text`.

    Args:
        separate: Whether each row is a text of its own; else all rows are one text, with blank lines between.
    """

    separate: bool

    kind: ClassVar[str] = "language-modeling"
    summary: ClassVar[str] = "the next token of a text, by a causal language model"
    model_noun: ClassVar[str] = "causal language model"
    model_class: ClassVar[type[Any]] = AutoModelForCausalLM
    heads: ClassVar[tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")
    lower_is_better: ClassVar[bool] = True

    @classmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Whether there is a column of texts and none of labels."""
        return find_column(table, args.text_column, ("text", "sentence")) is not None and not finds_label(table, args)

    @classmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> LanguageModeling:
        """Read the texts of all splits; rows without text stay out."""
        splits = DatasetDict()
        for split, table in tables.items():
            (column,) = text_columns(table, args.text_column or find_column(table, None, ("text", "sentence")))
            texts = table.read(column)
            odd = next((row for row, text in enumerate(texts, 1) if not isinstance(text, str | None)), None)
            if odd is not None:
                raise ValueError(f"{table.where}: {column} must be a text in every row, row {odd} has none.")
            kept = [text for text in texts if text and text.strip()]
            if not kept:
                raise ValueError(f"{table.where}: {column} must hold at least one text, got none.")
            splits[split] = Dataset.from_dict({"text": kept}, split=split)
        files = {split: table.where for split, table in tables.items()}
        return cls(name=name, splits=drawn(splits, args), files=files, separate=args.separate_rows)

    @property
    def main_metric(self) -> str:
        """Perplexity: lower is better."""
        return "perplexity"

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Windows of `max_length` tokens one after the other, the last of each text shorter, with `labels`."""
        tokenizer = tokenizer_for(processor, max_length)
        texts = self.split(split)["text"][:]
        if self.separate:
            streams = tokenizer(texts, verbose=False)["input_ids"]
        else:
            streams = tokenizer([_BETWEEN_ROWS.join(texts)], verbose=False)["input_ids"]
        cut = [ids[start : start + max_length] for ids in streams for start in range(0, len(ids), max_length)]
        # A window of one token predicts nothing.
        windows = [window for window in cut if len(window) > 1]
        if not windows:
            raise ValueError(f"{self.files[split]}: no text has two tokens or more.")
        masks = [[1] * len(window) for window in windows]
        columns = {"input_ids": windows, "attention_mask": masks, "labels": windows}
        return Dataset.from_dict(columns, split=self.split(split).split)

    def collator(self, processor: Processor) -> Collator:
        """Pads inputs and labels to the longest row."""
        return partial(collated, processor=tokenizer_for(processor))

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """[2] the loss of each window and its number of predicted tokens."""
        return list(_losses(outputs.logits, batch["labels"]))

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> TextLoss:
        """The losses of all windows."""
        return TextLoss(np.stack(outputs).astype(np.float64))

    def training_outputs(self, logits: Any, labels: Any) -> Any:
        """The losses: logits of all tokens of a split would not fit the memory."""
        return _losses(logits[0] if isinstance(logits, tuple) else logits, labels)

    def training_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics from gathered losses."""
        return TextLoss(np.asarray(predictions, dtype=np.float64)).metrics()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, 2] from logits [B, S, V] and labels [B, S]; one window at a time, in single precision."""
    rows = []
    for scores, targets in zip(logits[:, :-1], labels.to(logits.device)[:, 1:], strict=True):
        loss = nn.functional.cross_entropy(scores.float(), targets, ignore_index=IGNORED, reduction="sum")
        rows.append(torch.stack([loss, (targets != IGNORED).sum().float()]))
    return torch.stack(rows)
