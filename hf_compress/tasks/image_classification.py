"""Images that have a class each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedTokenizerBase

from hf_compress.core.errors import first_line
from hf_compress.core.table_files import Table
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.class_answers import ClassAnswers
from hf_compress.tasks.column_choice import chosen_column, find_column, label_column, require_columns
from hf_compress.tasks.inputs import collated
from hf_compress.tasks.label_matching import match_labels
from hf_compress.tasks.label_values import read_labels
from hf_compress.tasks.labelled import LabelledTask
from hf_compress.tasks.metrics import Array, classification_metrics
from hf_compress.tasks.task import Batch, Collator, Processor, Task, drawn


_IMAGES = ("image", "img", "image_path")


@dataclass(frozen=True, kw_only=True)
class ImageClassification(LabelledTask):
    """Columns `image` (the bytes of a file, or its path) and `label`."""

    kind: ClassVar[str] = "image-classification"
    summary: ClassVar[str] = "a class for an image"
    model_noun: ClassVar[str] = "image classifier"
    model_class: ClassVar[type[Any]] = AutoModelForImageClassification
    heads: ClassVar[tuple[str, ...]] = ("ForImageClassification",)
    reads_images: ClassVar[bool] = True

    @classmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Whether there is a column of images."""
        return args.text_column is None and find_column(table, None, _IMAGES) is not None

    @classmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> ImageClassification:
        """Read images and labels of all splits; images are opened once, so that a broken one is found now."""
        some = next(iter(tables.values()))
        column = chosen_column(some, args.text_column, "text_column", "images", _IMAGES)
        target = label_column(some, args.label_column)
        for table in tables.values():
            require_columns(table, (column, target))
        labels = read_labels(tables, target)
        if not labels.names:
            raise ValueError(f"{some.where}: {target} must hold classes; it holds scores.")
        splits = DatasetDict()
        for split, table in tables.items():
            cells = [_file_of(cell, table, row) for row, cell in enumerate(table.read(column), 1)]
            for row, cell in enumerate(cells, 1):
                _open(cell, f"{table.where}: {column} in row {row}")
            columns = {"image": cells, "label": labels.values[split]}
            splits[split] = Dataset.from_dict(columns, split=split)
        return cls(
            name=name,
            splits=drawn(splits, args),
            files={split: table.where for split, table in tables.items()},
            **labels.task_fields(),
            labels_from=target,
        )

    @property
    def main_metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Pixel values as the model takes them, with `labels`; `max_length` counts tokens and is not read."""
        if isinstance(processor, PreTrainedTokenizerBase):
            raise ValueError(f"Images need an image processor; {type(processor).__name__} reads texts.")
        rows = self.split(split)

        def encoded(batch: dict[str, list[Any]]) -> dict[str, Any]:
            images = [_open(cell, split) for cell in batch["image"]]
            return {"pixel_values": processor(images, return_tensors="np")["pixel_values"], "labels": batch["label"]}

        return rows.map(
            encoded, batched=True, batch_size=64, remove_columns=rows.column_names, load_from_cache_file=False
        )

    def text_of(self, split: str, example: int) -> str:
        """The number of the image."""
        return f"image {example + 1} of {split}"

    def collator(self, processor: Processor) -> Collator:
        """Stacks images."""
        return partial(collated, processor=processor)

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """[C] the logits of each image."""
        return list(outputs.logits.float())

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> ClassAnswers:
        """Logits and labels in the order of the files."""
        labels = rows.with_format("numpy")["labels"][:]
        return ClassAnswers(*self.in_own_order(np.stack(outputs), labels), self.own_names())

    def training_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics from gathered logits and labels."""
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        ordered, right = self.in_own_order(np.asarray(logits), np.asarray(labels))
        return classification_metrics(ordered.argmax(-1), right, ordered.shape[-1])

    def matched(self, config: PretrainedConfig) -> Task:
        """The task with the label ids of a model."""
        return match_labels(self, config)


def _file_of(cell: Any, table: Table, row: int) -> bytes:
    """The bytes of an image file, from a cell that holds them, or its path, or both as `datasets` writes them."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str) and Path(cell).is_file():
        return Path(cell).read_bytes()
    raise ValueError(f"{table.where}: row {row} holds no image and no path of one, but {str(cell)[:60]!r}.")


def _open(content: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where} is no image that can be opened: {first_line(error)}.") from error
