"""A Trainer whose evaluations average loss terms and measures, and count each row once."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from hf_compress.core.launcher import lost_process_named
from hf_compress.training.data_parallel import first_rows, real_rows
from hf_compress.training.loss_composer import LossComposer, batch_size_of
from hf_compress.training.resumable import ResumableTrainer


class EvaluatingTrainer(ResumableTrainer):
    """A `ResumableTrainer` whose evaluations give the averages of its loss terms, over each row once.

    What the terms are is its subclass's; see `CompressionTrainer`.
    """

    losses: LossComposer
    # Whether outputs are asked for that nobody reads: `Trainer` asks for them even where it keeps the loss alone.
    loss_alone = False

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
        self.loss_alone = prediction_loss_only
        try:
            return self._predict(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self.loss_alone = False

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
