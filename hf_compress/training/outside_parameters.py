"""Trained parameters outside of the model: the maps between hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_compress.training.checkpoints import readable


# A name with "optimizer" in it would change how transformers reads the checkpoint.
_FILE = "outside_training.pt"


class OutsideParameters(TrainerCallback):
    """Clips and clears the gradients of trained parameters outside the model: `Trainer` does so for the model alone.

    Under FSDP2 they have an optimizer of their own, which steps beside the model's at its learning rate: FSDP2
    exchanges an optimizer's parameters for those of the sharded model, and saves them by their names in it.

    Args:
        groups: Gives their optimizer groups.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self.groups = groups
        self._own: Optimizer | None = None
        self._saved: Mapping[str, Any] | None = None

    def joining(self, trainer: Trainer) -> list[dict[str, Any]]:
        """The groups that the model's optimizer takes up. It is about to be made.

        Args:
            trainer: Its arguments say how to train.

        Raises:
            ValueError: Under FSDP2 in fp16, whose loss scale belongs to one optimizer.
        """
        self._own, groups = None, self.groups()
        if not groups or not trainer.is_fsdp_enabled:
            return groups
        if trainer.args.fp16:
            raise ValueError("fp16 must be off with fsdp and alpha_layer between models of unlike width: use bf16.")
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
        self._own = kind(groups, **options)
        if self._saved is not None:
            self._own.load_state_dict(dict(self._saved))
            self._saved = None
        return []

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups() for parameter in group["params"]]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.max_grad_norm > 0 and (parameters := self._parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._own is None:
            return
        for group in self._own.param_groups:
            group["lr"] = kwargs["optimizer"].param_groups[0]["lr"]
        self._own.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def save(self, checkpoint: Path, process: int, shared: bool) -> None:
        if self._own is not None and shared:
            torch.save(self._own.state_dict(), checkpoint / _FILE)

    def load(self, checkpoint: Path, process: int) -> None:
        self._saved = None
        if (checkpoint / _FILE).is_file():
            with readable(checkpoint, "state of what is trained outside of the model"):
                self._saved = torch.load(checkpoint / _FILE, weights_only=True, map_location="cpu")
