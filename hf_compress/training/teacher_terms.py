"""The terms of a loss that compare a student with its teacher."""

from __future__ import annotations

from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_compress.core.batches import layer_mask
from hf_compress.core.forward_state import state_in
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.collator import split_inputs
from hf_compress.training.output_terms import output_term
from hf_compress.training.signals import Batch, Signals, logits_of
from hf_compress.training.teacher_session import TeacherSession


def teacher_terms(
    session: TeacherSession, targets: Signals, outputs: ModelOutput, batch: Batch, args: DistillationArguments
) -> dict[str, Tensor]:
    """Compute the weighted distances between the signals of a teacher and a student on a batch.

    Args:
        session: Its layer term says which hidden states are compared, and how.
        targets: The teacher's signals.
        outputs: The student's outputs, with hidden states where the session compares them.
        batch: As the collator made it, with the state of the student's forward pass.
        args: Weights and temperature.

    Raises:
        ValueError: If the answers differ in shape.
    """
    inputs, terms = split_inputs(batch)[0], {}
    if args.alpha_output:
        distance = output_term(targets.logits, logits_of(outputs), session.student, inputs, args.temperature)
        terms["output"] = args.alpha_output * distance
    if session.layer_term is not None:
        state = state_in(batch)
        kept_after = None if state is None else state.kept_after
        real = layer_mask(session.student, inputs) if "attention_mask" in inputs else None
        terms["layer"] = args.alpha_layer * session.layer_term(
            targets.hidden, outputs["hidden_states"], real, kept_after
        )
    return terms
