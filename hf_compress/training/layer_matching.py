"""Which student layer imitates which teacher layer, and linear maps between layers of different width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def match_layers(num_student: int, num_teacher: int, layer_map: list[int] | None = None) -> list[tuple[int, int]]:
    """Pair each student layer with the teacher layer that it imitates.

    Args:
        num_student: Layers of the student.
        num_teacher: Layers of the teacher.
        layer_map: For each student layer the zero-based teacher layer, -1 for none. None: evenly spread.

    Returns:
        Pairs of zero-based layers.

    Raises:
        ValueError: If the map has the wrong length or names a layer that does not exist.

    Example:
        >>> match_layers(3, 6)
        [(0, 1), (1, 3), (2, 5)]
    """
    if layer_map is None:
        layer_map = [max(0, round((i + 1) * num_teacher / num_student) - 1) for i in range(num_student)]
    if len(layer_map) != num_student:
        raise ValueError(
            f"layer_map must have one entry for each of {num_student} student layers, got {len(layer_map)}."
        )
    if not all(-1 <= layer < num_teacher for layer in layer_map):
        raise ValueError(f"layer_map must hold teacher layers 0..{num_teacher - 1} or -1, got {layer_map}.")
    if all(layer == -1 for layer in layer_map):
        raise ValueError("layer_map must match at least one layer, got only -1. Set alpha_layer=0 instead.")
    return [(student, teacher) for student, teacher in enumerate(layer_map) if teacher >= 0]


class Projectors(nn.Module):
    """A linear map for each compared state, from the student's width to the teacher's; never part of the student.

    Args:
        states: Indices of the student's hidden states.
        student_width, teacher_width: Their sizes.
    """

    def __init__(self, states: list[int], student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({str(s): nn.Linear(student_width, teacher_width, bias=False) for s in states})

    def forward(self, states: Mapping[int, Tensor]) -> dict[int, Tensor]:
        weights = {index: cast(Tensor, self.maps[str(index)].weight) for index in states}
        return {index: F.linear(state.to(weights[index].dtype), weights[index]) for index, state in states.items()}
