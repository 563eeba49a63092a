"""Reads examples from the hub, a folder of Parquet or TSV files, or single files."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
from transformers import PretrainedConfig

from hf_compress.core.table_files import SUFFIXES, TEXT, Table, open_table, read_table, table_of
from hf_compress.tasks.arguments import DataArguments as DataArguments
from hf_compress.tasks.kinds import choose_kind
from hf_compress.tasks.published import PUBLISHED, Published
from hf_compress.tasks.task import EVALUATED, Task


logger = logging.getLogger(__name__)

# The names that a folder's files may have.
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def load_task(args: DataArguments, model: PretrainedConfig | None = None) -> Task:
    """Read a task and check its columns, texts and labels.

    Args:
        args: Where the examples are, and the kind of task.
        model: The config of the model that will read it; it decides where the columns fit several kinds.

    Returns:
        The task: `matched(model.config)` puts its labels into a model's order, `encode(split, tokenizer, max_length)`
        gives the rows that a `Trainer` takes.

    Raises:
        ValueError: If no source is given or two are, or a file cannot be read; names file, column and row of a text
            or label that is missing, empty or of another kind.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "train.csv"
        >>> _ = file.write_text("text,label\\nA fine film.,good\\nA dull plot.,bad\\n")
        >>> task = load_task(DataArguments(train_file=str(file)))
        >>> task.kind, task.label_names
        ('sequence-classification', ('bad', 'good'))
    """
    named = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {split: Path(file) for split, file in named.items() if file is not None}
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
    elif args.task_name is not None and Path(args.task_name).suffix.lower() in (*SUFFIXES, TEXT):
        tables = {"validation": open_table(Path(args.task_name), f"task_name {args.task_name!r}")}
        name = Path(args.task_name).stem
    elif args.task_name is not None:
        if args.task_name not in PUBLISHED:
            raise ValueError(
                f"task_name must be one of {', '.join(PUBLISHED)}, or a file (or give data_dir), got "
                f"{args.task_name!r}."
            )
        known = PUBLISHED[args.task_name]
        tables, name = _from_hub(known), args.task_name
    else:
        raise ValueError("task_name, data_dir or train_file must say where the examples are, got none of them.")
    kind = choose_kind(next(iter(tables.values())), name, args, model)
    return kind.read(tables, name, args)


def _from_hub(known: Published) -> dict[str, Table]:
    path = known.path
    try:
        splits = datasets.load_dataset(path, known.configuration, data_files=known.files)
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
        found = [folder / f"{name}{suffix}" for name in names for suffix in (*SUFFIXES, TEXT)]
        found = [file for file in found if file.is_file()]
        if found:
            tables[split] = read_table(found[0], split)
        if len(found) > 1:
            others = ", ".join(file.name for file in found[1:])
            logger.warning("%s is read from %s; not read: %s.", split, found[0], others)
    if not tables:
        raise ValueError(
            "data_dir must hold train/validation/test files (parquet, tsv, csv, json, txt), found none in "
            f"{str(folder)!r}."
        )
    return tables
