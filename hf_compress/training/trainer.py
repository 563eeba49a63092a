"""The Trainer below all of ours: named loss terms, extra parameter groups, what methods need in training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.training_args import OptimizerNames

from hf_compress.api import apply_implied, trainings_of
from hf_compress.core.architectures import base_of
from hf_compress.core.errors import one_line
from hf_compress.core.forward_state import carries_state, forward_state, state_in
from hf_compress.core.method_training import MethodCallback, MethodTraining, ParameterGroup
from hf_compress.core.record import quantized_by_another
from hf_compress.training.adapters import warn_of_unsaved_base
from hf_compress.training.averages import Averages
from hf_compress.training.extra_gradients import ExtraGradients
from hf_compress.training.overrides import report_other_loss, require_our_loss
from hf_compress.training.preflight import Preflight, check_training
from hf_compress.training.resumable import ResumableTrainer
from hf_compress.training.saved_names import accept_saved_names_


logger = logging.getLogger(__name__)


class CompressionTrainer(ResumableTrainer):
    """A `Trainer` whose loss is a sum of named terms, each logged as `loss/<term>`.

    Subclasses override `loss_terms`. Without that, it trains like `Trainer`, and saves so that a crash never leaves
    a directory that loads but is incomplete.
    """

    # The terms below are means over a micro-batch; without this, transformers does not divide them by the number
    # of accumulated micro-batches for models whose forward takes **kwargs.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._composed, self._warned = False, False
        require_our_loss(type(self), CompressionTrainer)
        if (given := kwargs.get("args", args[1] if len(args) > 1 else None)) is not None:
            check_training(given)
        # Before anything else sees the model: callbacks look for what the config asks for.
        self._method_callbacks: list[TrainerCallback] = []
        self._adopt(kwargs.get("model", args[0] if args else None))
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1 and isinstance(self._core(), PreTrainedModel) and carries_state(self._core()):
            raise ValueError(
                f"n_gpu must be 1 for a model that drops tokens, got {self.args.n_gpu} in one process: layers share "
                "what nn.DataParallel would leave on the first GPU. Start one process for each (torchrun "
                f"--nproc_per_node={self.args.n_gpu} ...) or set CUDA_VISIBLE_DEVICES to one."
            )
        # The same for releases before that attribute, which ask the model's signature only.
        self.model_accepts_loss_kwargs = False
        self.averages = {mode: Averages() for mode in ("train", "eval")}
        self._evaluates = False
        self.add_callback(
            ExtraGradients(lambda: [p for group in self.extra_parameter_groups() for p in group["params"]])
        )
        self.add_callback(Preflight(self, CompressionTrainer))

    def _adopt(self, model: Any) -> None:
        """Find out which methods made the model; flat fields written into its config by hand are applied first."""
        self._trainings: dict[str, MethodTraining] = {}
        core = base_of(model)
        if isinstance(core, PreTrainedModel) and not quantized_by_another(apply_implied(core).config):
            self._trainings = trainings_of(core)

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        self._adopt(model)
        if not getattr(self, "is_in_train", False):
            # The first one, for the constructor: callbacks see it when they are added.
            return model
        # A model for every trial: what was prepared when the trainer was made is to be prepared again.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MethodCallback):
                callback.on_new_model(model)
        self._start_training(model)
        self.require_resumable(base_of(model))
        return model

    def add_callback(self, callback: Any) -> None:
        """Add a callback; one that comes after the constructor prepares the model as one given to it does."""
        super().add_callback(callback)
        added = self.callback_handler.callbacks[-1]
        if self.model is not None and isinstance(added, MethodCallback):
            added.on_new_model(self.model)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        # Which errors its client raises depends on its release.
        with one_line("push_to_hub is set, but the hub cannot be used", Exception):
            super().init_hf_repo(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, which calls it when a trial of a search has drawn its arguments: they are checked."""
        check_training(self.args)
        super().create_accelerator_and_postprocess()

    def _start_training(self, model: Any) -> None:
        core = base_of(model)
        accept_saved_names_(core)
        if hasattr(model, "peft_config"):
            warn_of_unsaved_base(model, core)
        # A trial may prune in another way than the one before it.
        self._remove_method_callbacks()
        for name, training in self._trainings.items():
            for callback in training.callbacks(self.callback_handler.callbacks):
                self.add_callback(callback)
                self._method_callbacks.append(callback)
            training.begin()
            if core is not model and training.parameter_groups():
                raise ValueError(
                    f"A model with adapters must have {name} finished, got one whose {name} is still "
                    "to be learned: an adapter would not save it. Train it without adapters first."
                )

    def _remove_method_callbacks(self) -> None:
        while self._method_callbacks:
            self.remove_callback(self._method_callbacks.pop())

    def loss_terms(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """The weighted terms of the loss and the student's outputs.

        Args:
            model: The wrapped model; call it, never its `.module`.
            inputs: A prepared batch. Not to be changed.
        """
        try:
            loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        except ValueError as error:
            if "did not return a loss" not in str(error):
                raise
            raise ValueError(
                f"The model gave no loss: its batches hold {', '.join(inputs)} and no labels. Name their column "
                "'label' or 'labels' in the data set; columns of other names are dropped."
            ) from error
        return {"task": loss}, outputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of the loss terms.

        `num_items_in_batch` is not handed on: the terms must share one normalisation, the mean of the micro-batch.

        Raises:
            ValueError: If the loss is NaN or infinite.
        """
        self._composed = True
        # All of the last layer in evaluation too: what the head does not read is not the method's merit.
        added = forward_state(self._core()) if self._trainings else {}
        terms, outputs = self.loss_terms(model, {**inputs, **added})
        state = state_in(added)
        seen = self.averages["train" if model.training else "eval"]
        measure_prefix = "prune/" if model.training else ""
        for training in self._trainings.values():
            if model.training:
                terms = {**terms, **training.loss_terms(state)}
            for name, parts in training.measures(state).items():
                seen.add_quotient(f"{measure_prefix}{name}", *parts)
        loss = torch.stack(list(terms.values())).sum()
        # On an accelerator this would wait for the device at every step; there `log` checks the averages.
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            self._not_finite({name: float(value.detach()) for name, value in terms.items()})
        if model.training or len(terms) > 1:
            # As `Trainer` weighs losses: steps of a training alike, batches of an evaluation by their examples.
            weight = 1 if model.training else find_batch_size(inputs) or 1
            for name, value in terms.items():
                seen.add(f"loss/{name}", value, weight)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._composed = False
        loss = super().training_step(*args, **kwargs)
        if not self._composed and not self._warned:
            self._warned = True
            report_other_loss(type(self), CompressionTrainer)
        return loss

    def _not_finite(self, terms: Mapping[str, float]) -> None:
        listed = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        raise ValueError(
            f"The loss must be finite, got {listed} at step {self.state.global_step}. "
            "Lower learning_rate, check the data, or train in fp32 or bf16 instead of fp16."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self._evaluates:
            logs.update(self.averages["train"].take(self.accelerator))
            # Loggers were registered before a user's callbacks: what those add in `on_log` would come too late.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, MethodCallback):
                    logs.update(callback.logged_values())
        terms = {key.rpartition("/")[2]: value for key, value in logs.items() if "loss/" in key}
        if any(not torch.isfinite(torch.tensor(value)) for value in terms.values()):
            self._not_finite(terms)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; loss terms and measures come under the prefix of this evaluation."""
        self._evaluates = True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._evaluates = False

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Every evaluation and prediction has its own averages of loss terms and measures among its metrics."""
        self.averages["eval"].clear()
        # Reading batches draws random numbers. Training must not depend on it: resumed after the last update of an
        # epoch, it does not repeat the evaluation that followed.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        found = self.averages["eval"].take(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def extra_parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters outside the model that the optimizer shall also train."""
        return []

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        with one_line(f"optim is {OptimizerNames(self.args.optim).value}, which cannot be used", ImportError):
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if fresh:
            for group in self._separate_groups():
                apart = {id(parameter) for parameter in group.params}
                for existing in optimizer.param_groups:
                    existing["params"] = [p for p in existing["params"] if id(p) not in apart]
                optimizer.add_param_group(group.for_optimizer())
            for extra in self.extra_parameter_groups():
                optimizer.add_param_group(extra)
        return optimizer

    def _separate_groups(self) -> list[ParameterGroup]:
        return [group for training in self._trainings.values() for group in training.parameter_groups()]

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        # One norm over weights and thresholds would shrink the gradients of both by the larger kind.
        groups = [group for group in self._separate_groups() if group.clipped_apart]
        if not groups or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        apart = [parameter for group in groups for parameter in group.params]
        others = {id(parameter) for parameter in apart}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in others]
        # The first call divides all gradients by the scale of fp16, which must not happen twice.
        norm = self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm)
        torch.nn.utils.clip_grad_norm_(apart, self.args.max_grad_norm)
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.model_init is None:
            # Otherwise the model is still to be made; between the trials of a search there is none.
            self._start_training(self.accelerator.unwrap_model(self.model))
        # A trial that was given up leaves its averages.
        self.averages["train"].clear()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._remove_method_callbacks()

    def require_same_training(self, config: PretrainedConfig, saved: PretrainedConfig) -> None:
        for training in self._trainings.values():
            training.check_resume(saved)
