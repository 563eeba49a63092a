"""How a training counts and weighs: our arithmetic, and that of published code (`compat`).

Everything that `compat="cald"` changes is in this file. Of `compat="prokt"`, `proximal_teacher.py` has the order
within a window and `published_adamw.py` the optimizer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from transformers import TrainingArguments

from hf_compress.training.layer_matching import match_layers
from hf_compress.training.windows import Window


# What `compat` sets, in the arguments that have these fields: the constants of that code.
_SETTINGS: dict[str, dict[str, Any]] = {
    "cald": {
        "layer_reduction": "sum",
        "layer_normalize": False,
        "layer_map": None,
        "mask_padding": False,
        "teacher_dropout": True,
        "teacher_cache_dir": None,
        "teacher_schedule": "stretched",
        "max_grad_norm": 0.0,
    },
    "prokt": {
        "alpha_layer": 0.0,
        "alpha_similarity": 0.0,
        "temperature": 1.0,
        "student_ce_weight": 0.0,
        "proximal_direction": "student_teacher",
        "max_distill_steps": None,
        "optim_args": None,
    },
}


class Arithmetic:
    """Ours: a window is divided by its own size, and the teacher's turn is counted over all updates."""

    def divisor(self, length: int, accumulation: int) -> int:
        """The number by which the gradients of a window's micro-batches are divided.

        Args:
            length: Micro-batches in the window.
            accumulation: Micro-batches in an ordinary window.
        """
        return length

    def learns(self, window: Window, cycle: int) -> bool:
        """Whether the teacher computes gradients on a window.

        Args:
            window: The micro-batches of one update.
            cycle: The teacher learns in one of this many updates.
        """
        return (window.update + 1) % cycle == 0

    def steps(self, window: Window, cycle: int) -> bool:
        """Whether the teacher's optimizer steps after a window."""
        return self.learns(window, cycle)

    def matched_states(self, num_student: int, num_teacher: int, layer_map: list[int] | None) -> list[tuple[int, int]]:
        """Which hidden states are compared.

        Args:
            num_student, num_teacher: Layers of the models.
            layer_map: As for `match_layers`.

        Returns:
            Pairs of indices into `hidden_states` of student and teacher, where 0 is the embeddings.

        Raises:
            ValueError: If the map does not fit the models.
        """
        return [(s + 1, t + 1) for s, t in match_layers(num_student, num_teacher, layer_map)]


class CaldArithmetic(Arithmetic):
    """That of the published code.

    Its two tests count from the epoch's first batch and disagree on a last, partial window.

    Source:
        CALD specification 3.2 and 6.10-6.12 (arXiv 2410.06846).
    """

    def divisor(self, length: int, accumulation: int) -> int:
        return accumulation

    def learns(self, window: Window, cycle: int) -> bool:
        return (window.update % window.updates_per_epoch + 1) % cycle == 0

    def steps(self, window: Window, cycle: int) -> bool:
        whole = len(window.batches) == window.accumulation
        return (window.update % window.updates_per_epoch + whole) % cycle == 0

    def matched_states(self, num_student: int, num_teacher: int, layer_map: list[int] | None) -> list[tuple[int, int]]:
        if num_student != num_teacher:
            raise ValueError(
                f"compat='cald' must have equally deep models, got {num_student} and {num_teacher} layers."
            )
        return [(i, i) for i in range(num_student + 1)]


def arithmetic_of(compat: Literal["cald", "prokt"] | None) -> Arithmetic:
    """The arithmetic that an argument `compat` names."""
    return CaldArithmetic() if compat == "cald" else Arithmetic()


def follow_published_(args: TrainingArguments, compat: Literal["cald", "prokt"]) -> None:
    """Set what `compat` fixes.

    Raises:
        ValueError: If a field was given another value.
    """
    defaults = {entry.name: entry.default for entry in dataclasses.fields(args)}
    for name, published in _SETTINGS[compat].items():
        if name not in defaults:
            continue
        given = getattr(args, name)
        if given not in (defaults[name], published):
            raise ValueError(
                f"{name} must be left out or {published!r} with compat={compat!r}, which trains as the published code "
                f"does, got {given!r}."
            )
        setattr(args, name, published)
