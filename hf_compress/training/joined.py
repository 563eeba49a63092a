"""A trainer of this package and another trainer in one class."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments

from hf_compress.training.joined_arguments import join_arguments
from hf_compress.training.trainer import CompressionTrainer


def join_trainers(
    ours: type[CompressionTrainer], theirs: type[Trainer], arguments: type[TrainingArguments] = TrainingArguments
) -> type[Any]:
    """Make the class of a trainer that does what another one does, with the loss, teachers and folders of ours.

    Their loss becomes the term `task` of the sum; their data preparation, generation and metrics stay.

    Args:
        ours: `DistillationTrainer`, `JointTeacherTrainer`, `CompressionTrainer`, ...
        theirs: `Seq2SeqTrainer`, a class of your own, `trl.SFTTrainer`, ... Its constructor must take `model` and
            `args` by name, and pass the others on.
        arguments: Of `theirs`, such as `Seq2SeqTrainingArguments`.

    Returns:
        A class whose `arguments_class` has the fields and defaults of both; `teacher_model` is given by name.

    Raises:
        ValueError: If one of the two is none of these trainers, or their arguments have a name in common.

    Example:
        >>> from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
        >>> from hf_compress.training.distillation import DistillationTrainer
        >>> both = join_trainers(DistillationTrainer, Seq2SeqTrainer, Seq2SeqTrainingArguments)
        >>> both.__name__
        'DistillationSeq2SeqTrainer'
        >>> args = both.arguments_class("out", temperature=3.0, predict_with_generate=True, use_cpu=True)
    """
    if not issubclass(ours, CompressionTrainer):
        raise ValueError(f"ours must be a trainer of hf_compress, such as DistillationTrainer, got {ours.__name__}.")
    if not issubclass(theirs, Trainer) or issubclass(theirs, CompressionTrainer):
        raise ValueError(f"theirs must be a Trainer outside of hf_compress, got {theirs.__name__}.")
    base = getattr(ours, "arguments_class", TrainingArguments)
    name = f"{ours.__name__.removesuffix('Trainer')}{theirs.__name__}"
    return type(name, (ours, theirs), {
        "__doc__": f"A {theirs.__name__} with the loss of {ours.__name__}.", "__module__": theirs.__module__,
        "arguments_class": join_arguments(base, arguments),
    })  # fmt: skip
