"""Arguments of `ProximalTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers.training_args import OptimizerNames

from hf_compress.training.arguments import LearningTeacherArguments


# The weights of a distillation's terms that this method fixes -> what to use instead.
_FIXED = {
    "alpha_task": (0.0, "student_ce_weight weighs the student's loss on the labels"),
    "alpha_output": (1.0, "the student learns from the teacher's outputs; the other terms are weighed against them"),
}


@dataclass
class ProximalArguments(LearningTeacherArguments):
    """Arguments of `ProximalTrainer`.

    The teacher's loss is `(1 - proximal_weight) * task + proximal_weight * T^2 * KL(student || teacher)`, that of the
    student `T^2 * KL(teacher || student) + student_ce_weight * task + alpha_layer * layer`.

    Args:
        proximal_weight: How strongly the teacher is held near the student, from 0 (it learns the labels alone) to
            below 1.
        teacher_learning_rate: Peak learning rate of the teacher. With 0 it never changes: plain distillation from
            the teacher as it was given.
        temperature: Softens both distributions in both losses; must be above 0. Published: 1.
        zero_init_heads: Set the last linear layer of both models to zero before the first update, so that their
            outputs start equal. Of a teacher that does not learn the layer stays.
        student_ce_weight: Weight of the student's own loss on the labels. Published: 0.
        prox_mode: How the teacher is held. `fixed`: by `proximal_weight`; `dual`: by a weight beside the whole task
            loss that grows while the divergence exceeds `dual_epsilon` and shrinks while it is below.
        dual_epsilon: The divergence that `dual` allows, in nats.
        dual_beta: The weight with which `dual` begins.
        dual_learning_rate: How fast that weight changes: its change in an update for each nat of excess.
        proximal_direction: Which divergence holds the teacher: `student_teacher` is KL(student || teacher), as
            published; `teacher_student` is KL(teacher || student).
        evaluate_teacher: Evaluate the teacher after the student, too; its metrics begin with `eval_teacher_`.
        teacher_dropout: Run the teacher with dropout when it learns. Its answers never have any.
        alpha_task: Not used here: `student_ce_weight` weighs the student's own loss.
        alpha_output: Not used here: it is always 1.
        compat: `prokt` trains as the published code does. All micro-batches of a window but the last are distilled
            from the teacher before its step, the weight of `dual` changes after every micro-batch, and the optimizer
            is the AdamW of that code.

    Raises:
        ValueError: Names the field, the rule and the value.
    """

    published: ClassVar[tuple[str, ...]] = ("prokt",)

    alpha_task: float = 0.0
    temperature: float = 1.0
    proximal_weight: float = 0.4
    zero_init_heads: bool = True
    student_ce_weight: float = 0.0
    prox_mode: Literal["fixed", "dual"] = "fixed"
    dual_epsilon: float = 1.0
    dual_beta: float = 1.0
    dual_learning_rate: float = 0.001
    proximal_direction: Literal["student_teacher", "teacher_student"] = "student_teacher"
    evaluate_teacher: bool = False
    compat: Literal["prokt"] | None = None  # type: ignore[assignment]  # other code, other name

    def check(self) -> None:
        """Raise `ValueError` when values are out of range or contradict each other."""
        for name, (fixed, instead) in _FIXED.items():
            if getattr(self, name) != fixed:
                raise ValueError(f"{name} must be left out, got {getattr(self, name)}: {instead}.")
        if not 0 <= self.proximal_weight < 1:
            raise ValueError(f"proximal_weight must be at least 0 and below 1, got {self.proximal_weight}.")
        for name in ("student_ce_weight", "dual_epsilon", "dual_beta", "dual_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be zero or positive, got {getattr(self, name)}.")
        for name, choices in (
            ("prox_mode", ("fixed", "dual")),
            ("proximal_direction", ("student_teacher", "teacher_student")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.prox_mode == "dual" and not self.teacher_learning_rate:
            raise ValueError("prox_mode must be 'fixed' with teacher_learning_rate=0: a fixed teacher needs no hold.")
        if self.prox_mode == "fixed":
            for name in ("dual_epsilon", "dual_beta", "dual_learning_rate"):
                if getattr(self, name) != (unused := getattr(ProximalArguments, name)):
                    raise ValueError(
                        f"{name} must be left out with prox_mode='fixed', which has no use for it, got "
                        f"{getattr(self, name)} (default {unused}): set prox_mode='dual'."
                    )
        if self.compat == "prokt" and self.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(
                f"optim must be left out with compat='prokt', which has its own AdamW, got {self.optim!r}."
            )
        if self.evaluate_teacher and not self.teacher_learning_rate:
            raise ValueError(
                "evaluate_teacher must be left out when teacher_learning_rate is 0: the teacher does not change."
            )
        super().check()

    @property
    def task_weight(self) -> float:
        return self.student_ce_weight
