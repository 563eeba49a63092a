"""Tiny classifiers that answer a set of texts perfectly, and files of these texts in many shapes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from tests.test_bad_input import WORDS, write_tokenizer


TEXTS = [f"w{i} {'good' if i % 3 else 'bad'} w{(7 * i) % 90} w{(i * i) % 90}" for i in range(48)]


def write_perfect_model(folder: Path, names: list[str] | None, classes: int = 2) -> list[int]:
    """Save a random classifier with these label names and return the class that it gives each text."""
    torch.manual_seed(1)
    labels = (
        {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    )
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
        num_labels=classes, **labels,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        # Every class is the answer to some text.
        model.classifier.bias -= logits.mean(0)
        answers = (logits - logits.mean(0)).argmax(-1).tolist()
    assert set(answers) == set(range(classes))
    model.save_pretrained(folder)
    return answers


def write_rows(file: Path, rows: list[dict]) -> Path:
    """Write rows as the suffix says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as target:
            writer = csv.DictWriter(target, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file
