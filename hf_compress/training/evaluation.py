"""A Trainer that counts alike: each row once in an evaluation, each predicted token in a training."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_compress.core.launcher import lost_process_named
from hf_compress.training.data_parallel import first_rows, real_rows
from hf_compress.training.loss_composer import LossComposer, batch_size_of
from hf_compress.training.next_tokens import NextTokens
from hf_compress.training.resumable import ResumableTrainer


class EvaluatingTrainer(ResumableTrainer):
    """A `ResumableTrainer` whose evaluations give the averages of its loss terms, over each row once.

    Its trainings count the tokens that a causal language model predicts. What the terms are is its subclass's; see
    `CompressionTrainer`.
    """

    losses: LossComposer
    next_tokens: NextTokens
    # Whether outputs are asked for that nobody reads: `Trainer` asks for them even where it keeps the loss alone.
    _loss_alone = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, number = super().get_batch_samples(*args, **kwargs)
        counted = self.next_tokens.in_window(samples)
        return samples, number if counted is None else counted

    def tokens_of_window(self, number: Tensor | int | None, whole: bool = True) -> AbstractContextManager[None]:
        """Inside the block, losses on tokens are counted over a window.

        Args:
            number: The predicted tokens of the window, over all processes; None: a micro-batch counts by itself.
            whole: Whether the student's outputs are asked for, too.
        """
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return self.next_tokens.asked(whole and not self._loss_alone, number, steps)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; loss terms and measures come under the prefix of this evaluation."""
        with self.losses.evaluation():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Every evaluation and prediction has its own averages of loss terms and measures among its metrics."""
        self.losses.begin_evaluation()
        # Reading batches draws random numbers. Training must not depend on it: resumed after the last update of an
        # epoch, it does not repeat the evaluation that followed.
        with lost_process_named(self.args.world_size), torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        cast("dict[str, float]", output.metrics).update(self.losses.evaluated(self.accelerator, metric_key_prefix))
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As `Trainer.prediction_step`; rows that only fill up the last batches of several processes do not count."""
        self._loss_alone = prediction_loss_only
        try:
            return self._predict(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._loss_alone = False

    def _predict(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        size = batch_size_of(inputs)
        real = real_rows(self.accelerator, size)
        if real is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with self.losses.uncounted():
            loss, *others = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            # Where no row counts, too: a model in shards runs in all processes or in none.
            prepared = self._prepare_inputs(first_rows(inputs, real or 1, size))
            counting = contextlib.nullcontext() if real else self.losses.uncounted()
            with counting, torch.no_grad(), self.compute_loss_context_manager():
                counted: Any = self.compute_loss(model, prepared)
            loss = counted.detach() if real else loss
        return loss, *others
