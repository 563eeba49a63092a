"""Opens a teacher session: the teacher is opened, checked against the student, and told which signals to return."""

from __future__ import annotations

import logging
from collections.abc import Callable

from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.api import apply_implied
from hf_compress.core.architectures import base_of
from hf_compress.core.pooling import Pooling
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.compat import arithmetic_of
from hf_compress.training.engines import refuse_learner_in_shards, wrapping_of
from hf_compress.training.given_teacher import TeacherSource, move_
from hf_compress.training.language_head import language_head
from hf_compress.training.layer_term import LayerTerm
from hf_compress.training.output_terms import predicts_next_token
from hf_compress.training.sentence_vectors import sentence_pooling
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teacher_fit import require_one_stack_of_layers, require_own_weights, teacher_label_order
from hf_compress.training.teacher_session import TeacherSession
from hf_compress.training.teachers import Learner, Teacher


logger = logging.getLogger(__name__)

# (opened model, wanted signals, for each of the student's labels its index among the teacher's) -> teacher
MakeTeacher = Callable[[PreTrainedModel, WantedSignals, "list[int] | None"], Teacher]


def open_session(
    source: TeacherSource,
    student: PreTrainedModel,
    args: DistillationArguments,
    make_teacher: MakeTeacher,
    accelerator: Accelerator,
) -> TeacherSession | None:
    """Open a teacher and fit it to a student.

    Args:
        source: Opens the teacher.
        student: Without wrappers.
        args: Select what is compared.
        make_teacher: Makes a teacher of the opened model.
        accelerator: Of the student.

    Returns:
        None when nothing is compared.

    Raises:
        ValueError: If there is no teacher, it cannot be opened, or does not fit the student.
    """
    if not args.uses_teacher:
        return None
    teacher = source.open(student)
    require_own_weights(student, teacher)
    apply_implied(teacher)
    vectors = _compared_vectors(student, teacher, args)
    compares_labels = args.alpha_output > 0 and vectors is None
    label_order = teacher_label_order(student.config, teacher.config) if compares_labels else None
    layer_term = _layer_term(student, teacher, args) if args.alpha_layer else None
    if layer_term is not None:
        # The maps are no part of the student, so they are wrapped too: processes must average their gradients.
        wrap = wrapping_of(accelerator)
        layer_term.prepare(lambda maps: wrap(maps.to(args.device)))
    move_(teacher, args.device)
    wanted = WantedSignals(
        layer_term.teacher_states if layer_term else (),
        logits=args.alpha_output > 0 or vectors is not None,
        # Only for a student whose answers are language, too; the labels of others may be in another order.
        head_inputs=args.alpha_output > 0 and predicts_next_token(student) and language_head(teacher) is not None,
        vectors=None if vectors is None else vectors[1],
    )
    made = make_teacher(teacher, wanted, label_order)
    if isinstance(made, Learner):
        refuse_learner_in_shards(accelerator)
    return TeacherSession(
        made,
        student,
        layer_term,
        args.max_distill_steps,
        accelerator.autocast,
        None if vectors is None else vectors[0],
    )


def _compared_vectors(
    student: PreTrainedModel, teacher: PreTrainedModel, args: DistillationArguments
) -> tuple[Pooling, Pooling] | None:
    """How student and teacher pool, where sentence vectors are compared.

    Raises:
        ValueError: If only one of them is a sentence encoder, or a task's student is told to compare sentences.
    """
    if not args.alpha_output and not args.alpha_similarity:
        return None
    ours = sentence_pooling(student)
    if ours is None:
        if args.alpha_similarity:
            raise ValueError(
                f"alpha_similarity must be 0 for {type(student).__name__}: it compares the vectors of sentences, "
                "which an encoder without a head gives (AutoModel)."
            )
        return None
    theirs = sentence_pooling(base_of(teacher))
    if theirs is None:
        raise ValueError(
            f"The teacher of a sentence encoder must be one, too (AutoModel), got {type(teacher).__name__}: its "
            "vectors are the targets. Or set alpha_output=0 and alpha_similarity=0, and distil hidden states "
            "(alpha_layer)."
        )
    widths = _width(student.config), _width(teacher.config)
    if args.alpha_output and widths[0] != widths[1]:
        raise ValueError(
            f"The teacher's sentence vectors must have {widths[0]} numbers, as the student's, got {widths[1]}. Set "
            "alpha_output=0 and alpha_similarity above 0, which compares cosines only."
        )
    if ours is not theirs:
        logger.warning(
            "The student makes sentence vectors by %s, its teacher by %s, as their folders say (mean where they say "
            "nothing).", ours.value, theirs.value,
        )  # fmt: skip
    return ours, theirs


def _layer_term(student: PreTrainedModel, teacher: PreTrainedModel, args: DistillationArguments) -> LayerTerm:
    ours, theirs = student.config, teacher.config
    require_one_stack_of_layers(ours, theirs)
    if getattr(ours, "pair_mode", None) == "separate":
        raise ValueError(
            "alpha_layer compares the states of the same tokens, but this student reads the texts of a pair one by "
            "one (pair_mode='separate'). Set alpha_layer=0 and distil the outputs, or make it with pair_mode='joint'."
        )
    if args.compat == "cald" and hasattr(ours, "states_width"):
        raise ValueError(
            f"compat='cald' compares the embeddings, too, which are no states of a {ours.model_type}: leave compat "
            "out, or set alpha_layer=0 and distil the outputs."
        )
    pairs = arithmetic_of(args.compat).matched_states(ours.num_hidden_layers, theirs.num_hidden_layers, args.layer_map)
    return LayerTerm(
        pairs,
        (_width(ours), _width(theirs)),
        args.seed,
        args.layer_normalize,
        args.layer_reduction,
        args.mask_padding,
    )


def _width(config: PretrainedConfig) -> int:
    """Of the states that a layer gives; one that reads in both directions gives wider states than its own size."""
    return int(getattr(config, "states_width", config.hidden_size))
