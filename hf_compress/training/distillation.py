"""Distillation from a fixed teacher: outputs, hidden states, or both, beside the task's own loss."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from hf_compress.api import apply_implied
from hf_compress.core.architectures import base_of
from hf_compress.core.batches import forward_names, layer_mask
from hf_compress.core.forward_state import FORWARD_STATE, state_in
from hf_compress.training.arguments import DistillationArguments, arguments_like
from hf_compress.training.cache import TeacherCache
from hf_compress.training.checkpoint_parts import CheckpointPart
from hf_compress.training.checkpoints import readable
from hf_compress.training.collator import TEACHER_PREFIX, split_inputs
from hf_compress.training.fitting import check_inputs, label_order, require_own_weights
from hf_compress.training.layer_matching import Projectors, match_layers
from hf_compress.training.losses import layer_distance
from hf_compress.training.opening import open_teacher, with_decoder_inputs
from hf_compress.training.output_terms import output_term
from hf_compress.training.teachers import FixedTeacher, MicroBatch, Signals, Teacher, logits_of
from hf_compress.training.trainer import CompressionTrainer


logger = logging.getLogger(__name__)

_PROJECTORS = "projectors.safetensors"
# A folder whose name holds "optimizer" or "pytorch_model" would change how transformers reads the checkpoint.
_TEACHER = "teacher"


class DistillationTrainer(CompressionTrainer):
    """Trains a student on the labels and on what a frozen teacher computes.

    Args:
        model: The student, e.g. a compressed model.
        teacher_model: The teacher; not needed when `alpha_output` and `alpha_layer` are 0. It may take other
            inputs: arguments that its forward does not name are dropped, and columns `teacher_<name>` go to it
            alone (see `TeacherStudentCollator`). A folder or hub name is opened with the student's kind of head.
        args: `DistillationArguments`. Plain `TrainingArguments` get the defaults of what they lack: the task loss
            plus the output divergence at temperature 2.
        kwargs: As for `transformers.Trainer`.

    Raises:
        ValueError: If the teacher is missing, has other labels, reads another vocabulary, or does not fit the
            `layer_map`, shares weights with the student, or cannot be opened; if `alpha_layer` is to compare an
            encoder-decoder.

    Example:
        >>> trainer = DistillationTrainer(model=student, teacher_model=teacher, args=DistillationArguments("out"),
        ...                               train_dataset=rows)                                  # doctest: +SKIP
    """

    args: DistillationArguments
    arguments_class: type[DistillationArguments] = DistillationArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike | None = None,
        args: DistillationArguments | None = None,
        **kwargs: Any,
    ) -> None:
        args = arguments_like(self.arguments_class, args)
        if args.uses_teacher and teacher_model is None:
            raise ValueError("teacher_model must be given when alpha_output or alpha_layer is above 0, got None.")
        super().__init__(model=model, args=args, **kwargs)
        self.projectors: nn.Module | None = None
        self.layer_pairs: list[tuple[int, int]] = []
        self._teacher: Teacher | None = None
        self._window = (0, 1)
        if isinstance(teacher_model, str | os.PathLike):
            # Trials of a search may ask a teacher that this trainer's own arguments leave alone.
            asked = args.uses_teacher or self.model_init is not None
            teacher_model = open_teacher(teacher_model, self._core()) if asked else None
        self._origin = teacher_model
        self._new_student = False
        if args.uses_teacher:
            self._set_teacher(teacher_model)

    def call_model_init(self, trial: Any = None) -> Any:
        self._new_student = True
        return super().call_model_init(trial)

    def create_accelerator_and_postprocess(self) -> None:
        self.args.check()
        super().create_accelerator_and_postprocess()

    def begin_training(self, num_updates: int) -> None:
        if self._new_student:
            # A student for every trial, with arguments of its own: what was made from them is made again.
            self.projectors, self.layer_pairs, self._teacher, self._new_student = None, [], None, False
            if self.args.uses_teacher:
                self._set_teacher(self._untouched_teacher())
        if self._teacher is not None:
            self._prepare_teacher(num_updates)
        super().begin_training(num_updates)

    def _untouched_teacher(self) -> PreTrainedModel:
        """The teacher as it was given, for a student that begins anew."""
        if self._origin is None:
            raise ValueError("teacher_model must be given when alpha_output or alpha_layer is above 0, got None.")
        return self._origin

    def _set_teacher(self, teacher: PreTrainedModel) -> None:
        if teacher is self.model or teacher is base_of(self.model):
            raise ValueError(
                "teacher_model must be another object than model, got the same (compress changes a model in place: "
                "open the teacher a second time, or copy.deepcopy it first)."
            )
        require_own_weights(base_of(self.model), teacher)
        apply_implied(teacher)
        student_config, teacher_config = self.model.config, teacher.config
        self._label_order = label_order(student_config, teacher_config) if self.args.alpha_output else None
        if self.args.alpha_layer:
            for config in (student_config, teacher_config):
                if getattr(config, "is_encoder_decoder", False):
                    raise ValueError(
                        "alpha_layer compares the layers of an encoder or of a decoder, "
                        f"but {config.model_type} has both. Set alpha_layer=0 and distil the outputs."
                    )
            self.layer_pairs = self._matched_states(student_config, teacher_config)
            self._make_projectors(student_config.hidden_size, teacher_config.hidden_size)
        states = tuple(dict.fromkeys(teacher_state for _, teacher_state in self.layer_pairs))
        self._teacher = self._make_teacher(teacher, states)

    def _make_teacher(self, teacher: PreTrainedModel, states: tuple[int, ...]) -> Teacher:
        cache, args = None, self.args
        if args.teacher_cache_dir:
            layout = {"states": list(states), "logits": args.alpha_output > 0}
            cache = TeacherCache.of(teacher, args.teacher_cache_dir, layout)
        return FixedTeacher(
            teacher.to(args.device), states, args.alpha_output > 0, args.teacher_dropout, cache, self._label_order
        )

    def _matched_states(self, student: Any, teacher: Any) -> list[tuple[int, int]]:
        """Pairs of indices into `hidden_states`, where 0 is the embeddings."""
        num_student, num_teacher = student.num_hidden_layers, teacher.num_hidden_layers
        if self.args.compat == "cald":
            if num_student != num_teacher:
                raise ValueError(
                    f"compat='cald' must have equally deep models, got {num_student} and {num_teacher} layers."
                )
            return [(i, i) for i in range(num_student + 1)]
        return [(s + 1, t + 1) for s, t in match_layers(num_student, num_teacher, self.args.layer_map)]

    def _make_projectors(self, student_width: int, teacher_width: int) -> None:
        if student_width == teacher_width:
            return
        # Its own generator: whether widths differ must not change the student's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            projectors = Projectors([student for student, _ in self.layer_pairs], student_width, teacher_width)
        # Outside the student, so it is wrapped on its own: its gradients too must be averaged over processes.
        self.projectors = self.accelerator.prepare_model(projectors.to(self.args.device))

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The teacher at this moment, or None."""
        return None if self._teacher is None else self._teacher.model

    @property
    def teacher_cache(self) -> TeacherCache | None:
        """The teacher's stored outputs, or None."""
        return None if self._teacher is None else self._teacher.cache

    def teacher_origins(self) -> dict[str, str]:
        return {} if self._teacher is None else {"the teacher": getattr(self._teacher.model, "name_or_path", "")}

    def _distills(self) -> bool:
        limit = self.args.max_distill_steps
        return self._teacher is not None and (limit is None or self.state.global_step < limit)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self.train_dataset.column_names if hasattr(self.train_dataset, "column_names") else []
        extra = [name for name in columns or [] if name.startswith(TEACHER_PREFIX)]
        # Columns that only the teacher's forward names (token types of a BERT that teaches a DistilBERT).
        shared = list(forward_names(self._teacher.model)) if self._teacher is not None else []
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *extra, *shared]))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, number = super().get_batch_samples(*args, **kwargs)
        self._window = (0, len(samples))
        return samples, number

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.args.compat == "cald":
            # That code divides by the ordinary number of micro-batches, also in a last, shorter group.
            self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        if not self._distills():
            return super().training_step(model, inputs, *args, **kwargs)
        index, length = self._window
        accumulation, step = self.args.gradient_accumulation_steps, self.state.global_step
        loader = self.callback_handler.train_dataloader
        updates_per_epoch = -(-len(loader) // accumulation) if has_length(loader) else self.state.max_steps
        place = MicroBatch(step, index, length, accumulation, updates_per_epoch)
        self._teacher.begin(place)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._teacher.end(place)
        self._window = (index + 1, length)
        return loss

    def _prepare_teacher(self, num_updates: int) -> None:
        """For teachers that depend on the length of the training."""

    def loss_terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        student_inputs, teacher_inputs = split_inputs(inputs)
        forward = self._student_columns()
        student_only = {k: v for k, v in student_inputs.items() if k in forward}
        if not self._distills():
            terms, outputs = super().loss_terms(model, student_only)
            return {"task": self.args.alpha_task * terms["task"]}, outputs
        check_inputs(self.model, self._teacher.model, teacher_inputs or student_inputs, bool(teacher_inputs))
        hidden = {"output_hidden_states": True} if self.layer_pairs else {}
        if "labels" in student_only or self.args.alpha_task:
            terms, outputs = super().loss_terms(model, {**student_only, **hidden})
            terms = {"task": self.args.alpha_task * terms["task"]} if self.args.alpha_task else {}
        else:
            terms, outputs = {}, model(**student_only, **hidden)
        labels = {"labels": student_inputs["labels"]} if "labels" in student_inputs else {}
        asked = {**teacher_inputs, **labels} if teacher_inputs else student_inputs
        targets = self._teacher.signals(with_decoder_inputs(self._teacher.model, asked))
        if self.args.alpha_output:
            compared = output_term(
                targets.logits, logits_of(outputs), self._core(), student_inputs, self.args.temperature
            )
            terms["output"] = self.args.alpha_output * compared
        if self.layer_pairs:
            terms["layer"] = self.args.alpha_layer * self._layer_term(targets, outputs, student_inputs)
            # Evaluation gathers every output field; these were asked for by this loss alone.
            outputs = {name: value for name, value in outputs.items() if name != "hidden_states"}
        return terms, outputs

    def _student_columns(self) -> set[str]:
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model"):
            # An adapter's forward hides the arguments of the model it wraps behind **kwargs.
            model = model.get_base_model()
        return {*forward_names(model), "labels", FORWARD_STATE, *(self.label_names or [])}

    def _layer_term(self, targets: Signals, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        by_state = dict(zip(self._teacher.states, targets.hidden, strict=True))
        states = {index: outputs.hidden_states[index] for index, _ in self.layer_pairs}
        if self.projectors is not None:
            states = self.projectors(states)
        teacher, student = [], []
        for student_state, teacher_state in self.layer_pairs:
            state = states[student_state]
            if state.shape != by_state[teacher_state].shape:
                raise ValueError(
                    f"Hidden states must have the teacher's shape {tuple(by_state[teacher_state].shape)}, got "
                    f"{tuple(state.shape)}: alpha_layer needs one tokenizer for both."
                )
            teacher.append(by_state[teacher_state])
            student.append(state)
        masks = self._counted([index for index, _ in self.layer_pairs], inputs)
        return layer_distance(teacher, student, masks, self.args.layer_normalize, self.args.layer_reduction)

    def _counted(self, states: list[int], inputs: Mapping[str, Any]) -> list[Tensor | None]:
        """For each hidden state of the student, [B, S] of the positions that are compared."""
        masked = self.args.mask_padding and "attention_mask" in inputs
        real = layer_mask(self._core(), inputs) if masked else None
        # A dropped token keeps the value it had: that of an earlier layer.
        state = state_in(inputs)
        left = [None if state is None else state.kept_after(index - 1) for index in states]
        return [real if live is None else live if real is None else live & real for live in left]

    def extra_parameter_groups(self) -> list[dict[str, Any]]:
        if self.projectors is None:
            return []
        return [{"params": list(self.projectors.parameters()), "weight_decay": self.args.weight_decay}]

    def checkpoint_parts(self) -> Sequence[CheckpointPart]:
        return [*super().checkpoint_parts(), _Own(self)]

    def save_own(self, checkpoint: Path, process: int, shared: bool) -> None:
        if self.projectors is not None and shared:
            save_file(self.accelerator.unwrap_model(self.projectors).state_dict(), checkpoint / _PROJECTORS)
        if self._teacher is not None:
            self._teacher.save(checkpoint / _TEACHER, 0 if shared else process)

    def load_own(self, checkpoint: Path, process: int) -> None:
        if self._teacher is not None:
            self._teacher.load(checkpoint / _TEACHER, process)
        if self.projectors is None:
            return
        file = checkpoint / _PROJECTORS
        if not file.exists():
            raise ValueError(
                f"resume_from_checkpoint must hold {_PROJECTORS} for these widths, got {str(checkpoint)!r} without it."
            )
        with readable(checkpoint, "projectors"):
            self.accelerator.unwrap_model(self.projectors).load_state_dict(load_file(file))


class _Own:
    def __init__(self, trainer: DistillationTrainer) -> None:
        self.save, self.load = trainer.save_own, trainer.load_own
