"""The base class of our Trainers: named loss terms, extra parameter groups, and methods in training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from hf_compress.core.architectures import base_of
from hf_compress.core.errors import one_line
from hf_compress.core.forward_state import state_in
from hf_compress.training.data_parallel import mean_over_processes, require_one_device
from hf_compress.training.evaluation import EvaluatingTrainer
from hf_compress.training.loss_composer import LossComposer, batch_size_of
from hf_compress.training.methods_in_training import MethodsInTraining, logged_values, tell_of_model
from hf_compress.training.next_tokens import NextTokens
from hf_compress.training.outside_parameters import OutsideParameters
from hf_compress.training.own_loss import OwnLoss
from hf_compress.training.parameter_groups import add_groups_, clip_apart_, clipped_apart
from hf_compress.training.preflight import Preflight, check_training, missing_labels_named
from hf_compress.training.their_loss import TheirLoss


class CompressionTrainer(EvaluatingTrainer):
    """A `Trainer` whose loss is a sum of named terms, each logged as `loss/<term>`.

    Subclasses override `loss_terms`. Without that, it trains like `Trainer`, and saves so that a crash never leaves
    a directory that loads but is incomplete.
    """

    # The terms below are means over a micro-batch; without this, transformers does not divide them by the number
    # of accumulated micro-batches for models whose forward takes **kwargs.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._own_loss = OwnLoss(type(self), CompressionTrainer)
        self._their_loss = TheirLoss()
        if (given := kwargs.get("args", args[1] if len(args) > 1 else None)) is not None:
            check_training(given)
        # Before anything else sees the model: callbacks look for what the config asks for.
        self.methods = MethodsInTraining(kwargs.get("model", args[0] if args else None))
        self.losses = LossComposer()
        super().__init__(*args, **kwargs)
        if self.model is not self.methods.model:
            # Another trainer, from which a class derives too, has opened it by its name or put adapters around it.
            self.methods = MethodsInTraining(self.model)
        require_one_device(self.args.n_gpu)
        self.next_tokens = NextTokens(self, CompressionTrainer, self.model_accepts_loss_kwargs)
        # The same for releases before `loss_is_scaled_for_ga`, which ask the model's signature only.
        self.model_accepts_loss_kwargs = False
        self.outside = self.add_part(OutsideParameters(self.extra_parameter_groups))
        self.add_callback(Preflight(self, CompressionTrainer))

    def call_model_init(self, trial: Any = None) -> Any:
        model: Any = super().call_model_init(trial)
        earlier, self.methods = self.methods, MethodsInTraining(model)
        # The first one is for the constructor: callbacks see it when they are added.
        if getattr(self, "is_in_train", False):
            # A trial may prune in another way than the one before it.
            earlier.end(self)
            tell_of_model(self.callback_handler.callbacks, model)
            self.methods.begin(self)
            self.require_resumable(base_of(model))
        return model

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback; one that comes after the constructor prepares the model as one given to it does."""
        super().add_callback(callback)
        if self.model is not None:
            tell_of_model(self.callback_handler.callbacks[-1:], cast(PreTrainedModel, self.model))

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, which calls it when a trial of a search has drawn its arguments: they are checked."""
        check_training(self.args)
        super().create_accelerator_and_postprocess()

    def loss_terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """The weighted terms of the loss and the student's outputs.

        Args:
            model: The wrapped model; call it, never its `.module`.
            inputs: A prepared batch. Not to be changed.
        """
        if self.next_tokens.from_head(inputs):
            return self.next_tokens.terms(model, inputs)
        with missing_labels_named(inputs):
            loss, outputs = self._their_loss(super().compute_loss, model, self.next_tokens.inputs(inputs))
        return {"task": self.next_tokens.counted(loss, inputs)}, outputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of the loss terms.

        Args:
            model, inputs: As for `loss_terms`.
            return_outputs: Return the student's outputs, too.
            num_items_in_batch: Of a causal language model: the predicted tokens in the window, over all processes.
                Its losses on tokens are sums over this number, whatever the sizes of batches. Terms of other models
                share one normalisation, the mean of the micro-batch.

        Raises:
            ValueError: If the loss is NaN or infinite.
        """
        self._own_loss.computed()
        state = self.methods.forward_arguments()
        with self.tokens_of_window(num_items_in_batch, whole=return_outputs):
            terms, outputs = self.loss_terms(model, {**inputs, **state})
        if model.training:
            terms = {**terms, **self.methods.loss_terms(state_in(state))}
        self.losses.note(self.methods.measures(state_in(state)), model.training)
        loss = self.losses.total(terms, model.training, batch_size_of(inputs), self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._own_loss.required():
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            # In what was not logged yet, `Trainer` counts the rows of this process alone.
            logs["train_loss"] = mean_over_processes(self.accelerator, logs["train_loss"])
        if not self.losses.evaluating:
            logs.update(self.losses.logged(self.accelerator))
            # Loggers were registered before a user's callbacks: what those add in `on_log` would come too late.
            logs.update(logged_values(self.callback_handler.callbacks))
        self.losses.require_finite(logs, self.state.global_step)
        super().log(logs, start_time)

    def extra_parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters outside the model that the optimizer trains too."""
        return []

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        with one_line(f"optim is {OptimizerNames(self.args.optim).value}, which cannot be used", ImportError):
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if fresh:
            add_groups_(optimizer, self.methods.parameter_groups(), self.outside.joining(self))
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Private: `Trainer` has no public hook between the backward pass and the clipping.
        apart = clipped_apart(self.methods.parameter_groups())
        if not apart:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]  # of transformers
        return clip_apart_(self.accelerator, model, apart, self.args.max_grad_norm)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.model_init is None:
            # Otherwise the model is still to be made; between the trials of a search there is none.
            self.methods.begin(self)
        self.losses.begin_training()
        try:
            outcome = super().train(*args, **kwargs)
        finally:
            self.methods.end(self)
        # `log` has made it a mean over the processes.
        return outcome._replace(training_loss=outcome.metrics["train_loss"])

    def require_same_training(self, config: PretrainedConfig, saved: PretrainedConfig) -> None:
        self.methods.check_resume(saved)
