"""The layer term of a distillation: which hidden states are compared, through what, and at which positions.

Letters: B batch, S padded length, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_compress.training.checkpoints import readable
from hf_compress.training.layer_matching import Projectors
from hf_compress.training.losses import layer_distance


_FILE = "projectors.safetensors"


class LayerTerm:
    """The distance between hidden states of a student and its teacher.

    Args:
        pairs: Indices into `hidden_states` of student and teacher, where 0 is the embeddings.
        widths: D of the student and of the teacher. Between different ones stands a linear map for each pair, which
            is trained with the student and is no part of it.
        seed: Of the maps.
        normalize, reduction: As for `layer_distance`.
        mask_padding: Leave padding positions out.
    """

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        widths: tuple[int, int],
        seed: int,
        normalize: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        mask_padding: bool = True,
    ) -> None:
        self.pairs = pairs
        self.normalize = normalize
        self.reduction: Literal["mean", "sum"] = reduction
        self.mask_padding = mask_padding
        self.maps: Projectors | None = None
        # As processes call it: their gradients are averaged.
        self.projectors: nn.Module | None = None
        if widths[0] != widths[1]:
            # Its own generator: whether widths differ must not change the student's random numbers.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.maps = Projectors([student for student, _ in pairs], *widths)
            self.projectors = self.maps

    def prepare(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Wrap the maps as an accelerator wraps a model.

        Args:
            wrap: Gives the module to call.
        """
        if self.maps is not None:
            self.projectors = wrap(self.maps)

    @property
    def teacher_states(self) -> tuple[int, ...]:
        """The teacher's hidden states that are compared, each once."""
        return tuple(dict.fromkeys(teacher for _, teacher in self.pairs))

    def __call__(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        real: Tensor | None = None,
        kept_after: Callable[[int], Tensor | None] | None = None,
    ) -> Tensor:
        """The distance on a batch.

        Args:
            teacher: Its `teacher_states`, [B, S, D] each.
            student: All of its hidden states.
            real: [B, S] bool of the positions that are not padding; None for all.
            kept_after: Layer -> [B, S] bool of the tokens that leave it; for students that drop some.

        Raises:
            ValueError: If the models read different tokens.
        """
        by_state = dict(zip(self.teacher_states, teacher, strict=True))
        states: Mapping[int, Tensor] = {index: student[index] for index, _ in self.pairs}
        if self.projectors is not None:
            states = self.projectors(states)
        for ours, theirs in self.pairs:
            if states[ours].shape != by_state[theirs].shape:
                raise ValueError(
                    f"Hidden states must have the teacher's shape {tuple(by_state[theirs].shape)}, got "
                    f"{tuple(states[ours].shape)}: alpha_layer needs one tokenizer for both."
                )
        return layer_distance(
            [by_state[theirs] for _, theirs in self.pairs],
            [states[ours] for ours, _ in self.pairs],
            [self._counted(ours, real, kept_after) for ours, _ in self.pairs],
            self.normalize,
            self.reduction,
        )

    def _counted(
        self, state: int, real: Tensor | None, kept_after: Callable[[int], Tensor | None] | None
    ) -> Tensor | None:
        """[B, S] of the positions at which a hidden state of the student is compared; None for all."""
        real = real if self.mask_padding else None
        # A dropped token keeps the value it had: that of an earlier layer.
        live = None if kept_after is None or state == 0 else kept_after(state - 1)
        if live is None or real is None:
            return real if live is None else live
        return live & real

    def save(self, checkpoint: Path) -> None:
        """Write the maps into a checkpoint."""
        if self.maps is not None:
            save_file(self.maps.state_dict(), checkpoint / _FILE)

    def load(self, checkpoint: Path) -> None:
        """Read the maps of a checkpoint.

        Raises:
            ValueError: If it holds none, or they cannot be read.
        """
        if self.maps is None:
            return
        if not (checkpoint / _FILE).exists():
            raise ValueError(
                f"resume_from_checkpoint must hold {_FILE} for these widths, got {str(checkpoint)!r} without it."
            )
        with readable(checkpoint, "projectors"):
            self.maps.load_state_dict(load_file(checkpoint / _FILE))
