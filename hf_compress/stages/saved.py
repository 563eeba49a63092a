"""Saving the models that stages pass to each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_compress.core.pooling import own_sentence_files
from hf_compress.core.processes import is_first_process
from hf_compress.core.saving import complete_or_absent, write_json
from hf_compress.folder_card import write_card
from hf_compress.tasks.task import Processor, Task


def save_stage(
    directory: str | Path,
    model: PreTrainedModel,
    processor: Processor,
    results: Mapping[str, Any],
    task: Task | None = None,
) -> None:
    """Save model, tokenizer and `results.json`, all or nothing; of several processes, the first one does it.

    Args:
        directory: The folder.
        model: The model to save.
        processor: Its tokenizer or image processor.
        results: What `results.json` shall hold.
        task: What the model is for; sentence encoders have further files beside them.

    Raises:
        ValueError: If the disk is full or the folder cannot be written.
    """
    if is_first_process():
        with complete_or_absent(directory) as staged:
            model.save_pretrained(staged)
            save_beside(staged, directory, model, processor, results, task)


def save_beside(
    staged: Path,
    directory: str | Path,
    model: PreTrainedModel,
    processor: Processor,
    results: Mapping[str, Any],
    task: Task | None,
) -> None:
    """Save what a stage's folder has beside the model.

    Args:
        staged: Where the files are put for now.
        directory: Where they will be.
        model: May be on the meta device.
        processor, results, task: As for `save_stage`.
    """
    processor.save_pretrained(staged)
    write_json(staged / "results.json", results)
    # What the model was opened from may have such files.
    source = getattr(model.config, "_name_or_path", "")
    beside = task.files_beside if task is not None else own_sentence_files
    for file, content in (beside(source) if source else {}).items():
        (staged / file).parent.mkdir(parents=True, exist_ok=True)
        (staged / file).write_bytes(content)
    write_card(staged, model, directory)
