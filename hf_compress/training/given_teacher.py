"""The teacher that a trainer was given, a model or a name: it is opened when a student begins to learn from it."""

from __future__ import annotations

import copy
import os
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.errors import BROKEN_FILE, one_line
from hf_compress.core.loaded import require_complete
from hf_compress.training.sentence_vectors import has_no_head


# Endings of class names whose head has another name among the Auto classes.
_HEADS = {"LMHeadModel": "ForCausalLM", "ForConditionalGeneration": "ForSeq2SeqLM"}


class TeacherSource(Protocol):
    """Opens the teacher of a trainer."""

    def open(self, student: PreTrainedModel) -> PreTrainedModel:
        """Open the teacher as it was given, for a student that begins anew.

        Raises:
            ValueError: If there is none, or it cannot be opened.
        """

    def origins(self) -> dict[str, str]:
        """Part of the teacher, as messages name it -> the folder or Hub name that it was read from."""


class GivenTeacher:
    """A teacher given as a model, a folder or a Hub name.

    Args:
        model: What the trainer was given; None where it needs no teacher.
        changes: Whether trainings change the model; each further student then gets it in its first state.
    """

    def __init__(self, model: PreTrainedModel | str | os.PathLike[str] | None, changes: bool = False) -> None:
        self._given = model
        self._changes = changes
        self._beginning: dict[str, Tensor] | None = None

    def open(self, student: PreTrainedModel) -> PreTrainedModel:
        if self._given is None:
            raise ValueError(
                "teacher_model must be given when alpha_output, alpha_layer or alpha_similarity is above 0, got None."
            )
        if isinstance(self._given, str | os.PathLike):
            self._given = open_teacher(self._given, student)
        if self._changes and self._beginning is None:
            self._beginning = copy.deepcopy(self._given.state_dict())
        elif self._beginning is not None:
            self._given.load_state_dict(self._beginning)
        return self._given

    def origins(self) -> dict[str, str]:
        named = isinstance(self._given, str | os.PathLike)
        return {"the teacher": str(self._given if named else getattr(self._given, "name_or_path", ""))}


def auto_class_of(model: PreTrainedModel) -> Any:
    """Find the Auto class whose models have the same kind of head.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
        >>> auto_class_of(BertForTokenClassification(BertConfig(vocab_size=9, **sizes))).__name__
        'AutoModelForTokenClassification'
    """
    if has_no_head(model) and type(model.config) in transformers.MODEL_MAPPING:
        return transformers.AutoModel
    for kind in type(model).__mro__:
        for ending, head in _HEADS.items():
            if kind.__name__.endswith(ending):
                return getattr(transformers, f"AutoModel{head}")
        _, found, task = kind.__name__.partition("For")
        if found and hasattr(transformers, f"AutoModelFor{task}"):
            return getattr(transformers, f"AutoModelFor{task}")
    raise ValueError(
        f"teacher_model must be a model object for a student of class {type(model).__name__}: no Auto class has its "
        "kind of head."
    )


def move_(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device. (mypy rejects `PreTrainedModel.to(device)`.)"""
    to: Any = model.to
    to(device)
    return model


def open_teacher(name: str | os.PathLike[str], student: PreTrainedModel) -> PreTrainedModel:
    """Open a folder or Hub name as a model with the student's kind of head.

    Raises:
        ValueError: If it cannot be opened, or its files lack weights of that head.
    """
    with one_line(f"teacher_model {str(name)!r} cannot be opened", *BROKEN_FILE):
        model, info = auto_class_of(student).from_pretrained(name, output_loading_info=True)
        require_complete(info)
    opened: PreTrainedModel = model
    return opened
