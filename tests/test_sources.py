"""Task data read from files."""

import pytest
from datasets import Dataset

from hf_compress.tasks.sources import DataArguments, load_task


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_part_of_a_file_sorted_by_label_holds_every_class(tmp_path, split):
    rows = {"text": [f"text {i}" for i in range(200)], "label": [i // 100 for i in range(200)]}
    for name in ("train", "validation", "test"):
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")

    def read():
        args = DataArguments(data_dir=str(tmp_path), max_train_samples=40, max_eval_samples=40)
        return load_task(args).split(split)

    part = read()
    assert len(part) == 40
    assert 10 <= sum(part["label"]) <= 30
    assert part["text"] == read()["text"]
