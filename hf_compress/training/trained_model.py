"""A model that is trained beside the one that a Trainer trains."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.generic import ModelOutput

from hf_compress.training.checkpoints import readable
from hf_compress.training.data_parallel import forget_evaluation_
from hf_compress.training.saved_names import accept_saved_names_


_STATE = "training_state.pt"
# The state of each process that is not shared with the first one.
_PROCESS = "random_state_{}.pt"


class TrainedModel:
    """A model with an optimizer, a schedule, a loss scale and random numbers of its own.

    Whatever else happens in the process, its training stays the same.

    Args:
        model: Trained in place.
        seed: Of its random numbers.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model = model.requires_grad_(True)
        self._wrapped: nn.Module = model
        self._accelerator: Accelerator | None = None
        self._optimizer: Any = None
        self._schedule: Any = None
        self._max_grad_norm = 0.0
        self._seed = seed
        self._rng = torch.Generator().manual_seed(seed).get_state()
        self._device_rng: Tensor | None = None

    def prepare(self, trainer: Trainer, learning_rate: float, num_updates: int, num_warmup: int) -> None:
        """Build optimizer and schedule as those of a trainer, with another learning rate.

        Args:
            trainer: Its arguments say how to train.
            learning_rate: Peak of the schedule.
            num_updates: Steps after which the schedule has ended.
            num_warmup: Steps in which the learning rate rises.

        Raises:
            ValueError: Under DeepSpeed or FSDP, which hold one trained model in each process.
        """
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError("A learning teacher must run without DeepSpeed and FSDP: they train one model a process.")
        args = copy.copy(trainer.args)
        args.learning_rate = learning_rate
        decayed = set(trainer.get_decay_parameter_names(self.model))
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        kind, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, self.model)
        optimizer = kind(groups, **options | {"lr": learning_rate})
        # Clipping, scaling and the flag of a skipped step act on everything that an accelerator has prepared, so this
        # model has one of its own; device, precision and processes are shared between them anyway.
        plugin = GradientAccumulationPlugin(**trainer.accelerator.gradient_state.plugin_kwargs)
        # `ddp_find_unused_parameters` and its like are for this model, too. Earlier releases of `Trainer` give the
        # student a handler later than now.
        handler = trainer.accelerator.ddp_handler or DistributedDataParallelKwargs(
            find_unused_parameters=not self.model.is_gradient_checkpointing
        )
        self._accelerator = Accelerator(gradient_accumulation_plugin=plugin, kwargs_handlers=[handler])
        if self._accelerator.num_processes > 1:
            forget_evaluation_(self.model)
        self._wrapped, self._optimizer = self._accelerator.prepare(self.model, optimizer)
        self._schedule = get_scheduler(
            args.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=num_warmup,
            num_training_steps=num_updates,
            scheduler_specific_kwargs=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
        )
        self._max_grad_norm = args.max_grad_norm

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of this model alone."""
        if self._accelerator is None:
            raise RuntimeError("TrainedModel.prepare must be called before the model is trained.")
        return self._accelerator

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def __call__(self, **arguments: Any) -> ModelOutput:
        """Run the model with its own random numbers, without gradients."""
        # Not the wrapped one, in which processes exchange buffers at every call: one of them may evaluate more often.
        with torch.no_grad(), self._own_randomness():
            outputs: ModelOutput = self.model(**arguments)
        return outputs

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[nn.Module]:
        """Gives the model to run one micro-batch of a window, forward and backward.

        Args:
            last: Whether it is the last one of the window: processes then share their gradients.
        """
        wait = contextlib.nullcontext() if last else self.accelerator.no_sync(self._wrapped)
        with wait, self._own_randomness():
            yield self._wrapped

    def step(self) -> None:
        """Make one step with the accumulated gradients."""
        scaler = self.accelerator.scaler
        with self._as_a_whole_window():
            # A loss scale refuses a turn without gradients, which published arithmetic has.
            if scaler is None or any(p.grad is not None for p in self.model.parameters()):
                if self._max_grad_norm > 0:
                    self.accelerator.clip_grad_norm_(self._wrapped.parameters(), self._max_grad_norm)
                self._optimizer.step()
                if self.accelerator.optimizer_step_was_skipped:
                    return
            self._schedule.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        with self._as_a_whole_window():
            self._optimizer.zero_grad()

    @contextlib.contextmanager
    def _as_a_whole_window(self) -> Iterator[None]:
        # All accelerators of a process share this flag, which says whether the student is at the end of its window;
        # before that, optimizers do nothing.
        before = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = True
        try:
            yield
        finally:
            self.accelerator.sync_gradients = before

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        device, on_cuda = self.model.device, self.model.device.type == "cuda"
        outer, outer_device = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None
        torch.set_rng_state(self._rng)
        if on_cuda:
            if self._device_rng is None:
                self._device_rng = torch.Generator(device).manual_seed(self._seed).get_state()
            torch.cuda.set_rng_state(self._device_rng, device)
        try:
            yield
        finally:
            self._rng = torch.get_rng_state()
            torch.set_rng_state(outer)
            if outer_device is not None:
                self._device_rng = torch.cuda.get_rng_state(device)
                torch.cuda.set_rng_state(outer_device, device)

    def save(self, folder: Path, process: int, shared: bool) -> None:
        """Write the model and all that its training needs to go on; as for `CheckpointPart`."""
        if not shared:
            # Other processes see other batches, which take other numbers of random draws.
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"rng": self._rng, "device_rng": self._device_rng}, folder / _PROCESS.format(process))
            return
        self.model.save_pretrained(folder)
        scaler = self.accelerator.scaler
        torch.save(
            {
                "optimizer": self._optimizer.state_dict(),
                "scheduler": self._schedule.state_dict(),
                "rng": self._rng,
                "device_rng": self._device_rng,
                "scaler": None if scaler is None else scaler.state_dict(),
            },
            folder / _STATE,
        )

    def load_weights(self, folder: Path) -> None:
        """Read the weights that `save` wrote, and nothing else.

        Raises:
            ValueError: If they cannot be read.
        """
        with readable(folder, "teacher"):
            accept_saved_names_(self.model)
            load_model(self.model, folder / SAFE_WEIGHTS_NAME)

    def load(self, folder: Path, process: int) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: If it is not there, or cannot be read.
        """
        if not (folder / _STATE).exists():
            raise ValueError(f"resume_from_checkpoint must hold the teacher's state, got no {folder / _STATE}.")
        self.load_weights(folder)
        with readable(folder, "teacher"):
            state = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["scheduler"])
            # Checkpoints of earlier versions hold the first process's state alone.
            if process and (file := folder / _PROCESS.format(process)).exists():
                state |= torch.load(file, weights_only=True, map_location="cpu")
            # A generator refuses whatever is not its state.
            self._rng = torch.Generator().set_state(state["rng"]).get_state()
            self._device_rng = state["device_rng"]
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
