"""Some of IMDB's reviews, few enough for two cores: 8,000 for training, 1,000 to choose by, 2,500 to test.

    python -m benchmarks.records.long_reviews --data DATA --out reviews

Rows are drawn with a fixed seed from the shuffled splits. Reviews to choose by come from the training split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset


TRAINING, VALIDATION, TEST = 8000, 1000, 2500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="The folder with imdb.")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    def shuffled(split: str) -> Dataset:
        return Dataset.from_parquet(f"{args.data}/imdb/{split}.parquet").shuffle(0).select_columns(["text", "label"])

    learned, measured = shuffled("train"), shuffled("test")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    learned.select(range(TRAINING)).to_parquet(out / "train.parquet")
    learned.select(range(TRAINING, TRAINING + VALIDATION)).to_parquet(out / "validation.parquet")
    measured.select(range(TEST)).to_parquet(out / "test.parquet")


if __name__ == "__main__":
    main()
