"""Callbacks that do what `Trainer` leaves out: gradients outside the model, the order of a resumed epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_compress.training.checkpoints import readable


class ExtraGradients(TrainerCallback):
    """Clips and clears the gradients of parameters outside the model: `Trainer` does so for the model alone.

    Args:
        groups: Gives the optimizer groups of those parameters.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self.groups = groups

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.groups() for p in group["params"]]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm > 0 and (parameters := self._parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self._parameters():
            parameter.grad = None


class EpochOrder(TrainerCallback):
    """Repeats the order of the examples when training goes on in the middle of an epoch.

    `train_sampling_strategy="group_by_length"` draws it from torch's own random numbers, whose state at the epoch's
    beginning `Trainer` does not save: resumed in any epoch but the first, it would see other batches.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.resumed: Path | None = None
        self._begins = False

    def save(self, output_dir: str, args: Any) -> None:
        """Put the state at the beginning of the epoch into a checkpoint."""
        if self.state is not None:
            torch.save(self.state, Path(output_dir, self.file(args)))

    @staticmethod
    def file(args: Any) -> str:
        return f"epoch_rng_state_{args.process_index}.pth"

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resumed is not None and (file := self.resumed / self.file(args)).exists():
            with readable(self.resumed, "order of the examples"):
                torch.set_rng_state(torch.load(file, weights_only=True))
        self.resumed = None
        self.state = torch.get_rng_state()
        self._begins = True

    def on_rng_restored(self) -> None:
        """To be called when `Trainer` has set the random numbers of a checkpoint.

        In the middle of an epoch it does so after the order is drawn. After a checkpoint of an epoch's end it does so
        before: then the state in the file is that of the finished epoch, and this one is right.
        """
        if self._begins:
            self.state = torch.get_rng_state()

    def on_batches(self) -> None:
        """To be called when the first batches are there: the order of this epoch is drawn."""
        self._begins = False
