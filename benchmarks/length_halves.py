"""Writes a data folder that trains on the shorter half of a task's texts and tests on the longer half.

    python benchmarks/length_halves.py --data_dir DATA/imdb --task_name imdb --max_train_samples 2000 \
        --max_eval_samples 800 --out runs/imdb_halves

`train` and `validation` are the shorter halves of the training and test rows, `test` the longer half of the test
rows; halves are split at the median number of characters. For `token_pruning.py`: what is learned on short texts must
hold on long ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset

from hf_compress.tasks.sources import DataArguments, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    task = load_task(
        DataArguments(
            task_name=args.task_name, data_dir=args.data_dir,
            max_train_samples=args.max_train_samples, max_eval_samples=args.max_eval_samples,
        )
    )  # fmt: skip

    def halves(split: Dataset) -> tuple[Dataset, Dataset]:
        order = sorted(range(len(split)), key=lambda i: sum(len(split[i][x]) for x in task.text_columns))
        return split.select(order[: len(order) // 2]), split.select(order[len(order) // 2 :])

    shorter, longer = halves(task.split("test"))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": halves(task.split("train"))[0], "validation": shorter, "test": longer}.items():
        rows.to_parquet(folder / f"{name}.parquet")
        print(name, len(rows))


if __name__ == "__main__":
    main()
