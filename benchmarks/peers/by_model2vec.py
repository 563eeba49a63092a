"""Model2Vec: one vector a token, distilled from a sentence encoder, and its own classifier trained on their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from model2vec.distill import distill
from model2vec.inference import StaticModelPipeline
from model2vec.train import StaticModelForClassification
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.setting import Setting
from hf_compress.core.exported import ExportedModel


SETTINGS = (
    "distill of the encoder without training data (256 dimensions), then StaticModelForClassification.fit with its "
    "defaults: vectors trained, a tenth of the training sentences kept for early stopping"
)
EXPORTED = False
PIPELINE = "pipeline"


def texts_and_labels(setting: Setting, split: str) -> tuple[list[str], list[int]]:
    """Labels in the order of the dense model."""
    return list(setting.task.split(split)[setting.task.text_columns[0]]), list(setting.rows(split)["labels"])


class Static(ExportedModel):
    """Its saved classifier, called with token ids as the others are: nobody's tokenizer is timed."""

    runtime = "model2vec"

    def __init__(self, folder: Path, setting: Setting) -> None:
        super().__init__(folder, ["input_ids", "attention_mask"], ["logits"], setting.open().config)
        self._setting = setting
        self.pipeline = StaticModelPipeline.from_pretrained(str(folder))
        self._tokenize = self.pipeline.model.tokenize
        self.pipeline.model.tokenize = lambda sentences, max_length=None: sentences
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=self.pipeline.model.tokenizer, pad_token="[PAD]")

    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.file.rglob("*") if file.is_file())

    def rows(self, split: str) -> Dataset:
        """The sentences of a split in its own tokens."""
        texts, labels = texts_and_labels(self._setting, split)
        ids = self._tokenize(texts, max_length=self._setting.args.max_length)
        masks = [[1] * len(row) for row in ids]
        return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels})

    def compute(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        ids, masks = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy().astype(bool)
        chances = self.pipeline.predict_proba([row[mask].tolist() for row, mask in zip(ids, masks, strict=True)])
        return [torch.from_numpy(np.log(chances + 1e-12))]


def make(setting: Setting, folder: Path) -> StaticModelForClassification:
    static = distill(setting.args.encoder, device="cpu")
    # They lie in memory column by column, which is how they would be written, and rows are read.
    static.embedding = np.ascontiguousarray(static.embedding)
    model = StaticModelForClassification.from_static_model(model=static)
    model.fit(*texts_and_labels(setting, "train"), device="cpu", random_seed=setting.args.seed)
    model.to_pipeline().save_pretrained(str(folder / PIPELINE))
    return model


def opened(setting: Setting, folder: Path, model: StaticModelForClassification) -> dict[str, Any]:
    texts, _ = texts_and_labels(setting, "validation")
    again = StaticModelPipeline.from_pretrained(str(folder / PIPELINE)).predict_proba(texts)
    difference = float(np.abs(again - model.predict_proba(texts)).max())
    return {"from_pretrained": False, "error": "a folder of model2vec", "StaticModelPipeline": difference}
