"""Running text whose next token a model predicts.

Letters: B windows, S tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hf_compress.core.positions import usual_tokens
from hf_compress.core.table_files import Table
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments, WindowArguments
from hf_compress.tasks.column_choice import find_column, finds_label, text_columns
from hf_compress.tasks.inputs import IGNORED, collated, tokenizer_for
from hf_compress.tasks.metrics import Array
from hf_compress.tasks.perplexity import WindowLosses, cut, require_windows, summed_losses, window_labels
from hf_compress.tasks.published import PUBLISHED
from hf_compress.tasks.task import Batch, Collator, Processor, Task


# What language models' papers put between the lines of WikiText.
_BETWEEN_ROWS = "\n\n"
# Characters of a training text from which windows are drawn.
_CALIBRATION_TEXT = 20_000_000
# The context of the published perplexities; models that take more are measured on as much.
_CONTEXT = 2048


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
        """The loss per predicted token and its exponential; each window is predicted from its second token on.

        Windows that are all whole have as many tokens each: then that is the mean of their mean losses, as published.
        """
        loss = float(self.losses[:, 0].sum() / self.losses[:, 1].sum())
        return {"perplexity": float(np.exp(loss)), "loss_per_token": loss}

    def at(self, examples: npt.NDArray[np.int64]) -> TextLoss:
        return TextLoss(self.losses[examples])


@dataclass(frozen=True, kw_only=True)
class LanguageModeling(Task):
    """Texts in a column `text`.

    Args:
        separate: Whether each row is a text of its own; else all rows of a split are one text.
        between: Split -> what stands between its rows.
        windows: How a measured text is cut; None: it is not measured, but read in training.
    """

    separate: bool
    between: Mapping[str, str] = field(default_factory=dict)
    windows: WindowArguments | None = None

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
        """Read the texts of all splits. Rows without text stay out where each is a text of its own."""
        splits, between = DatasetDict(), {}
        known = PUBLISHED.get(name)
        for split, table in tables.items():
            (column,) = text_columns(table, args.text_column or find_column(table, None, ("text", "sentence")))
            texts = table.read(column)
            odd = next((row for row, text in enumerate(texts, 1) if not isinstance(text, str | None)), None)
            if odd is not None:
                raise ValueError(f"{table.where}: {column} must be a text in every row, row {odd} has none.")
            if not any(text and text.strip() for text in texts):
                raise ValueError(f"{table.where}: {column} must hold at least one text, got none.")
            kept = [text for text in texts if text and text.strip()] if args.separate_rows else texts
            limit = args.max_train_samples if split == "train" else args.max_eval_samples
            splits[split] = Dataset.from_dict({"text": [text or "" for text in kept[:limit]]}, split=split)
            between[split] = table.between or (_BETWEEN_ROWS if known is None else known.between)
        files = {split: table.where for split, table in tables.items()}
        return cls(name=name, splits=splits, files=files, separate=args.separate_rows, between=between)

    @classmethod
    def unfit(cls, config: PretrainedConfig) -> str:
        """Encoders see the token that they are to predict."""
        if cls.has_head(config):
            return ""
        return (
            f"it is a {(config.architectures or [config.model_type])[0]}, and {cls.kind} needs an architecture that "
            f"predicts each token from those before it ({' or '.join(cls.heads)})."
        )

    @property
    def main_metric(self) -> str:
        """Perplexity: lower is better."""
        return "perplexity"

    def measured_split(self, name: str | None = None) -> str:
        """As for every task, but of a published text the split that its perplexities are published for."""
        known = PUBLISHED.get(self.name)
        if name is None and known is not None and known.measured in self.splits:
            return str(known.measured)
        return super().measured_split(name)

    def windowed(self, windows: WindowArguments) -> LanguageModeling:
        """The task with the windows of a measurement."""
        known = PUBLISHED.get(self.name)
        if windows.max_windows is None and known is not None:
            windows = dataclasses.replace(windows, max_windows=known.windows)
        return dataclasses.replace(self, windows=windows)

    def longest(self, model: PreTrainedModel, processor: Processor, max_length: int | None) -> int:
        """The tokens of a window: those that the model takes, at most 2048, unless the user says otherwise."""
        limits = [usual_tokens(model), getattr(processor, "model_max_length", None)]
        limit = min(tokens for tokens in (*limits, max_length or _CONTEXT) if tokens is not None)
        if max_length is not None and limit < max_length:
            raise ValueError(
                f"max_length must be at most {limit}, the positions of the model or its tokenizer, got {max_length}."
            )
        return limit

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Windows of `max_length` tokens with `labels`.

        A running text is cut into whole windows; what is left at its end stays out. Of texts on their own the last
        window may be shorter, and so is that of a short text in training. Tokens of an earlier window have no label.

        Raises:
            ValueError: If a measured text is shorter than a window.
        """
        tokenizer = tokenizer_for(processor, max_length)
        chosen = self.windows or WindowArguments()
        stride = require_windows(max_length, chosen.stride)
        streams = self.tokens(split, tokenizer)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids in streams:
            places = cut(len(ids), max_length, stride, tail=self.separate)
            if not places and self.windows is None:
                places = [range(len(ids))]
            for number, place in enumerate(places):
                window = ids[place.start : place.stop]
                # A window of one token predicts nothing.
                if len(window) > 1:
                    columns["input_ids"].append(window)
                    columns["attention_mask"].append([1] * len(window))
                    columns["labels"].append(window_labels(window, max_length - stride if number else 0))
        if not columns["input_ids"]:
            tokens = sum(map(len, streams))
            raise ValueError(
                f"{self.files[split]}: no text has two tokens or more."
                if self.separate or tokens < 2
                else f"{self.files[split]}: the text has {tokens} tokens, fewer than one window of {max_length}: give "
                f"more text, or a max_length of at most {tokens}."
            )
        first = {name: rows[: chosen.max_windows] for name, rows in columns.items()}
        return Dataset.from_dict(first, split=self.split(split).split)

    def tokens(self, split: str, processor: Processor) -> list[list[int]]:
        """The tokens of each text of a split: of one text, unless rows are separate ones."""
        return list(tokenizer_for(processor)(self._texts(split), verbose=False)["input_ids"])

    def _texts(self, split: str) -> list[str]:
        """The rows of a split, or the one text that they are."""
        texts, known = self.split(split)["text"][:], PUBLISHED.get(self.name)
        if known is not None and known.documents is not None and split == self.evaluation_split:
            texts = texts[: known.documents]
        return texts if self.separate else [self.between.get(split, _BETWEEN_ROWS).join(texts)]

    def random_windows(self, processor: Processor, length: int, count: int, seed: int) -> Dataset | None:
        """Windows of the running text, which may overlap; where the texts are on their own: None.

        Source:
            The calibration of GPTQ (arXiv 2210.17323): its code draws the same places from the same tokens.
        """
        if self.separate:
            return None
        if "train" not in self.splits:
            raise ValueError(
                f"The task {self.name!r} has no train split to calibrate on, only {', '.join(self.splits)}: name a "
                "text with train_file, in place of data_dir; it need not be of the task that is measured."
            )
        rows, drawing = self.split("train")["text"][:], random.Random(seed)
        if sum(map(len, rows)) > _CALIBRATION_TEXT:
            # As many of them, in another order, as hold the text that is enough.
            drawing.shuffle(rows)
            ends = list(itertools.accumulate(map(len, rows)))
            rows = rows[: next(place for place, end in enumerate(ends, 1) if end >= _CALIBRATION_TEXT)]
        text = self.between.get("train", _BETWEEN_ROWS).join(rows)
        ids = tokenizer_for(processor, length)(text, verbose=False)["input_ids"]
        if len(ids) < length:
            raise ValueError(
                f"{self.files['train']}: the text has {len(ids)} tokens, fewer than one window of {length}: give more "
                f"text, or a max_length of at most {len(ids)}."
            )
        starts = [drawing.randint(0, max(len(ids) - length - 1, 0)) for _ in range(count)]
        windows = [ids[start : start + length] for start in starts]
        return Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * length] * count, "labels": windows})

    def protocol(self, rows: Dataset) -> dict[str, Any]:
        """How the text was cut, and how many tokens were predicted."""
        context = max(map(len, rows["input_ids"]))
        labels = sum(sum(label != IGNORED for label in labels[1:]) for labels in rows["labels"])
        stride = self.windows.stride if self.windows is not None else None
        return {
            "windows": len(rows),
            "context": context,
            # Texts on their own are windows of their own lengths.
            **({} if self.separate else {"stride": stride or context, "tokens_added_per_window": 0}),
            "predicted_tokens": labels,
        }

    def collator(self, processor: Processor) -> Collator:
        """Pads inputs and labels to the longest row."""
        return partial(collated, processor=tokenizer_for(processor))

    def answering(self, model: PreTrainedModel) -> Callable[[Batch, Batch], Sequence[Tensor]]:
        """As `row_outputs`, but without the scores of all tokens at once."""
        losses = WindowLosses(model)
        return lambda inputs, batch: list(losses(inputs, batch["labels"]))

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """[2] the loss of each window and its number of predicted tokens."""
        return list(_losses(outputs.logits, batch["labels"]))

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> TextLoss:
        """The losses of all windows."""
        return TextLoss(np.stack(outputs).astype(np.float64))

    def training_outputs(self, logits: Any, labels: Any) -> Any:
        """The losses: logits of all tokens of a split would not fit the memory."""
        scores = logits[0] if isinstance(logits, tuple) else logits
        return _losses(scores, labels).float().to(scores.device)

    def training_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics from gathered losses."""
        return TextLoss(np.asarray(predictions, dtype=np.float64)).metrics()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return summed_losses(logits, labels, lambda part: part, logits.shape[-1])
