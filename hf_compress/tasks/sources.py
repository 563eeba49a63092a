"""Where labelled examples come from: the hub, a folder of Parquet or TSV files, or single files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, Features, Value

from hf_compress.tasks.columns import label_column, read_texts, require_columns, text_columns
from hf_compress.tasks.label_column import read_labels
from hf_compress.tasks.tables import SUFFIXES, Table, read_table, table_of
from hf_compress.tasks.task import EVALUATED, Task


logger = logging.getLogger(__name__)

# task -> (hub path, hub configuration, text columns, number of labels; 1 is regression)
TASKS: dict[str, tuple[str, str | None, tuple[str, ...], int]] = {
    "cola": ("nyu-mll/glue", "cola", ("sentence",), 2),
    "imdb": ("stanfordnlp/imdb", None, ("text",), 2),
    "mnli": ("nyu-mll/glue", "mnli", ("premise", "hypothesis"), 3),
    "mrpc": ("nyu-mll/glue", "mrpc", ("sentence1", "sentence2"), 2),
    "qnli": ("nyu-mll/glue", "qnli", ("question", "sentence"), 2),
    "qqp": ("nyu-mll/glue", "qqp", ("question1", "question2"), 2),
    "rte": ("nyu-mll/glue", "rte", ("sentence1", "sentence2"), 2),
    "sst2": ("nyu-mll/glue", "sst2", ("sentence",), 2),
    "stsb": ("nyu-mll/glue", "stsb", ("sentence1", "sentence2"), 1),
}
# The names that a folder's files may have.
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass
class DataArguments:
    """Where the task's examples come from and how long their texts may be.

    Args:
        task_name: One of the GLUE tasks or imdb: read from the hub, or from `data_dir` or files when they are given.
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
        max_train_samples: Use only this many training examples, drawn with a fixed seed.
        max_eval_samples: Use only this many validation and test examples, drawn with a fixed seed.
    """

    task_name: str | None = None
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    max_length: int = 128
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def load_task(args: DataArguments) -> Task:
    """Read a task and check its columns, texts and labels.

    Raises:
        ValueError: If no source is given or two are, or a file cannot be read; names file, column and row of a text
            or label that is missing, empty or of another kind.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {split: Path(file) for split, file in files.items() if file is not None}
    if args.data_dir is not None:
        if files:
            raise ValueError(
                f"data_dir and {', '.join(f'{split}_file' for split in files)} both say where the examples are: "
                "give the folder or single files."
            )
        tables = _from_folder(Path(args.data_dir))
        name = args.task_name or Path(args.data_dir).resolve().name
    elif files:
        tables = {split: read_table(file, split) for split, file in files.items()}
        name = args.task_name or "files"
    elif args.task_name is not None:
        if args.task_name not in TASKS:
            raise ValueError(
                f"task_name must be one of {', '.join(TASKS)} (or give data_dir), got {args.task_name!r}."
            )
        hub, configuration, _, _ = TASKS[args.task_name]
        tables, name = _from_hub(hub, configuration), args.task_name
    else:
        raise ValueError("task_name, data_dir or train_file must say where the examples are, got none of them.")
    return _checked(tables, name, args)


def _from_hub(path: str, configuration: str | None) -> dict[str, Table]:
    try:
        splits = datasets.load_dataset(path, configuration)
    except (ConnectionError, OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"Cannot read {path} from the hub ({type(error).__name__}); give data_dir to read files."
        ) from error
    for matched in EVALUATED:
        if f"{matched}_matched" in splits:
            splits[matched] = splits.pop(f"{matched}_matched")
    return {split: table_of(splits[split], f"{split} of {path}") for split in _SPLITS if split in splits}


def _from_folder(folder: Path) -> dict[str, Table]:
    if not folder.is_dir():
        raise ValueError(f"data_dir must be a folder, got {str(folder)!r}.")
    tables = {}
    for split, names in _SPLITS.items():
        found = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
        found = [file for file in found if file.is_file()]
        if found:
            tables[split] = read_table(found[0], split)
        if len(found) > 1:
            others = ", ".join(file.name for file in found[1:])
            logger.warning("%s is read from %s; not read: %s.", split, found[0], others)
    if not tables:
        raise ValueError(
            f"data_dir must hold train/validation/test files (parquet, tsv, csv, json), found none in {str(folder)!r}."
        )
    return tables


def _without_unlabelled_test(tables: dict[str, Table], column: str) -> dict[str, Table]:
    """GLUE publishes test splits without labels, or with -1 in all rows: there is nothing to measure on them."""
    test = tables.get("test")
    if test is None or len(tables) == 1:
        return tables
    if column in test.columns and not all(str(label) in ("-1", "-1.0") for label in test.read(column)):
        return tables
    logger.warning("%s has no labels: it is left out.", test.where)
    return {split: table for split, table in tables.items() if split != "test"}


def _checked(tables: dict[str, Table], name: str, args: DataArguments) -> Task:
    some = next(iter(tables.values()))
    known = TASKS.get(name)
    texts = text_columns(some, args.text_column, args.text_pair_column, known[2] if known else None)
    column = label_column(some, args.label_column)
    if column in texts or "label" in texts:
        raise ValueError(
            f"text_column and label_column must be different columns, and texts cannot be called 'label', got "
            f"{', '.join(texts)} and {column}."
        )
    tables = _without_unlabelled_test(tables, column)
    for table in tables.values():
        require_columns(table, (*texts, column))
    read = {split: read_texts(table, texts, lenient=known is not None) for split, table in tables.items()}
    labels = read_labels(tables, column, known[3] if known else None)
    kinds = Features(
        {**{text: Value("string") for text in texts}, "label": Value("int64" if labels.names else "float64")}
    )
    splits = DatasetDict(
        {
            split: Dataset.from_dict({**read[split], "label": labels.values[split]}, features=kinds, split=split)
            for split in tables
        }
    )
    for split, limit in (("train", args.max_train_samples), *((x, args.max_eval_samples) for x in EVALUATED)):
        if limit and split in splits and limit < len(splits[split]):
            # Drawn, not cut off: files sorted by label (IMDB's are) would leave a single class.
            splits[split] = splits[split].shuffle(seed=0).select(range(limit))
    return Task(
        name, splits, texts, labels.names, labels.numbers, labels.declared,
        {split: table.where for split, table in tables.items()}, labels.first_rows or {},
    )  # fmt: skip
