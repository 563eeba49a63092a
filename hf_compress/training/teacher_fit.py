"""Whether a teacher fits its student: labels, weights, layers, and the inputs that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.core.batches import forward_names
from hf_compress.core.forward_state import FORWARD_STATE
from hf_compress.core.labels import places_by_name, says_nothing
from hf_compress.core.positions import most_tokens
from hf_compress.training.collator import TEACHER_PREFIX, split_inputs
from hf_compress.training.output_terms import predicts_next_token
from hf_compress.training.sentence_vectors import has_no_head
from hf_compress.training.signals import Batch
from hf_compress.training.windows import MicroBatch


# Vocabularies are padded to multiples of 8 to 256.
_MOST_PADDING = 256


def teacher_label_order(student: PretrainedConfig, teacher: PretrainedConfig) -> list[int] | None:
    """Find for each of the student's labels its index among the teacher's; None when both number them alike.

    Labels are the same when their names are; names that only count them (LABEL_0, LABEL_1, ... or 0, 1, ...) fit all.

    Raises:
        ValueError: If outputs mean different things.
    """
    if student.num_labels != teacher.num_labels:
        raise ValueError(f"The teacher must have the student's {student.num_labels} labels, got {teacher.num_labels}.")
    ours, theirs = (_label_names(config) for config in (student, teacher))
    plain = [str(i) for i in range(len(ours))]
    if says_nothing(ours) or says_nothing(theirs) or plain in (ours, theirs):
        return None
    found = [index for index in places_by_name(ours, theirs) if index is not None]
    if sorted(found) != list(range(len(ours))):
        raise ValueError(f"The teacher must have the student's labels {ours}, got {theirs}.")
    return None if found == list(range(len(ours))) else found


def _label_names(config: PretrainedConfig) -> list[str]:
    names: Mapping[Any, str] = config.id2label or {}
    return [str(names[index]) for index in sorted(names)]


def require_own_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that is the student or shares weights with it: freezing it would freeze the student.

    Raises:
        ValueError: Says what they share.
    """
    if teacher is student:
        raise ValueError(
            "teacher_model must be another object than model (compress changes a model in place and returns it). "
            "Open the teacher a second time, or copy.deepcopy it before compress."
        )
    theirs = {id(parameter) for parameter in teacher.parameters()}
    common = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if common:
        raise ValueError(
            f"teacher_model and model share {len(common)} parameters ({common[0]}, ...): freezing one would freeze "
            "the other. Open the teacher a second time, or copy.deepcopy it first."
        )


def require_one_stack_of_layers(*configs: PretrainedConfig) -> None:
    """Refuse to compare the layers of models that have two stacks of them.

    Raises:
        ValueError: If one is an encoder-decoder.
    """
    for config in configs:
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "alpha_layer compares the layers of an encoder or of a decoder, "
                f"but {config.model_type} has both. Set alpha_layer=0 and distil the outputs."
            )


def read_by_both(batch: Batch, student: PreTrainedModel, teacher: PreTrainedModel) -> MicroBatch:
    """Split a collator's batch into what the student reads and what the teacher reads.

    Args:
        batch: Entries `teacher_<name>` are the teacher's alone; without any, both read the same.
        student, teacher: The models.

    Raises:
        ValueError: If the teacher does not know the tokens or positions, or cannot make its decoder's inputs.
    """
    ours, theirs = split_inputs(batch)
    _check_inputs(student, teacher, theirs or ours, separate=bool(theirs))
    labels = {"labels": ours["labels"]} if "labels" in ours else {}
    return MicroBatch(ours, _with_decoder_inputs(teacher, {**theirs, **labels} if theirs else ours))


def student_inputs(batch: Batch, student: PreTrainedModel, label_names: Sequence[str]) -> dict[str, Any]:
    """The entries of a collator's batch that the student and its loss read; without a head, none of them are labels.

    Args:
        batch: As the collator made it.
        student: Without wrappers: an adapter's forward hides the arguments of the model it wraps behind **kwargs.
        label_names: Of the trainer.
    """
    named = {*forward_names(student), FORWARD_STATE, *label_names}
    if not has_no_head(student):
        named.add("labels")
    return {name: value for name, value in split_inputs(batch)[0].items() if name in named}


def columns_of_both(student: list[str], rows: Any, teacher: PreTrainedModel | None) -> list[str]:
    """List the columns of a data set that a student or its teacher reads.

    The teacher reads the columns `teacher_<name>` and those that only its forward names (token types of a BERT
    that teaches a DistilBERT).

    Args:
        student: The columns that the student reads.
        rows: The data set.
        teacher: None when there is no teacher.
    """
    columns = getattr(rows, "column_names", None) or []
    own = [name for name in columns if name.startswith(TEACHER_PREFIX)]
    return list(dict.fromkeys([*student, *own, *([] if teacher is None else forward_names(teacher))]))


def _check_inputs(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Batch, separate: bool) -> None:
    limit, ids = most_tokens(teacher), inputs.get("input_ids")
    if limit is not None and ids is not None and ids.shape[-1] > limit:
        raise ValueError(
            f"The teacher must read inputs of {ids.shape[-1]} tokens, got one that reads {limit}. Shorten the inputs "
            "(max_length), or fine-tune the teacher for longer ones (hf-compress finetune --max_positions)."
        )
    ours, theirs = (getattr(model.config, "vocab_size", None) for model in (student, teacher))
    if not separate and ours != theirs and not _differ_by_padding(student, teacher):
        raise ValueError(
            f"The teacher must read the student's vocabulary ({ours} tokens), got {theirs}. "
            "Give it its own columns teacher_input_ids, teacher_attention_mask (TeacherStudentCollator)."
        )


def _differ_by_padding(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether two language models seem to have one vocabulary, which one of them has padded to a round number.

    Their sizes alone do not tell: the vocabulary of OPT looks like that of GPT-2, padded.
    """
    if not (predicts_next_token(student) and predicts_next_token(teacher)):
        return False
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    fewer, more = sorted((ours.vocab_size, theirs.vocab_size))
    marks = [(getattr(ours, name, None), getattr(theirs, name, None)) for name in ("bos_token_id", "eos_token_id")]
    return more % 8 == 0 and more - fewer < _MOST_PADDING and all(one == other for one, other in marks)


def _with_decoder_inputs(teacher: PreTrainedModel, batch: Mapping[str, Any]) -> Batch:
    """Add the `decoder_input_ids` that an encoder-decoder makes from the labels, since it gets no labels."""
    if not getattr(teacher.config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
        return batch
    make = getattr(teacher, "prepare_decoder_input_ids_from_labels", None)
    if make is None or batch.get("labels") is None:
        raise ValueError(
            f"A batch for the teacher, a {type(teacher).__name__}, must hold decoder_input_ids: use "
            "DataCollatorForSeq2Seq(tokenizer, model=student)."
        )
    return {**batch, "decoder_input_ids": make(labels=batch["labels"])}
