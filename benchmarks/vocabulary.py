"""What a smaller vocabulary costs: bytes, outputs on texts of the corpus, vectors and accuracy on texts that it lacks.

    python benchmarks/vocabulary.py --model MODEL --data_dir DATA/sst2_sentences --out vocabulary.json

The corpus is the column `sentence` of the training split. Sentence vectors are means over tokens. Accuracy is that of
a logistic regression on vectors of the dense model, which then reads those of each smaller model: nothing is trained.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet
import torch
from header import arguments_of, commit, machine
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

import hf_compress as hc
from hf_compress.core.pooling import Pooling
from hf_compress.core.saving import write_json


SETTINGS: dict[str, dict[str, Any]] = {
    "every token of the corpus": {},
    "only its own characters": {"characters": "corpus"},
    "tokens that occur twice": {"min_count": 2},
    "tokens that occur twice, only its own characters": {"min_count": 2, "characters": "corpus"},
}


@torch.no_grad()
def vectors(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """[texts, D], neighbours in length together."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    result = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), 64):
        index = order[start : start + 64]
        batch = tokenizer([texts[i] for i in index], return_tensors="pt", padding=True, truncation=True)
        result[index] = Pooling.MEAN.pooled(model(**batch)[0], batch["attention_mask"].bool())
    return result


def bytes_on_disk(model: Any, tokenizer: Any) -> dict[str, int]:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        names = ("model.safetensors", "tokenizer.json", "config.json")
        return {name: Path(folder, name).stat().st_size for name in names}


def tokens_of(tokenizer: Any, texts: list[str]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--examples", type=int, default=2000, help="Training texts whose vectors are compared.")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    splits = {
        split: pyarrow.parquet.read_table(Path(args.data_dir, f"{split}.parquet")).to_pydict()
        for split in ("train", "validation")
    }
    corpus, unseen = (splits[split]["sentence"] for split in ("train", "validation"))
    step = max(1, len(corpus) // args.examples)
    some, labels = corpus[::step], splits["train"]["label"][::step]
    dense, tokenizer = AutoModel.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
    known, other = vectors(dense, tokenizer, some), vectors(dense, tokenizer, unseen)
    probe = LogisticRegression(max_iter=2000).fit(known.numpy(), labels)
    read, read_other = tokens_of(tokenizer, corpus), tokens_of(tokenizer, unseen)

    def accuracy(found: torch.Tensor) -> float:
        return round(100 * float(probe.score(found.numpy(), splits["validation"]["label"])), 2)

    rows: dict[str, Any] = {
        "dense": {
            "tokens": len(tokenizer),
            "bytes": bytes_on_disk(dense, tokenizer),
            "accuracy": accuracy(other),
            "unknown": sum(text.count(tokenizer.unk_token) for text in read_other),
        }
    }
    for name, fields in SETTINGS.items():
        config = hc.VocabularyPruningConfig(**fields)
        model, smaller = hc.prune_vocabulary(copy.deepcopy(dense), tokenizer, corpus, config)
        now, now_other = tokens_of(smaller, corpus), tokens_of(smaller, unseen)
        same = [index for index in range(len(some)) if now[index * step] == read[index * step]]
        ours, theirs = vectors(model, smaller, some), vectors(model, smaller, unseen)
        alike = cosine_similarity(theirs, other)
        changed = [index for index in range(len(unseen)) if now_other[index] != read_other[index]]
        rows[name] = {
            "tokens": len(smaller),
            "bytes": bytes_on_disk(model, smaller),
            "corpus_read_as_before": sum(a == b for a, b in zip(now, read, strict=True)) / len(corpus),
            "largest_difference_of_vectors": float((ours[same] - known[same]).abs().max()),
            "unseen_read_otherwise": len(changed) / len(unseen),
            "unseen_cosine_mean": float(alike.mean()),
            "unseen_cosine_of_changed": float(alike[changed].mean()) if changed else None,
            "unseen_cosine_min": float(alike.min()),
            "tokens_a_text": sum(map(len, now_other)) / sum(map(len, read_other)),
            "unknown": sum(text.count(smaller.unk_token) for text in now_other),
            "accuracy": accuracy(theirs),
        }
        print(name, rows[name], flush=True)
    write_json(args.out, {"arguments": arguments_of(args), "commit": commit(), "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
