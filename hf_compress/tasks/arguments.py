"""The flags that say where a task's examples come from and how they are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DataArguments:
    """Where the task's examples come from and how long their texts may be.

    Args:
        task_name: One of the GLUE tasks or imdb: read from the hub, or from `data_dir` or files when they are given.
        task_kind: What is learned: sequence-classification, token-classification, question-answering,
            language-modeling, image-classification or sentence-embedding. Left out: the columns and the model decide.
        data_dir: Folder with the files train, validation and test (parquet, tsv, csv, json or jsonl), as far as they
            exist.
        train_file: File of training examples: parquet, tsv, csv, json or jsonl, with a column of texts (two for pairs)
            and one of labels.
        validation_file: File of the examples that models are measured on, with the same columns.
        test_file: File of further examples with the same columns; models are measured on them when there is no
            validation file.
        text_column: Column with the texts. Left out: usual names such as sentence, text or utterance are found.
        text_pair_column: Column with the second text of each pair, when `text_column` names the first.
        label_column: Column with the labels. Left out: usual names such as label, intent or category are found.
        max_length: Longest input in tokens; longer texts are cut.
        window_stride: Question answering: how many tokens two neighbouring windows of a long text share. Left out: a
            third of `max_length`.
        separate_rows: Language modelling: every row is a text of its own. Left out: all rows are one running text.
        max_train_samples: Use only this many training examples, drawn with a fixed seed.
        max_eval_samples: Use only this many validation and test examples, drawn with a fixed seed.

    Raises:
        ValueError: If a length, a stride or a number of examples is out of range.

    Example:
        >>> DataArguments(data_dir="reviews", max_length=256).task_kind is None   # found when the data is read
        True
    """

    task_name: str | None = None
    task_kind: str | None = None
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    max_length: int = 128
    window_stride: int | None = None
    separate_rows: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}.")
        if self.window_stride is not None and not 0 <= self.window_stride < self.max_length:
            raise ValueError(f"window_stride must be in 0..max_length - 1, got {self.window_stride}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
