"""A teacher that is trained beside its student, with an optimizer, schedule and randomness of its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from safetensors.torch import load_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_compress.core.batches import accepted_arguments
from hf_compress.training.checkpoints import readable
from hf_compress.training.saved_names import accept_saved_names_
from hf_compress.training.teachers import MicroBatch, Signals, Teacher, signals_of


_STATE = "training_state.pt"
# What processes after the first have of their own.
_PROCESS = "random_state_{}.pt"


class LearningTeacher(Teacher):
    """Takes one gradient step on its own loss every `cycle` updates; targets come from the weights before the step.

    Args:
        model: Trained in place.
        states: Indices into `hidden_states` that students compare with.
        needs_logits: Whether the outputs are compared.
        learning_rate: Peak of its schedule.
        cycle: T_u, student updates for each teacher update; the other updates' batches are not used to train it.
        stretched: Give it the student's schedule, advanced only when it learns, so that it never finishes.
        dropout: Run it in train mode, also for the targets.
        restart_each_epoch: Decide with the two tests of CALD's code, which count from the epoch's first batch and
            disagree on a last, partial accumulation group.
        seed: Of its own random numbers: whatever the student does, the teacher's training stays the same.

    Source:
        CALD specification 3.2 and 6.10-6.12 (arXiv 2410.06846).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        states: tuple[int, ...],
        needs_logits: bool,
        *,
        learning_rate: float,
        cycle: int = 1,
        stretched: bool = False,
        dropout: bool = True,
        restart_each_epoch: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model.requires_grad_(True).train(dropout), states, needs_logits)
        self.learning_rate = learning_rate
        self.cycle = cycle
        self.stretched = stretched
        self.dropout = dropout
        self.restart_each_epoch = restart_each_epoch
        self._last_loss: Tensor | None = None
        self._wrapped: Any = model
        self._accelerator: Accelerator | None = None
        self._optimizer: Any = None
        self._scheduler: Any = None
        self._seed = seed
        self._rng = torch.Generator().manual_seed(seed).get_state()
        self._device_rng: Tensor | None = None

    def prepare(self, trainer: Trainer, num_updates: int) -> None:
        """Build optimizer and schedule once the student's number of updates is known.

        Raises:
            ValueError: Under DeepSpeed or FSDP, which hold one trained model a process.
        """
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError("A learning teacher must run without DeepSpeed and FSDP: they train one model a process.")
        args = copy.copy(trainer.args)
        args.learning_rate = self.learning_rate
        decayed = set(trainer.get_decay_parameter_names(self.model))
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, self.model)
        # Clipping, scaling and the skipped-step flag act on everything an accelerator has prepared, so the teacher
        # has one of its own; device, precision and processes are shared between them anyway.
        plugin = GradientAccumulationPlugin(**trainer.accelerator.gradient_state.plugin_kwargs)
        self._accelerator = Accelerator(gradient_accumulation_plugin=plugin)
        self._wrapped, self._optimizer = self._accelerator.prepare(self.model, kind(groups, **options))
        share = 1 if self.stretched else self.cycle
        self._scheduler = get_scheduler(
            args.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=args.get_warmup_steps(num_updates) // share,
            num_training_steps=num_updates // share,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        self._max_grad_norm = args.max_grad_norm

    def _learns(self, place: MicroBatch) -> bool:
        number = (place.step % place.updates_per_epoch if self.restart_each_epoch else place.step) + 1
        return number % self.cycle == 0

    def _steps(self, place: MicroBatch) -> bool:
        if not self.restart_each_epoch:
            return self._learns(place)
        full_groups = place.step % place.updates_per_epoch + (place.length == place.accumulation)
        return full_groups % self.cycle == 0

    def signals(self, inputs: Mapping[str, Any]) -> Signals:
        place, arguments = self.place, accepted_arguments(self.model, inputs)
        hidden = {"output_hidden_states": bool(self.states), "return_dict": True}
        if place is None or not self._learns(place):
            arguments.pop("labels", None)
            # Outside of training (evaluation) the targets are those of the finished network.
            self.model.train(self.dropout and place is not None)
            with torch.no_grad(), self._own_randomness():
                return signals_of(self._wrapped(**arguments, **hidden), self.states, self.needs_logits)
        self.model.train(self.dropout)
        last = place.index == place.length - 1
        wait = contextlib.nullcontext() if last else self._accelerator.no_sync(self._wrapped)
        with wait, self._own_randomness():
            outputs = self._wrapped(**arguments, **hidden)
            loss = getattr(outputs, "loss", None)
            if loss is None:
                raise ValueError(
                    f"A teacher that learns needs a loss, and {type(self.model).__name__} gave none for the columns "
                    f"{', '.join(sorted(arguments))}. Give it a head, and the data the labels that it takes."
                )
            # On an accelerator this would wait for the device; there the trainer checks the averages that it logs.
            if loss.device.type == "cpu" and not torch.isfinite(loss).all():
                raise ValueError(f"The teacher's loss must be finite, got {loss} at step {place.step}.")
            divisor = place.accumulation if self.restart_each_epoch else place.length
            self._accelerator.backward(loss / divisor)
        self._last_loss = loss.detach()
        return signals_of(outputs, self.states, self.needs_logits)

    def end(self, place: MicroBatch) -> None:
        super().end(place)
        if place.index < place.length - 1:
            return
        if self._steps(place):
            if self._max_grad_norm > 0:
                self._accelerator.clip_grad_norm_(self._wrapped.parameters(), self._max_grad_norm)
            self._optimizer.step()
            if not self._accelerator.optimizer_step_was_skipped:
                self._scheduler.step()
        self._optimizer.zero_grad()

    def take_loss(self) -> Tensor | None:
        """The teacher's loss on the last micro-batch it learned from, once."""
        loss, self._last_loss = self._last_loss, None
        return loss

    @property
    def current_learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        on_cuda = self.model.device.type == "cuda"
        outer, outer_device = torch.get_rng_state(), torch.cuda.get_rng_state(self.model.device) if on_cuda else None
        torch.set_rng_state(self._rng)
        if on_cuda:
            if self._device_rng is None:
                self._device_rng = torch.Generator(self.model.device).manual_seed(self._seed).get_state()
            torch.cuda.set_rng_state(self._device_rng, self.model.device)
        try:
            yield
        finally:
            self._rng = torch.get_rng_state()
            torch.set_rng_state(outer)
            if on_cuda:
                self._device_rng = torch.cuda.get_rng_state(self.model.device)
                torch.cuda.set_rng_state(outer_device, self.model.device)

    def save(self, folder: Path, process: int = 0) -> None:
        if process:
            # It saw other batches, which took other numbers of random draws.
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"rng": self._rng, "device_rng": self._device_rng}, folder / _PROCESS.format(process))
            return
        self.model.save_pretrained(folder)
        torch.save(
            {
                "optimizer": self._optimizer.state_dict(),
                "scheduler": self._scheduler.state_dict(),
                "rng": self._rng,
                "device_rng": self._device_rng,
                "scaler": None if self._accelerator.scaler is None else self._accelerator.scaler.state_dict(),
            },
            folder / _STATE,
        )

    def load(self, folder: Path, process: int = 0) -> None:
        if not (folder / _STATE).exists():
            raise ValueError(f"resume_from_checkpoint must hold the teacher's state, got no {folder / _STATE}.")
        with readable(folder, "teacher"):
            state = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
            accept_saved_names_(self.model)
            load_model(self.model, folder / SAFE_WEIGHTS_NAME)
            self._optimizer.load_state_dict(state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
            # Checkpoints of earlier versions hold the first process's state alone.
            if process and (file := folder / _PROCESS.format(process)).exists():
                state |= torch.load(file, weights_only=True, map_location="cpu")
            # A generator refuses what is no state of one.
            self._rng = torch.Generator().set_state(state["rng"]).get_state()
            self._device_rng = state["device_rng"]
            if self._accelerator.scaler is not None and state["scaler"] is not None:
                self._accelerator.scaler.load_state_dict(state["scaler"])
