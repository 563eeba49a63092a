"""Repeats the order of the examples when training resumes in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_compress.training.checkpoint_checks import random_states_of
from hf_compress.training.checkpoints import readable


def _draw_alike(loader: Any, args: TrainingArguments, epoch: int) -> None:
    """Let all processes draw one order, if it comes from a process's own random numbers."""
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, LengthGroupedSampler):
        # What accelerate and torch wrap around it.
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    if sampler is not None:
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler.generator = torch.Generator().manual_seed(seed + epoch)


class EpochOrder(TrainerCallback):
    """Repeats the order in which an interrupted epoch would have read its examples. A part of every checkpoint.

    `train_sampling_strategy="group_by_length"` draws the order from torch's own random numbers. `Trainer` does not
    save their state at the beginning of the epoch, so a training resumed in any epoch but the first would read other
    batches. Of several processes each would draw an order of its own, and some rows would be read twice and others
    never: there the order of an epoch follows from the seed and the number of the epoch.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self._resumed: tuple[Path, int] | None = None

    @staticmethod
    def _file(checkpoint: Path, process: int) -> Path:
        return checkpoint / f"epoch_rng_state_{process}.pth"

    def save(self, checkpoint: Path, process: int, shared: bool) -> None:
        """Write the state at the beginning of the epoch; every process has its own."""
        if self.state is not None:
            torch.save(self.state, self._file(checkpoint, process))

    def load(self, checkpoint: Path, process: int) -> None:
        """Read the state when the next epoch begins, or the one that was interrupted goes on.

        Raises:
            ValueError: If its file cannot be read.
        """
        self._resumed = (checkpoint, process)
        self._saved_state(checkpoint, process)

    def _saved_state(self, checkpoint: Path, process: int) -> Tensor | None:
        file = self._file(checkpoint, process)
        if not file.exists():
            return None
        with readable(checkpoint, "order of the examples"):
            # A generator refuses whatever is not its state.
            return torch.Generator().set_state(torch.load(file, weights_only=True)).get_state()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the random numbers from which the order is drawn, and remember them."""
        if args.world_size > 1:
            _draw_alike(kwargs.get("train_dataloader"), args, int(float(state.epoch or 0) + 1e-6))
        if self._resumed is not None:
            checkpoint, process = self._resumed
            # From the end of an epoch `Trainer` goes on with the random numbers of the checkpoint: it is about to set
            # them. The state in our file is that of the finished epoch.
            between_epochs = args.ignore_data_skip or float(state.epoch or 0).is_integer()
            states = random_states_of(checkpoint, process, args.world_size) if between_epochs else None
            found = self._saved_state(checkpoint, process) if states is None else states["cpu"]
            if found is not None:
                torch.set_rng_state(found)
            self._resumed = None
        self.state = torch.get_rng_state()
