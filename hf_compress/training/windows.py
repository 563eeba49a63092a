"""The micro-batches of one update, as teacher and student read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_compress.training.signals import Batch, Signals


@dataclass(frozen=True)
class MicroBatch:
    """One batch in two views.

    Args:
        student: What the student reads, with the labels.
        teacher: What the teacher reads, which another tokenizer may have made, with the labels.
    """

    student: Batch
    teacher: Batch


@dataclass
class Window:
    """The micro-batches of one update of the student.

    Args:
        update: Finished updates of the student.
        batches: The micro-batches; the last window of an epoch may hold fewer.
        accumulation: How many an ordinary window holds.
        updates_per_epoch: Updates of the student in an epoch.
        weights: For each micro-batch, what its mean losses are multiplied by: where the tokens of a window count
            alike, its share of them; otherwise 1.
        answers: What a teacher that learned from these batches answered on the way, one for each; empty when the
            teacher is still to be asked.
    """

    update: int
    batches: Sequence[MicroBatch]
    accumulation: int
    updates_per_epoch: int
    weights: Sequence[Tensor | float]
    answers: list[Signals] = field(default_factory=list)
