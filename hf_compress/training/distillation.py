"""Distillation of a teacher's outputs, its hidden states, or both, beside the loss of the task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.training.arguments import DistillationArguments, arguments_like
from hf_compress.training.cache import TeacherCache
from hf_compress.training.checkpoint_parts import CheckpointPart
from hf_compress.training.compat import arithmetic_of
from hf_compress.training.given_teacher import GivenTeacher, TeacherSource
from hf_compress.training.session_opening import open_session
from hf_compress.training.signals import Batch, StudentSignals, WantedSignals
from hf_compress.training.teacher_fit import columns_of_both, student_inputs
from hf_compress.training.teacher_session import TeacherSession
from hf_compress.training.teacher_terms import output_distance, similarity_terms, states_distance
from hf_compress.training.teachers import FixedTeacher, Teacher
from hf_compress.training.trainer import CompressionTrainer


class DistillationTrainer(CompressionTrainer):
    """Trains a student on the labels and on the outputs and hidden states of a fixed teacher.

    Args:
        model: The student, e.g. a compressed model.
        teacher_model: The teacher; not needed when `alpha_output`, `alpha_layer` and `alpha_similarity` are 0. It may
            take other inputs: arguments that its forward does not name are dropped, and columns `teacher_<name>` go to
            it alone (see `TeacherStudentCollator`). A folder or hub name is opened with the student's kind of head.
        args: `DistillationArguments`. Plain `TrainingArguments` get the defaults of the missing fields: the task loss
            plus the output divergence at temperature 2.
        kwargs: As for `transformers.Trainer`.

    Raises:
        ValueError: If the teacher is missing, cannot be opened or does not fit the student: in its labels, vocabulary
            or layers, or because they share weights.

    Example:
        >>> DistillationTrainer(student, teacher, DistillationArguments("out"), train_dataset=rows)  # doctest: +SKIP
    """

    args: DistillationArguments
    arguments_class: type[DistillationArguments] = DistillationArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        args: DistillationArguments | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=arguments_like(self.arguments_class, args), **kwargs)
        self._batches: Sequence[Batch] = ()
        self._window_begins = False
        # The source opens the teacher; the session fits it to the student and holds it during a training.
        self.source = self.teacher_source(teacher_model)
        self.session = self._open_session()
        # Where nothing is learned from labels, evaluations need none.
        self.can_return_loss = self.can_return_loss or not self.args.task_weight

    def teacher_source(self, given: PreTrainedModel | str | os.PathLike[str] | None) -> TeacherSource:
        """Make the object that opens the teacher, once for each student."""
        return GivenTeacher(given)

    def teacher_origins(self) -> dict[str, str]:
        return self.source.origins() if self.args.uses_teacher else {}

    def _open_session(self) -> TeacherSession | None:
        return open_session(self.source, self._core(), self.args, self.make_teacher, self.accelerator)

    def make_teacher(self, model: PreTrainedModel, wanted: WantedSignals, label_order: list[int] | None) -> Teacher:
        """Make the teacher that guides the student; subclasses return their own kind.

        Args:
            model: The opened teacher; it has the student's labels.
            wanted: Which of its outputs and hidden states become targets.
            label_order: As from `teacher_label_order`.
        """
        folder, layout = self.args.teacher_cache_dir, _stored(wanted, self.accelerator)
        cache = TeacherCache.of(model, folder, layout) if folder else None
        return FixedTeacher(model, wanted, self.args.teacher_dropout, cache, label_order)

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The network that teaches at this moment; None without a teacher."""
        return None if self.session is None else self.session.teacher.model

    @property
    def teacher_cache(self) -> TeacherCache | None:
        """The teacher's stored outputs; None without a cache."""
        return None if self.session is None else self.session.teacher.cache

    @property
    def projectors(self) -> nn.Module | None:
        """The maps between hidden states of different width; None where none are needed."""
        return None if self.session is None or self.session.layer_term is None else self.session.layer_term.projectors

    def extra_parameter_groups(self) -> list[dict[str, Any]]:
        maps = self.projectors
        return [] if maps is None else [{"params": list(maps.parameters()), "weight_decay": self.args.weight_decay}]

    def checkpoint_parts(self) -> Sequence[CheckpointPart]:
        return [*super().checkpoint_parts(), *([] if self.session is None else [self.session])]

    def begin_training(self, num_updates: int, updates_per_epoch: int) -> None:
        if self.model_init is not None:
            # `model_init` has made a new student, and a trial of a search may have changed the arguments.
            self.session = self._open_session()
        if self.session is not None:
            self.session.begin(self, num_updates, updates_per_epoch)
        super().begin_training(num_updates, updates_per_epoch)

    def _set_signature_columns_if_needed(self) -> None:
        # Private: `Trainer` has no public hook for the columns that a data set keeps. The teacher's columns must stay.
        super()._set_signature_columns_if_needed()
        columns: Any = columns_of_both(self._signature_columns or [], self.train_dataset, self.teacher_model)
        self._signature_columns = columns

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, number = super().get_batch_samples(*args, **kwargs)
        self._batches, self._window_begins = samples, True
        return samples, None if self.args.compat else number  # Published code averages over micro-batches.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        session, usual = self._guiding_session(), self.args.gradient_accumulation_steps
        divisor = arithmetic_of(self.args.compat).divisor(len(self._batches) or usual, usual)
        self.current_gradient_accumulation_steps = divisor
        if session is not None and self._window_begins:
            # Not in `get_batch_samples`: a resumed training restores its random state after the batches are fetched.
            student = StudentSignals(model, self._student_inputs)
            with self.tokens_of_window(num_items_in_batch):
                weights = self.next_tokens.weights(self._batches)
            self.losses.note_each(session.begin_window(self._batches, self.state, student, weights))
        self._window_begins = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        if session is not None:
            session.end_micro_batch()
        return loss

    def _guiding_session(self) -> TeacherSession | None:
        """The session if its teacher guides this update, otherwise None."""
        session = self.session
        return session if session is not None and session.guides(self.state.global_step) else None

    def _student_inputs(self, batch: Batch) -> dict[str, Any]:
        return student_inputs(batch, self._core(), self.label_names or [])

    def loss_terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        args, session, read = self.args, self._guiding_session(), self._student_inputs(inputs)
        if session is None:
            terms, outputs = super().loss_terms(model, read)
            return {"task": args.task_weight * terms["task"]}, outputs
        read |= {} if session.layer_term is None else {"output_hidden_states": True}
        weights = args.task_weight, args.alpha_output
        if any(weights) and self.next_tokens.from_head(read, labelled=weights[0] > 0):
            targets = session.answer(inputs, model.training)
            terms, outputs = self.next_tokens.terms(model, read, weights, targets, args.temperature)
        else:
            terms, outputs = super().loss_terms(model, read) if "labels" in read or weights[0] else ({}, model(**read))
            terms = {name: args.task_weight * value for name, value in terms.items() if args.task_weight}
            targets = session.answer(inputs, model.training, with_logits=True)
            if args.alpha_output:
                distance = output_distance(session, targets, outputs, inputs, args.temperature)
                terms["output"] = args.alpha_output * distance * self.next_tokens.weight(read)
        terms |= similarity_terms(session, targets, outputs, inputs, args.alpha_similarity)
        if session.layer_term is not None:
            terms["layer"] = args.alpha_layer * states_distance(session, session.layer_term, targets, outputs, inputs)
            # Evaluation gathers every output field; these were asked for by this loss alone.
            outputs = {name: value for name, value in outputs.items() if name != "hidden_states"}
        return terms, outputs


def _stored(wanted: WantedSignals, accelerator: Accelerator) -> dict[str, Any]:
    """What a cache holds for each example; half precision gives other answers."""
    precision = {"precision": accelerator.mixed_precision} if accelerator.native_amp else {}
    outputs = "head inputs" if wanted.head_inputs else wanted.logits
    if wanted.vectors is not None:
        outputs = f"sentence vectors, {wanted.vectors.value}"
    return {"states": list(wanted.states), "logits": outputs, **precision}
