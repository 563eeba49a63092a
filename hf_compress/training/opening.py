"""What a teacher needs that the student's side gives as a name or leaves out: its model, its decoder's inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedModel

from hf_compress.core.errors import BROKEN_FILE, one_line
from hf_compress.core.loaded import require_complete


# Endings of class names that say the head in other words than the Auto classes.
_HEADS = {"LMHeadModel": "ForCausalLM", "ForConditionalGeneration": "ForSeq2SeqLM"}


def auto_class_of(model: PreTrainedModel) -> Any:
    """The Auto class whose models have the same kind of head.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
        >>> auto_class_of(BertForTokenClassification(BertConfig(vocab_size=9, **sizes))).__name__
        'AutoModelForTokenClassification'
    """
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


def open_teacher(name: str | os.PathLike, student: PreTrainedModel) -> PreTrainedModel:
    """The model of a folder or hub name, with the student's kind of head.

    Raises:
        ValueError: If it cannot be opened, or its files lack weights of that head.
    """
    with one_line(f"teacher_model {str(name)!r} cannot be opened", *BROKEN_FILE):
        model, info = auto_class_of(student).from_pretrained(name, output_loading_info=True)
        require_complete(info)
    return model


def with_decoder_inputs(teacher: PreTrainedModel, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch with the `decoder_input_ids` that an encoder-decoder makes from its labels.

    A teacher is not shown labels, so it cannot make them by itself.

    Raises:
        ValueError: If the batch has no labels, or the class cannot make them.
    """
    if not getattr(teacher.config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
        return batch
    make = getattr(teacher, "prepare_decoder_input_ids_from_labels", None)
    if make is None or batch.get("labels") is None:
        raise ValueError(
            f"A batch for the teacher, a {type(teacher).__name__}, must hold decoder_input_ids: use "
            "DataCollatorForSeq2Seq(tokenizer, model=student)."
        )
    return {**batch, "decoder_input_ids": make(labels=batch["labels"])}
