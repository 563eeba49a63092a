"""Where a student comes from: a model of its own, some layers of a deeper one, or a new BiLSTM."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.api import compress
from hf_compress.core.positions import most_tokens
from hf_compress.methods.layer_selection import LayerSelectionConfig
from hf_compress.stages.models import ModelArguments, lengthen_, open_model, open_pair
from hf_compress.stages.processors import open_tokenizer
from hf_compress.students.bilstm import BiLSTMForSequenceClassification
from hf_compress.students.bilstm_config import BiLSTMConfig
from hf_compress.students.embedding_start import start_embeddings_
from hf_compress.tasks.pair_inputs import read_pairs_separately_
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.task import Processor, Task


logger = logging.getLogger(__name__)

BILSTM = "bilstm"
# Options of a new BiLSTM -> the settings of its config.
_BILSTM_SETTINGS = {
    "bilstm_hidden_size": "hidden_size",
    "bilstm_embedding_size": "embedding_size",
    "bilstm_layers": "num_layers",
    "bilstm_dropout": "dropout",
    "bilstm_mask_padding": "mask_padding",
    "pair_mode": "pair_mode",
}


@contextmanager
def named_as_options(more: str = "") -> Iterator[None]:
    """Errors of the method call its field by the name of the option.

    Args:
        more: What else a person should know, appended to the message.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("num_layers", "student_layers") + more) from error


@dataclass
class ShallowStudentArguments(ModelArguments):
    """Which model is the student.

    Args:
        model_name_or_path: Hub name or folder of the student, or of the deeper model whose layers it gets. Left out:
            the teacher is that deeper model.
        student_layers: How many layers the student gets of the deeper model, with its embeddings and head. Left out:
            the model as it is.
        layers: Which layers these are. even: the first, the last and evenly spread ones between; first: the lowest
            ones; last: the highest ones; or their indices, counted from 0.
    """

    model_name_or_path: str | None = None  # type: ignore[assignment]  # `beside` completes it
    student_layers: int | None = None
    layers: Literal["even", "first", "last"] | list[int] = "even"

    def __post_init__(self) -> None:
        if self.student_layers is None and self.layers == "even":
            if not self.model_name_or_path:
                raise ValueError(
                    "model_name_or_path must name the student, or student_layers say how many of the teacher's layers "
                    "it gets: both are missing."
                )
            return
        self._selection()

    def _selection(self) -> LayerSelectionConfig | None:
        if self.student_layers is None and self.layers == "even":
            return None
        with named_as_options():
            return LayerSelectionConfig(num_layers=self.student_layers, layers=self.layers)

    def beside(self, teacher: str) -> ModelArguments:
        """These arguments with a model that is named: the teacher where none is."""
        return dataclasses.replace(self, model_name_or_path=self.model_name_or_path or teacher)

    def open(self, task: Task | None = None, fresh_head: bool = False) -> tuple[Processor, PreTrainedModel]:
        """As `ModelArguments.open`; without the layers that are not chosen."""
        selection = self._selection()
        processor, model = open_pair(self, task, fresh_head)
        if selection is not None:
            with named_as_options(f" {self.model_name_or_path!r} is the deeper model."):
                compress(model, selection)
        return processor, model


@dataclass
class StudentArguments(ShallowStudentArguments):
    """Which model is the student.

    Args:
        model_name_or_path: Hub name or folder of the student, or of the deeper model whose layers it gets; or the word
            bilstm for a new BiLSTM that reads the teacher's tokens. Left out: the teacher is the deeper model.
        bilstm_hidden_size: Width of one direction of a new BiLSTM.
        bilstm_embedding_size: Width of its embeddings.
        bilstm_layers: Its number of layers.
        bilstm_dropout: Probability that an entry of its embeddings is dropped in training.
        bilstm_mask_padding: Whether it ignores padding. False is the published arithmetic, whose answers depend on the
            other texts of a batch.
        bilstm_embeddings: How its word embeddings begin. random: as published; teacher: as the teacher's, on the
            directions in which its words differ most.
        pair_mode: How a new BiLSTM reads pairs of texts. joint: as one text; separate: each by itself, as published.
            The teacher always reads both as one.
    """

    bilstm_hidden_size: int = 300
    bilstm_embedding_size: int = 300
    bilstm_layers: int = 1
    bilstm_dropout: float = 0.4
    bilstm_mask_padding: bool = True
    bilstm_embeddings: Literal["random", "teacher"] = "random"
    pair_mode: Literal["joint", "separate"] = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_bilstm:
            for name in ("student_layers", "max_positions"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} must be left out for a new BiLSTM, which has no layers to take and reads inputs of "
                        f"any length, got {getattr(self, name)}."
                    )
            if self.layers != "even":
                raise ValueError(f"layers must be left out for a new BiLSTM, got {self.layers}.")
            self._bilstm(vocab_size=2)
            return
        for field in dataclasses.fields(self):
            if field.name in (*_BILSTM_SETTINGS, "bilstm_embeddings") and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} must be left out unless model_name_or_path is {BILSTM}: a model that exists has "
                    f"its own, got {getattr(self, field.name)}."
                )

    @property
    def is_bilstm(self) -> bool:
        """Whether the student is a BiLSTM that does not exist yet."""
        return self.model_name_or_path == BILSTM

    def _bilstm(self, **more: Any) -> BiLSTMConfig:
        settings = {theirs: getattr(self, ours) for ours, theirs in _BILSTM_SETTINGS.items()}
        try:
            return BiLSTMConfig(**settings, **more)
        except ValueError as error:
            message = str(error)
            for ours, theirs in _BILSTM_SETTINGS.items():
                if message.startswith(f"{theirs} "):
                    message = ours + message.removeprefix(theirs)
            raise ValueError(message) from error

    def beside(self, teacher: str) -> ModelArguments:
        """As the parent's; a new BiLSTM reads the teacher's tokens unless told otherwise."""
        found = super().beside(teacher)
        if self.is_bilstm:
            found = dataclasses.replace(found, tokenizer_name=self.tokenizer_name or teacher)
        return found

    def describing(self) -> str:
        """As `ModelArguments.describing`; a BiLSTM's task is that of the model whose tokens it reads."""
        return self.tokenizer_name or "" if self.is_bilstm else super().describing()

    def head_config(self, task: Task) -> PretrainedConfig | None:
        """As `ModelArguments.head_config`: a new BiLSTM has a new head."""
        return None if self.is_bilstm else super().head_config(task)

    def open(self, task: Task | None = None, fresh_head: bool = False) -> tuple[Processor, PreTrainedModel]:
        """As `ModelArguments.open`; makes a new BiLSTM."""
        if not self.is_bilstm:
            return super().open(task, fresh_head)
        if not isinstance(task, SequenceClassification):
            kind = "nothing" if task is None else task.kind
            raise ValueError(f"A BiLSTM learns {SequenceClassification.summary}, the data hold {kind}.")
        tokenizer = open_tokenizer(self.tokenizer_name or "")
        if tokenizer.pad_token_id is None:
            raise ValueError(f"The tokenizer at {self.tokenizer_name!r} must have a padding token for a BiLSTM.")
        if self.pair_mode == "separate":
            if len(task.text_columns) < 2:
                raise ValueError(
                    f"pair_mode must be joint for single texts, got separate and the column {task.text_columns[0]!r}: "
                    "name the second text of a pair by --text_pair_column, or leave pair_mode out."
                )
            read_pairs_separately_(tokenizer)
        config = self._bilstm(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **task.head_settings())
        model = BiLSTMForSequenceClassification(config)
        if self.bilstm_embeddings == "teacher":
            start_embeddings_(model, open_model(self.tokenizer_name or "", task, fresh_head=True))
        return tokenizer, model


def long_enough_(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Continue the positions of a teacher that will learn, where its student has more."""
    longest, limit = most_tokens(student), most_tokens(teacher)
    if longest is not None and limit is not None and limit < longest:
        # It is fine-tuned here, so it learns the positions that it was not pretrained for.
        logger.info("The teacher's %d positions are continued periodically up to %d.", limit, longest)
        lengthen_(teacher, longest)
