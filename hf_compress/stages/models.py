"""Opening and saving the models that stages pass to each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_compress.api import apply_implied, check_finite, steps_of
from hf_compress.core.positions import extend_positions_, most_tokens, position_offset
from hf_compress.core.saving import complete_or_absent, write_json
from hf_compress.tasks.sources import Task


logger = logging.getLogger(__name__)

# Without any of these, transformers builds a tokenizer of the model's type with an empty vocabulary.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass
class ModelArguments:
    """Which model a stage starts from.

    Args:
        model_name_or_path: Hub name or folder of the model to start from.
        tokenizer_name: Hub name or folder of the tokenizer. Left out: the model's own.
        max_positions: Tokens an input may have, when the model was pretrained for fewer: its position embeddings are
            continued periodically and learn in the training.
        freeze_embeddings: Do not train word and position embeddings; halves a small model's step on a CPU.
    """

    model_name_or_path: str
    tokenizer_name: str | None = None
    max_positions: int | None = None
    freeze_embeddings: bool = False


def has_tokenizer(name: str) -> bool:
    """Whether a folder holds a tokenizer; of hub names it is taken for granted."""
    return not Path(name).is_dir() or any((Path(name) / file).exists() for file in _TOKENIZER_FILES)


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a hub name or folder; `ValueError` when there is none."""
    if not has_tokenizer(name):
        raise ValueError(f"No tokenizer can be opened at {name!r}: it must hold one of {', '.join(_TOKENIZER_FILES)}.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"No tokenizer can be opened at {name!r}: {_first_line(error)}") from error


def _classifies(config: PretrainedConfig) -> bool:
    return any("ForSequenceClassification" in kind for kind in config.architectures or [])


def has_head(name: str) -> bool:
    """Whether a hub name or folder holds a classifier, and not an encoder alone."""
    return _classifies(AutoConfig.from_pretrained(name))


def open_classifier(name: str, task: Task | None = None) -> PreTrainedModel:
    """A sequence classifier or regressor for a task, compressed or not, or as its config asks for by hand.

    Args:
        name: Hub name or folder.
        task: Gives a new head its size and label names, and must agree with an existing head.

    Raises:
        ValueError: If nothing can be opened there, the head has other labels, or weights are not finite.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        headed = _classifies(config)
        overrides: dict[str, Any] = {}
        if task is not None and headed and config.num_labels != task.num_labels:
            raise ValueError(f"its head has {config.num_labels} labels, the task {task.name!r} has {task.num_labels}.")
        if task is not None and not headed:
            overrides["num_labels"] = task.num_labels
            overrides["problem_type"] = "regression" if task.is_regression else "single_label_classification"
            if not task.is_regression:
                overrides["id2label"] = dict(enumerate(task.label_names))
                overrides["label2id"] = {label: i for i, label in enumerate(task.label_names)}
        model = AutoModelForSequenceClassification.from_pretrained(name, **overrides)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"No classifier can be opened at {name!r}: {_first_line(error)}") from error
    check_finite(model)
    return apply_implied(model)


def open_pair(model_args: ModelArguments, task: Task | None = None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and classifier that a stage starts from.

    Raises:
        ValueError: If they cannot be opened, do not belong together, or the model takes more tokens already.
    """
    model = open_classifier(model_args.model_name_or_path, task)
    tokenizer = open_tokenizer(model_args.tokenizer_name or model_args.model_name_or_path)
    check_vocabulary(model.config, tokenizer)
    if model_args.max_positions is not None:
        lengthen_(model, model_args.max_positions)
        tokenizer.model_max_length = model_args.max_positions
    return tokenizer, model


def lengthen_(model: PreTrainedModel, tokens: int) -> None:
    """Continue the position embeddings periodically, in place.

    Raises:
        ValueError: If the model has no table of positions, a shorter one is asked for, or what acts on attention was
            made for the old length.
    """
    limit = most_tokens(model)
    if limit is None or tokens < limit:
        raise ValueError(
            f"max_positions must be at least the model's {limit} tokens, got {tokens}."
            if limit is not None
            else f"max_positions must be unset for {model.config.model_type}: it has no table of positions."
        )
    if "linformer" in [step["method"] for step in steps_of(model)] and tokens > limit:
        raise ValueError(f"max_positions must be unset for linear attention made for {limit} tokens, got {tokens}.")
    if tokens > limit:
        extend_positions_(model, tokens + position_offset(model))


def freeze_embeddings_(model: PreTrainedModel) -> None:
    """Exclude the embedding tables (not their LayerNorm) from training."""
    embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
    for name, parameter in embeddings.named_parameters():
        if "norm" not in name.lower():
            parameter.requires_grad_(False)


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` when a tokenizer can produce ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer must have at most the model's {config.vocab_size} tokens, got {len(tokenizer)}: "
            "it belongs to another model."
        )


def save_stage(
    directory: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, results: Mapping[str, Any]
) -> None:
    """Save model, tokenizer and `results.json` so that the directory is complete or does not load.

    Raises:
        ValueError: If the disk is full or the place cannot be written.
    """
    try:
        with complete_or_absent(directory) as staged:
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            write_json(staged / "results.json", results)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"output_dir {str(directory)!r} cannot be written: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
