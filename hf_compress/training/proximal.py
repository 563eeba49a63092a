"""Proximal distillation: teacher and student are trained together, and the teacher stays near the student."""

from __future__ import annotations

import os
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from hf_compress.core.batches import accepted_arguments
from hf_compress.core.output_layer import zero_output_layers_
from hf_compress.training.learner_trainer import LearningTeacherTrainer
from hf_compress.training.proximal_arguments import ProximalArguments
from hf_compress.training.proximal_teacher import DualHold, FixedHold, ProximalTeacher
from hf_compress.training.published_adamw import PublishedAdamW
from hf_compress.training.signals import WantedSignals
from hf_compress.training.teacher_fit import read_by_both
from hf_compress.training.teachers import FixedTeacher, Teacher
from hf_compress.training.trainer import CompressionTrainer


class ProximalTrainer(LearningTeacherTrainer):
    """Trains teacher and student together: the teacher learns the labels and stays near the student that follows it.

    In each update the teacher makes a step on all micro-batches first, then the student learns from its new answers.

    Args:
        model: The student, pretrained, not yet trained on the task.
        teacher_model: The teacher, pretrained, not yet trained on the task; changed in place. As for
            `DistillationTrainer`, it may read other columns, or be a folder or hub name.
        args: `ProximalArguments`. Plain `TrainingArguments` get the defaults of the missing fields.
        kwargs: As for `DistillationTrainer`.

    Raises:
        ValueError: As for `DistillationTrainer`; also if the output layer of a model cannot begin with zeros.

    Source:
        "ProKT" (Shi et al. 2021, arXiv 2107.09305); specification 1. Unlike in the published code, one teacher answers
        all micro-batches of a window, the one after its step; `compat="prokt"` restores that code's arithmetic.

    Example:
        >>> trainer = ProximalTrainer(model=student, teacher_model=pretrained, train_dataset=rows,
        ...                           args=ProximalArguments("out", proximal_weight=0.4))        # doctest: +SKIP
    """

    args: ProximalArguments
    arguments_class = ProximalArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        args: ProximalArguments | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, teacher_model, args, **kwargs)
        # The student whose training has begun: a second training of it must not forget the first.
        self._begun: PreTrainedModel | None = None
        self._evaluates_teacher = False

    def make_teacher(self, model: PreTrainedModel, wanted: WantedSignals, label_order: list[int] | None) -> Teacher:
        args = self.args
        if not args.teacher_learning_rate:
            return FixedTeacher(model, wanted, label_order=label_order)
        self.require_same_ids(model)
        return ProximalTeacher(
            model,
            wanted,
            learning_rate=args.teacher_learning_rate,
            hold=FixedHold(args.proximal_weight)
            if args.prox_mode == "fixed"
            else DualHold(args.dual_beta, args.dual_epsilon, args.dual_learning_rate),
            temperature=args.temperature,
            reversed_direction=args.proximal_direction == "teacher_student",
            published=args.compat == "prokt",
            dropout=args.teacher_dropout,
            seed=args.seed,
        )

    def begin_training(self, num_updates: int, updates_per_epoch: int) -> None:
        super().begin_training(num_updates, updates_per_epoch)
        student = self._core()
        if self.args.zero_init_heads and self._begun is not student and self._resumed is None:
            models = {"student": student} | ({} if self.learner is None else {"teacher": self.learner.model})
            zero_output_layers_(models)
        self._begun = student

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        if args.compat != "prokt":
            kind, options = LearningTeacherTrainer.get_optimizer_cls_and_kwargs(args, model)
            return kind, options
        return PublishedAdamW, {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.prox_mode == "dual" and "learning_rate" in logs and isinstance(self.learner, ProximalTeacher):
            logs["prox/beta"] = self.learner.hold.weight
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; with `evaluate_teacher`, evaluations measure the teacher, too."""
        options = (prediction_loss_only, ignore_keys)
        output = super().evaluation_loop(dataloader, description, *options, metric_key_prefix)
        if self.args.evaluate_teacher and self.losses.evaluating:
            self._evaluates_teacher = True
            try:
                prefix = f"{metric_key_prefix}_teacher"
                taught: Any = super().evaluation_loop(dataloader, f"{description} of the teacher", *options, prefix)
            finally:
                self._evaluates_teacher = False
            metrics = cast("dict[str, float]", output.metrics)
            metrics.update({name: value for name, value in taught.metrics.items() if "/" not in name})
        return output

    def loss_terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        if model.training:
            return super().loss_terms(model, inputs)
        # At the start both models give the same outputs: the divergence would call the first state the best.
        return CompressionTrainer.loss_terms(self, model, self._student_inputs(inputs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `CompressionTrainer.compute_loss`; while the teacher is evaluated, its own loss."""
        if not self._evaluates_teacher or self.learner is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        teacher = self.learner.model
        teacher.train(False)
        outputs = teacher(**accepted_arguments(teacher, read_by_both(inputs, self._core(), teacher).teacher))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
