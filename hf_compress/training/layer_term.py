"""The layer term of a distillation loss: the distance between hidden states of student and teacher.

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
        widths: D of the student and of the teacher. If they differ, each pair has a linear map from one width to the
            other, which is trained with the student but is no part of it.
        seed: Random seed of these maps.
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
        # The maps as they are called: wrapped, so that processes average their gradients.
        self.projectors: nn.Module | None = None
        if widths[0] != widths[1]:
            # Forked: whether the widths differ must not change the student's random numbers.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.maps = Projectors([student for student, _ in pairs], *widths)
            self.projectors = self.maps

    def prepare(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Wrap the maps as an accelerator wraps a model.

        Args:
            wrap: Returns the module to call.
        """
        if self.maps is not None:
            self.projectors = wrap(self.maps)

    @property
    def teacher_states(self) -> tuple[int, ...]:
        """Indices of the teacher's hidden states that are compared, each once."""
        return tuple(dict.fromkeys(teacher for _, teacher in self.pairs))

    def __call__(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        real: Tensor | None = None,
        kept_after: Callable[[int], Tensor | None] | None = None,
    ) -> Tensor:
        """Compute the distance on a batch.

        Args:
            teacher: The teacher's hidden states `teacher_states`, [B, S, D] each.
            student: All hidden states of the student.
            real: [B, S] bool of the positions that are not padding; None for all.
            kept_after: Layer index -> [B, S] bool, True for the tokens that the layer keeps; None if none are dropped.

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
        """[B, S] bool: the positions at which a hidden state of the student is compared; None for all."""
        real = real if self.mask_padding else None
        # A dropped token keeps the value of an earlier layer, so it is not compared.
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
