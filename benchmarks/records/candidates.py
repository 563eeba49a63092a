"""Questions with ten paragraphs each for a reranker: the right one and those that a sentence encoder takes for it.

    python -m benchmarks.records.candidates --data DATA --encoder MODEL --out candidates

Questions and paragraphs are those of `squad_dev`. In each split a question is compared with all paragraphs of the
split; the ten nearest by cosine are its candidates, the right one in place of the tenth where it is not among them.
To learn from, each has the right one, a near one, and two from anywhere, without which a small encoder learns nothing.
Every fifth article of the training split is kept back: its questions are the validation split. The test split is
`squad_dev`'s own validation split, whose articles are others.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from datasets import Dataset
from transformers import AutoModel, AutoTokenizer

from benchmarks.vectors import vectors


CANDIDATES = 10
# Of a question to learn from, beside the right paragraph.
NEAR, ANYWHERE = 1, 2
TRAINING, MEASURED = 4000, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="The folder with squad_dev.")
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    encoder, tokenizer = AutoModel.from_pretrained(args.encoder).eval(), AutoTokenizer.from_pretrained(args.encoder)
    drawing = random.Random(0)

    def rows(questions: Dataset, most: int, learned: bool = False) -> Dataset:
        paragraphs = list(dict.fromkeys(questions["context"]))
        # Some questions are asked twice.
        once = list({question: row for row, question in enumerate(questions["question"])}.values())
        drawn = drawing.sample(once, min(most, len(once)))
        texts = vectors(encoder, tokenizer, paragraphs)
        asked = vectors(encoder, tokenizer, [questions[row]["question"] for row in drawn])
        near = (asked @ texts.T).topk(CANDIDATES).indices.tolist()
        found = []
        for row, places in zip(drawn, near, strict=True):
            question, right = questions[row]["question"], questions[row]["context"]
            others = [paragraphs[place] for place in places if paragraphs[place] != right][: CANDIDATES - 1]
            if learned:
                far = drawing.sample([text for text in paragraphs if text != right], ANYWHERE)
                others = [*drawing.sample(others, NEAR), *far]
            # In an order that says nothing.
            shown = [right, *others]
            drawing.shuffle(shown)
            found += [{"query": question, "passage": text, "label": int(text == right)} for text in shown]
        return Dataset.from_list(found)

    learned, test = (Dataset.from_parquet(f"{args.data}/squad_dev/{name}.parquet") for name in ("train", "validation"))
    kept_back = set(sorted(set(learned["title"]))[::5])
    splits = {
        "train": rows(learned.filter(lambda row: row["title"] not in kept_back), TRAINING, learned=True),
        "validation": rows(learned.filter(lambda row: row["title"] in kept_back), MEASURED),
        "test": rows(test, MEASURED),
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, found in splits.items():
        found.to_parquet(f"{args.out}/{name}.parquet")


if __name__ == "__main__":
    main()
