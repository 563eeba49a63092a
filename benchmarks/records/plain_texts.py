"""Texts without labels for a sentence encoder, and questions with the paragraph that answers each to measure it.

    python -m benchmarks.records.plain_texts --data DATA --out texts

Texts: sentences of STS-B's training split, questions and paragraphs of `squad_dev`'s training articles, paragraphs of
WikiText-2's validation split, pages of C4 in pieces, and 30,000 sentences of all those paragraphs and pieces. Every
fifth training article of `squad_dev` is kept back: its questions are the validation split. The test split is
`squad_dev`'s own validation split, whose articles are others.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

from datasets import Dataset


# Headings and short lines of articles are no texts that somebody looks for.
_SHORTEST, _LONGEST = 120, 1200
# Of one page of C4, so that no page is most of it.
_PIECES = 8
_SENTENCES = 30_000
_END = re.compile(r"(?<=[.!?])\s+")
_END_OR_LINE = re.compile(r"(?<=[.!?])\s+|\n+")


def pieces(page: str) -> list[str]:
    """Runs of whole sentences; only a sentence that is longer than a piece is cut."""
    found, piece = [], ""
    for sentence in _END_OR_LINE.split(page):
        if piece and len(piece) + len(sentence) > _LONGEST:
            found.append(piece)
            piece = ""
        piece = f"{piece} {sentence}".strip()
    found.append(piece)
    return [each[:_LONGEST] for each in found if len(each) > _SHORTEST][:_PIECES]


def sentences(texts: list[str]) -> list[str]:
    return [each for text in texts for each in _END.split(text) if 30 < len(each) < 300]


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
    paragraphs = list(dict.fromkeys(learned["context"]))
    articles = [text.strip() for text in rows("wikitext2/validation")["text"] if len(text) > _SHORTEST]
    pages = [piece for page in rows("c4_sample/train")["text"] for piece in pieces(page)]
    drawing = random.Random(0)
    texts = [*pairs["sentence1"], *pairs["sentence2"], *learned["question"], *paragraphs, *articles, *pages]
    texts += drawing.sample(sentences([*paragraphs, *articles, *pages]), _SENTENCES)
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    drawing.shuffle(texts)
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
