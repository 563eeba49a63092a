"""The distances between a student and its teacher that the terms of a loss weigh."""

from __future__ import annotations

from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_compress.core.batches import layer_mask
from hf_compress.core.forward_state import state_in
from hf_compress.core.pooling import Pooling
from hf_compress.training.collator import split_inputs
from hf_compress.training.layer_term import LayerTerm
from hf_compress.training.output_terms import output_term
from hf_compress.training.sentence_vectors import sentence_vectors, similarity_distance, vector_distance
from hf_compress.training.signals import Batch, Signals, logits_of
from hf_compress.training.teacher_session import TeacherSession


def output_distance(
    session: TeacherSession, targets: Signals, outputs: ModelOutput, batch: Batch, temperature: float
) -> Tensor:
    """Compute the distance between the outputs of a teacher and a student on a batch.

    Args:
        session: Knows the student.
        targets: The teacher's signals, with logits.
        outputs: The student's outputs.
        batch: As the collator made it.
        temperature: T > 0.

    Raises:
        ValueError: If the answers differ in shape.
    """
    if session.pooling is not None:
        return vector_distance(*_both_vectors(session.pooling, targets, outputs, batch))
    return output_term(targets.logits, logits_of(outputs), session.student, split_inputs(batch)[0], temperature)


def similarity_terms(
    session: TeacherSession, targets: Signals, outputs: ModelOutput, batch: Batch, weight: float
) -> dict[str, Tensor]:
    """Compute the distance between the cosines that teacher and student give to the pairs of sentences of a batch.

    Args:
        session: Of a sentence encoder.
        targets: The teacher's signals, with vectors.
        outputs: The student's outputs.
        batch: As the collator made it.
        weight: Of the term.

    Returns:
        `{"similarity": term}`; empty where it has no weight.
    """
    if session.pooling is None or not weight:
        return {}
    return {"similarity": weight * similarity_distance(*_both_vectors(session.pooling, targets, outputs, batch))}


def _both_vectors(pooling: Pooling, targets: Signals, outputs: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    (theirs,) = targets.logits
    return theirs, sentence_vectors(outputs, pooling, split_inputs(batch)[0])


def states_distance(
    session: TeacherSession, term: LayerTerm, targets: Signals, outputs: ModelOutput, batch: Batch
) -> Tensor:
    """Compute the distance between the hidden states of a teacher and a student on a batch.

    Args:
        session: Knows the student.
        term: Says which hidden states are compared, and how.
        targets: The teacher's signals.
        outputs: The student's outputs, with hidden states.
        batch: As the collator made it, with the state of the student's forward pass.

    Raises:
        ValueError: If the answers differ in shape.
    """
    inputs, state = split_inputs(batch)[0], state_in(batch)
    kept_after = None if state is None else state.kept_after
    real = layer_mask(session.student, inputs) if "attention_mask" in inputs else None
    return term(targets.hidden, outputs["hidden_states"], real, kept_after)
