"""Opening the models that stages pass to each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.api import apply_implied, check_finite, steps_of
from hf_compress.core.dropout import set_dropout_
from hf_compress.core.errors import first_line
from hf_compress.core.loaded import require_complete
from hf_compress.core.positions import extend_positions_, most_tokens, position_offset
from hf_compress.stages.processors import check_vocabulary, no_folder, open_processor
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.kinds import UndecidedKind, kind_of_model
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.sources import load_task
from hf_compress.tasks.task import Processor, Task


logger = logging.getLogger(__name__)

_UNTRAINED = "It has no head for the task: fine-tune it first (hf-compress finetune)."


@dataclass
class ModelArguments:
    """Which model a stage starts from.

    Args:
        model_name_or_path: Hub name or folder of the model to start from.
        tokenizer_name: Hub name or folder of the tokenizer. Left out: the model's own.
        max_positions: Tokens an input may have, when the model was pretrained for fewer: its position embeddings are
            continued periodically and learn in the training.
        freeze_embeddings: Do not train word and position embeddings; halves a small model's step on a CPU.
        dropout: Probability of every dropout in training, in [0, 1). Left out: the model's own. With 0, a step
            on 512 tokens takes less than half of the time on a CPU.
    """

    model_name_or_path: str
    tokenizer_name: str | None = None
    max_positions: int | None = None
    freeze_embeddings: bool = False
    dropout: float | None = None

    def describing(self) -> str:
        """Hub name or folder of the model that decides what the data are read for."""
        return self.model_name_or_path

    def beside(self, teacher: str) -> ModelArguments:
        """These arguments where a teacher is named; some students are made of it."""
        return self

    def head_config(self, task: Task) -> PretrainedConfig | None:
        """The config of the model if it has a head for a task already."""
        return head_config(self.model_name_or_path, task)

    def open(self, task: Task | None = None, fresh_head: bool = False) -> tuple[Processor, PreTrainedModel]:
        """Tokenizer (or image processor) and model that the stage starts from; as `open_pair`."""
        return open_pair(self, task, fresh_head)

    def prepare_(self, model: PreTrainedModel) -> None:
        """Set a model up for training as asked for; `ValueError` if `dropout` is no probability."""
        if self.freeze_embeddings:
            freeze_embeddings_(model)
        if self.dropout is not None:
            set_dropout_(model, self.dropout)


def open_config(name: str) -> PretrainedConfig:
    """The config of a hub name or folder; `ValueError` or `OSError` where there is none, or a broken one."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        raise
    except Exception as error:
        # transformers reports a broken file as whatever it breaks first.
        raise ValueError(f"config.json at {name!r} is broken: {first_line(error)}") from error
    return config


def kind_for(config: PretrainedConfig, task: Task | None) -> type[Task]:
    """The kind of a task; without a task, what the model has a head for."""
    return type(task) if task is not None else kind_of_model(config) or SequenceClassification


def head_config(name: str, task: Task | None = None) -> PretrainedConfig | None:
    """The config of a model that has a head for a task; None where there is none, or nothing can be opened."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
    return config if kind_for(config, task).has_head(config) else None


def task_for(name: str, data: DataArguments) -> Task:
    """The task that data hold for a model: where columns fit several kinds, what the model was made for decides.

    Raises:
        ValueError: If the data cannot be read or do not fit any kind, or there is no model that would decide.
    """
    try:
        config = open_config(name)
    except (OSError, ValueError):
        try:
            # Opening the model later reports what is wrong with it.
            return load_task(data)
        except UndecidedKind:
            with _opening(name, "model"):
                open_config(name)
            raise
    return load_task(data, config)


def has_head(name: str, task: Task | None = None) -> bool:
    """Whether a hub name or folder holds a model with a head for a task; `ValueError` where it holds none."""
    with _opening(name, "model"):
        config = open_config(name)
    return kind_for(config, task).has_head(config)


@contextmanager
def _opening(name: str, noun: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"No {noun} can be opened at {name!r}: {no_folder(name)}{first_line(error)}") from error


def open_model(name: str, task: Task | None = None, fresh_head: bool = False, match: bool = True) -> PreTrainedModel:
    """A model for a task, compressed or not, or as its config asks for by hand.

    Args:
        name: Hub name or folder.
        task: Its labels must be the model's, in whatever order; a new head takes its size and label names. None: any
            model; without a head of its own it is opened as a classifier.
        fresh_head: Whether an encoder gets a new head. Only for who trains it.
        match: Whether labels of the task that are none of the model's are an error.

    Raises:
        ValueError: If nothing can be opened there, weights are missing or not finite, or the labels differ.
    """
    with _opening(name, type(task).model_noun if task is not None else SequenceClassification.model_noun):
        config = open_config(name)
    kind = kind_for(config, task)
    new = fresh_head and not kind.has_head(config)
    settings: dict[str, Any] = {}
    if task is not None and new:
        settings = task.head_settings()
        logger.info("%s gets a new head for %s.", name, task.describe_head())
    model: PreTrainedModel
    with _opening(name, kind.model_noun):
        if not new and kind.unfit(config):
            raise ValueError(kind.unfit(config))
        model, loaded = kind.model_class.from_pretrained(name, output_loading_info=True, **settings)
        inside = f"{model.base_model_prefix}."
        # Checkpoints of masked language models have no pooler; it belongs to the head.
        untrained = kind.heads and not kind.has_head(config)
        require_complete(loaded, _may_be_new(inside, kind, new), _UNTRAINED if untrained else "")
    check_finite(model)
    apply_implied(model)
    if task is not None and match:
        fit_labels(task, model, name)
    return model


def _may_be_new(inside: str, kind: type[Task], new_head: bool) -> Callable[[str], bool] | None:
    """Which weights files may lack: a new head and the pooler, which belongs to it; None: none."""
    if not kind.heads:
        # A sentence's vector does not come from the pooler, which checkpoints of masked language models lack.
        return lambda key: key.startswith("pooler.")
    if not new_head:
        return None
    return lambda key: not key.startswith(inside) or key.startswith(f"{inside}pooler.")


def open_pretrained(model_args: ModelArguments) -> tuple[Processor, PreTrainedModel]:
    """Tokenizer (or image processor) and a model without a head for any task, as its files hold it.

    Raises:
        ValueError: If they cannot be opened, or do not belong together.
    """
    name = model_args.model_name_or_path
    with _opening(name, "model"):
        config = open_config(name)
        kind: Any = getattr(transformers, (config.architectures or [""])[0], AutoModel)
        model, loaded = kind.from_pretrained(name, output_loading_info=True)
        require_complete(loaded, lambda key: key.startswith("pooler."))
    check_finite(model)
    processor = open_processor(model_args.tokenizer_name or name, kind_for(config, None))
    check_vocabulary(config, processor)
    return processor, apply_implied(model)


def fit_labels(task: Task, model: PreTrainedModel, name: str) -> Task:
    """A task with the label ids of a model, matched by name; `ValueError` names the model when they do not fit."""
    try:
        return task.matched(model.config)
    except ValueError as error:
        raise ValueError(f"{name!r} does not fit the data: {error}") from error


def open_pair(
    model_args: ModelArguments, task: Task | None = None, fresh_head: bool = False
) -> tuple[Processor, PreTrainedModel]:
    """Tokenizer (or image processor) and model that a stage starts from.

    Args:
        model_args: Where they are.
        task: Sizes and names a new head. An existing head has an order of its own: see `fit_labels`.
        fresh_head: Whether an encoder gets a new head.

    Raises:
        ValueError: If they cannot be opened, do not belong together, or the model takes more tokens already.
    """
    model = open_model(model_args.model_name_or_path, task, fresh_head, match=False)
    processor = open_processor(
        model_args.tokenizer_name or model_args.model_name_or_path, kind_for(model.config, task)
    )
    check_vocabulary(model.config, processor)
    if model_args.max_positions is not None:
        lengthen_(model, model_args.max_positions)
        if isinstance(processor, PreTrainedTokenizerBase):
            processor.model_max_length = model_args.max_positions
    return processor, model


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
