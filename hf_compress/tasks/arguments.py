"""The flags that say where a task's examples come from and how they are read."""

from __future__ import annotations

from dataclasses import dataclass


# Tokens of the longest input unless the user says otherwise.
_LONGEST = 128


@dataclass
class DataArguments:
    """Where the task's examples come from and how long their texts may be.

    Args:
        task_name: One of the GLUE tasks, imdb, squad, conll2003, wikitext2, ptb or c4: read from the hub, or from
            `data_dir` or files when they are given. Or a file of texts that models are measured on.
        task_kind: What is learned: sequence-classification, token-classification, question-answering,
            language-modeling, image-classification, sentence-embedding or reranking. Left out: the columns and the
            model decide (never for reranking, whose columns are those of a classifier of pairs).
        data_dir: Folder with the files train, validation and test (parquet, tsv, csv, json or jsonl), as far as they
            exist.
        train_file: File of training examples: parquet, tsv, csv, json or jsonl, with a column of texts (two for pairs)
            and one of labels. Language modelling needs no labels and also reads a plain text (txt), line by line.
        validation_file: File of the examples that models are measured on, with the same columns.
        test_file: File of further examples with the same columns; models are measured on them when there is no
            validation file.
        text_column: Column with the texts. Left out: usual names such as sentence, text or utterance are found.
        text_pair_column: Column with the second text of each pair, when `text_column` names the first.
        label_column: Column with the labels. Left out: usual names such as label, intent or category are found.
        max_length: Longest input in tokens; longer texts are cut. Language modelling: the tokens of a window. Left
            out: 128; where perplexity is measured or a language model compressed, what the model takes, at most 2048.
        window_stride: Question answering: how many tokens two neighbouring windows of a long text share. Left out: a
            third of `max_length`.
        separate_rows: Language modelling: every row is a text of its own. Left out: all rows are one running text,
            with a blank line between (ptb and c4: a space; the lines of a plain text as they stand there).
        max_train_samples: Use only this many training examples, drawn with a fixed seed.
        max_eval_samples: Use only this many validation and test examples, drawn with a fixed seed. Of a running text,
            the first rows are used, here and in `max_train_samples`.

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
    max_length: int | None = None
    window_stride: int | None = None
    separate_rows: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}.")
        if self.window_stride is not None and not 0 <= self.window_stride < self.longest:
            raise ValueError(f"window_stride must be in 0..max_length - 1, got {self.window_stride}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def longest(self) -> int:
        """`max_length`, or 128."""
        return _LONGEST if self.max_length is None else self.max_length


@dataclass
class WindowArguments:
    """How a running text is cut where the perplexity of language models is measured.

    Args:
        stride: How many tokens each window begins behind the one before it; only tokens that no earlier window held
            count. Left out: as many as a window has, so that windows do not overlap.
        max_windows: Measure only this many windows, the first ones. Left out: all (c4: 256).

    Raises:
        ValueError: If one of them is not positive.
    """

    stride: int | None = None
    max_windows: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def require_none(self, kind: str) -> None:
        """Raise `ValueError` for what says something about windows where a kind of task has none."""
        for name, value in vars(self).items():
            if value is not None:
                raise ValueError(
                    f"{name} must be left out for {kind}, got {value}: only the running text of a language model is "
                    "read in such windows."
                )
