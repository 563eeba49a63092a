"""Where labelled examples come from: the hub, a folder of Parquet or TSV files, or single files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict


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
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("sentence",), ("text",),
)  # fmt: skip
_EVALUATED = ("validation", "test")
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where the task's examples come from and how long their texts may be.

    Args:
        task_name: One of the GLUE tasks or imdb: read from the hub, or from `data_dir` when that is given.
        data_dir: Folder with the files `{train,validation,test}.{parquet,tsv,csv,json}`.
        train_file: File of training examples with the columns `sentence`, or `sentence1` and `sentence2`, or `text`,
            and `label`.
        validation_file: File of validation examples with the same columns.
        test_file: File of test examples with the same columns.
        max_length: Longest input in tokens; longer texts are cut.
        max_train_samples: Use only this many training examples, drawn with a fixed seed.
        max_eval_samples: Use only this many validation and test examples, drawn with a fixed seed.
    """

    task_name: str | None = None
    data_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    max_length: int = 128
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Task:
    """Labelled splits and what their labels mean.

    Args:
        name: For metrics and tables; the task name or the folder's.
        splits: `train`, `validation` and `test` as far as they exist, with a column `label`.
        text_columns: One, or two for pairs.
        label_names: Class names in the order of their ids; empty for regression.
    """

    name: str
    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def evaluation_split(self) -> str | None:
        """`validation`, or `test` for tasks that have no other (IMDB), or None."""
        return next((name for name in _EVALUATED if name in self.splits), None)

    def split(self, name: str) -> Dataset:
        if name not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {name!r}: there is no such file.")
        return self.splits[name]


def load_task(args: DataArguments) -> Task:
    """Read a task and check its columns and labels.

    Raises:
        ValueError: If no source is given, a file is missing, empty or has the wrong columns, or labels are missing.
    """
    if args.data_dir is not None:
        splits, name = _from_folder(Path(args.data_dir)), args.task_name or Path(args.data_dir).name
    elif args.train_file or args.validation_file or args.test_file:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        splits, name = _from_files({k: Path(v) for k, v in files.items() if v}), args.task_name or "files"
    elif args.task_name is not None:
        if args.task_name not in TASKS:
            raise ValueError(
                f"task_name must be one of {', '.join(TASKS)} (or give data_dir), got {args.task_name!r}."
            )
        hub, configuration, _, _ = TASKS[args.task_name]
        splits, name = _from_hub(hub, configuration), args.task_name
    else:
        raise ValueError("task_name, data_dir or train_file must say where the examples are, got none of them.")
    return _checked(splits, name, args)


def _from_hub(path: str, configuration: str | None) -> DatasetDict:
    try:
        splits = datasets.load_dataset(path, configuration)
    except (ConnectionError, OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"Cannot read {path} from the hub ({type(error).__name__}); give data_dir to read files."
        ) from error
    for matched in _EVALUATED:
        if f"{matched}_matched" in splits:
            splits[matched] = splits.pop(f"{matched}_matched")
    return splits


def _from_folder(folder: Path) -> DatasetDict:
    if not folder.is_dir():
        raise ValueError(f"data_dir must be a folder, got {str(folder)!r}.")
    found = {}
    for split in ("train", "validation", "test"):
        for suffix in (".parquet", ".tsv", ".csv", ".json", ".jsonl"):
            if (folder / f"{split}{suffix}").is_file():
                found.setdefault(split, folder / f"{split}{suffix}")
    if not found:
        raise ValueError(
            f"data_dir must hold train/validation/test files (parquet, tsv, csv, json), found none in {str(folder)!r}."
        )
    return _from_files(found)


def _from_files(files: dict[str, Path]) -> DatasetDict:
    splits = DatasetDict()
    for split, file in files.items():
        if not file.is_file():
            raise ValueError(f"{split}_file must exist, got {str(file)!r}.")
        if file.suffix not in _READERS:
            raise ValueError(f"{split}_file must end in one of {', '.join(_READERS)}, got {file.name!r}.")
        if not file.stat().st_size:
            raise ValueError(f"{split}_file must not be empty, got {str(file)!r}.")
        options: dict[str, Any] = {"delimiter": "\t"} if file.suffix == ".tsv" else {}
        try:
            splits[split] = datasets.load_dataset(
                _READERS[file.suffix], data_files=str(file), split="train", **options
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
            raise ValueError(
                f"{split}_file {file.name!r} cannot be read as {file.suffix}: {_first_line(error)}"
            ) from error
    return splits


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _is_empty(label: Any) -> bool:
    return label is None or label != label  # noqa: PLR0124  (NaN)


def _checked(splits: DatasetDict, name: str, args: DataArguments) -> Task:
    some = next(iter(splits.values()))
    known = TASKS[name][2] if name in TASKS else None
    candidates = [known] if known and set(known) <= set(some.column_names) else list(_TEXT_COLUMNS)
    columns = next((c for c in candidates if set(c) <= set(some.column_names)), None)
    if columns is None:
        raise ValueError(
            f"columns must hold sentence, text, or sentence1 and sentence2, got {', '.join(some.column_names)}."
        )
    for split, rows in splits.items():
        missing = {*columns, "label"} - set(rows.column_names)
        if missing:
            raise ValueError(
                f"{split} must have the columns {', '.join((*columns, 'label'))}; "
                f"missing: {', '.join(sorted(missing))}."
            )
        if not len(rows):
            raise ValueError(f"{split} must hold at least one row, got none.")
        if any(_is_empty(label) for label in rows.unique("label")):
            empty = sum(map(_is_empty, rows["label"]))
            raise ValueError(f"label must be filled in every row, got {empty} empty in {split}.")
    label = some.features["label"]
    if isinstance(label, ClassLabel):
        names = tuple(label.names)
    elif label.dtype.startswith("float"):
        names = ()
    else:
        values = sorted(
            {value for rows in splits.values() for value in rows.unique("label") if value not in (-1, None)}
        )
        if label.dtype in ("string", "large_string"):
            names = tuple(map(str, values))
            ids = {text: i for i, text in enumerate(names)}
            splits = splits.map(lambda row: {"label": ids[row["label"]]}, features=None)
        else:
            if values != list(range(len(values))):
                raise ValueError(
                    f"label must hold the class ids 0..C-1 (or texts, or floats for regression), got {values[:10]}."
                )
            names = tuple(f"LABEL_{value}" for value in values)
        if len(names) < 2:
            raise ValueError(f"label must have at least two classes, got {len(names)}.")
    # Unlabelled GLUE test rows carry -1: a metric on them would be meaningless.
    splits = DatasetDict({k: rows for k, rows in splits.items() if -1 not in rows.unique("label") or not names})
    for split, limit in (("train", args.max_train_samples), *((x, args.max_eval_samples) for x in _EVALUATED)):
        if limit and split in splits and limit < len(splits[split]):
            # Drawn, not cut off: files sorted by label (IMDB's are) would leave a single class.
            splits[split] = splits[split].shuffle(seed=0).select(range(limit))
    return Task(name, splits, columns, names)
