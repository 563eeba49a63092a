"""Questions with sentences for a reranker; one sentence of each question holds the answer.

    python -m benchmarks.records.candidates --data DATA --out candidates

Questions and paragraphs are those of `squad_dev`. Beside the right sentence stand the others of its paragraph, and
sentences of the same split, ten in all; a question to learn from has one of its paragraph and two others. Every fifth
article of the training split is kept back: its questions are the validation split. The test split is `squad_dev`'s own
validation split, whose articles are others.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

from datasets import Dataset


CANDIDATES = 10
# Of a question to learn from, beside the right sentence.
NEAR, ANYWHERE = 1, 2
# Questions to measure on, of each split.
MEASURED = 1000
_END = re.compile(r"(?<=[.!?])\s+")


def sentences(paragraph: str) -> list[tuple[int, str]]:
    """Each sentence after the place where it starts."""
    starts = [0, *(found.end() for found in _END.finditer(paragraph))]
    ends = [*starts[1:], len(paragraph)]
    found = [(start, paragraph[start:end].strip()) for start, end in zip(starts, ends, strict=True)]
    # A paragraph may end with a space.
    return [(start, text) for start, text in found if text]


def rows(questions: Dataset, drawing: random.Random, most: int | None = None) -> Dataset:
    """The candidates of the questions, or of so many of them with all ten."""
    # Some questions are asked twice.
    once = {row["question"]: row for row in questions}
    pool = [text for paragraph in dict.fromkeys(questions["context"]) for _, text in sentences(paragraph)]
    found = []
    for question, row in drawing.sample(sorted(once.items()), most or len(once)):
        own = sentences(row["context"])
        right = max(place for place, (start, _) in enumerate(own) if start <= row["answer_starts"][0])
        others = [text for place, (_, text) in enumerate(own) if place != right]
        if not others:
            continue
        near = drawing.sample(others, min(NEAR if most is None else CANDIDATES - 1, len(others)))
        far = drawing.sample(pool, ANYWHERE if most is None else CANDIDATES - 1 - len(near))
        shown = [own[right][1], *near, *far]
        labels = dict.fromkeys(shown, 0) | {shown[0]: 1}
        drawing.shuffle(shown)
        found += [{"query": question, "passage": text, "label": labels[text]} for text in dict.fromkeys(shown)]
    return Dataset.from_list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="The folder with squad_dev.")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    drawing = random.Random(0)
    learned, test = (Dataset.from_parquet(f"{args.data}/squad_dev/{name}.parquet") for name in ("train", "validation"))
    kept_back = set(sorted(set(learned["title"]))[::5])
    splits = {
        "train": rows(learned.filter(lambda row: row["title"] not in kept_back), drawing),
        "validation": rows(learned.filter(lambda row: row["title"] in kept_back), drawing, MEASURED),
        "test": rows(test, drawing, MEASURED),
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, found in splits.items():
        found.to_parquet(f"{args.out}/{name}.parquet")


if __name__ == "__main__":
    main()
