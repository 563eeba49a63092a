"""Texts without labels for a sentence encoder, and questions with the paragraph that answers each to measure it.

    python -m benchmarks.records.plain_texts --data DATA --out texts

Texts: sentences of STS-B's training split, questions and paragraphs of `squad_dev`'s training articles, paragraphs of
WikiText-2's validation split, beginnings of pages of C4. Every fifth training article of `squad_dev` is kept back: its
questions are the validation split. The test split is `squad_dev`'s own validation split, whose articles are others.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from datasets import Dataset


# Headings and short lines of articles are no texts that somebody looks for.
_SHORTEST, _LONGEST = 120, 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="The folder with stsb, squad_dev, wikitext2 and c4_sample.")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    def rows(name: str) -> Dataset:
        return Dataset.from_parquet(f"{args.data}/{name}.parquet")

    answers, pairs = rows("squad_dev/train"), rows("stsb/train")
    kept_back = set(sorted(set(answers["title"]))[::5])
    learned = answers.filter(lambda row: row["title"] not in kept_back)
    texts = [*pairs["sentence1"], *pairs["sentence2"], *learned["question"], *dict.fromkeys(learned["context"])]
    texts += [text.strip() for text in rows("wikitext2/validation")["text"] if len(text) > _SHORTEST]
    texts += [text[:_LONGEST] for text in rows("c4_sample/train")["text"]]
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    random.Random(0).shuffle(texts)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"text": texts}).to_parquet(out / "train.parquet")
    measured = answers.filter(lambda row: row["title"] in kept_back)
    for split, found in (("validation", measured), ("test", rows("squad_dev/validation"))):
        columns = {"sentence1": found["question"][:], "sentence2": found["context"][:]}
        Dataset.from_dict(columns).to_parquet(out / f"{split}.parquet")
    print(f"{len(texts)} texts, {len(measured)} questions to choose by")


if __name__ == "__main__":
    main()
