"""How compressed models are taught: arguments on top of `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class DistillationArguments(TrainingArguments):
    """Arguments of `DistillationTrainer`.

    The loss is `alpha_task * task + alpha_output * T^2 * KL(teacher || student) + alpha_layer * layer`.

    Args:
        alpha_task: Weight of the student's own loss on the labels.
        alpha_output: Weight of the divergence of the outputs (mean squared error for regression).
        alpha_layer: Weight of the distance of hidden states.
        temperature: T, softens both output distributions.
        layer_reduction: `mean` or `sum` over the matched layers.
        layer_normalize: Compare hidden states after a LayerNorm without parameters.
        mask_padding: Leave padding positions out of the layer loss.
        layer_map: For each student layer the zero-based teacher layer whose output it imitates, -1 for none.
            None: evenly spread, last on last.
        max_distill_steps: From this update on only the task loss is used and the teacher no longer runs.
        teacher_dropout: Run the teacher in train mode.
        teacher_cache_dir: Folder that stores the teacher's outputs once for each example.
        compat: `cald` reproduces the layer loss of that code: the sum over all states, embeddings included, of raw
            mean squared errors over all positions, padding included, with the teacher in train mode.

    Raises:
        ValueError: Names the field, the rule and the value.
    """

    alpha_task: float = field(default=1.0, metadata={"help": "Weight of the task loss."})
    alpha_output: float = field(default=1.0, metadata={"help": "Weight of the output divergence."})
    alpha_layer: float = field(default=0.0, metadata={"help": "Weight of the hidden-state distance."})
    temperature: float = field(default=2.0, metadata={"help": "Softens both output distributions."})
    layer_reduction: Literal["mean", "sum"] = field(default="mean", metadata={"help": "Over the matched layers."})
    layer_normalize: bool = field(default=False, metadata={"help": "Compare hidden states after a LayerNorm."})
    mask_padding: bool = field(default=True, metadata={"help": "Leave padding out of the layer loss."})
    layer_map: list[int] | None = field(
        default=None, metadata={"help": "Teacher layer for each student layer, -1 for none; default: evenly spread."}
    )
    max_distill_steps: int | None = field(default=None, metadata={"help": "Only the task loss from this update on."})
    teacher_dropout: bool = field(default=False, metadata={"help": "Run the teacher in train mode."})
    teacher_cache_dir: str | None = field(default=None, metadata={"help": "Store the teacher's outputs here, once."})
    compat: Literal["cald"] | None = field(default=None, metadata={"help": "Reproduce the layer loss of CALD."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_task", "alpha_output", "alpha_layer"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be zero or positive, got {getattr(self, name)}.")
        if not self.alpha_task + self.alpha_output + self.alpha_layer:
            raise ValueError("alpha_task, alpha_output and alpha_layer must not all be 0: nothing would be learned.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.max_distill_steps is not None and self.max_distill_steps < 0:
            raise ValueError(f"max_distill_steps must not be negative, got {self.max_distill_steps}.")
        if self.max_distill_steps is not None and not self.alpha_task:
            raise ValueError("alpha_task must be above 0 with max_distill_steps: nothing would be learned afterwards.")
        for name, choices in (("layer_reduction", ("mean", "sum")), ("compat", (None, "cald"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.compat == "cald":
            self.layer_reduction, self.layer_normalize, self.mask_padding, self.teacher_dropout = (
                "sum",
                False,
                False,
                True,
            )
        if self.teacher_cache_dir and self.teacher_dropout:
            raise ValueError("teacher_cache_dir must be unset with teacher_dropout: its outputs differ every time.")
        if self.teacher_cache_dir and self.alpha_layer and not self.mask_padding:
            raise ValueError("teacher_cache_dir must go with mask_padding=True: padding is not stored.")

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher."""
        return self.alpha_output > 0 or self.alpha_layer > 0
