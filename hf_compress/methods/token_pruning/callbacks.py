"""Callbacks that control token pruning during a training: temperature, regulariser, phases."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from hf_compress.core.method_training import MethodCallback
from hf_compress.methods.token_pruning.control import relative_macs, scale_thresholds
from hf_compress.methods.token_pruning.modeling import required_thresholds
from hf_compress.methods.token_pruning.rule import TokenThresholds
from hf_compress.methods.token_pruning.training import SteeringCallback, TokenPruningTraining, training_of


logger = logging.getLogger(__name__)


class ThresholdAnnealingCallback(SteeringCallback):
    """Anneals the temperature, warms lambda up, and adjusts the thresholds to a target for the arithmetic.

    Works with any `Trainer` on a model with `TokenPruningConfig(masking_mode="soft")`. The regulariser itself is added
    to the loss by the trainers of this package; a plain `Trainer` learns thresholds from the task alone.

    Args:
        temperature_start, temperature_end: First and last value of a geometric schedule over the soft phase, which
            ends at the switch of a `StageSwitchCallback` or with the training. None keeps the config's temperature.
        lambda_threshold: Weight of the regulariser.
        lambda_warmup: Fraction of the training over which it rises from 0.
        target_relative_macs: Fraction of the multiply-accumulates to keep, in (0, 1]. At every measurement in both
            phases, and at the end of the training, all thresholds are multiplied by one factor that reaches the
            target (unless the distance is at most 0.01), so training only learns the ratios between the layers. In
            the soft phase a proportional-integral controller also changes lambda, on top of `lambda_threshold`,
            until the factor has nothing to correct; lambda may become negative. In the hard phase the thresholds
            keep their ratios, for instance those of the initial ramp.
        gain: Proportional gain of the controller: lambda for a distance of 1 to the target.
        integral_gain: Weight of a measured distance in the controller's integral.
        measure_every: Updates between measurements.
        measure_examples: Number of training examples to measure on; always the same ones, spread evenly over the set.
        learning_rate: Learning rate of the thresholds. None: that of the weights.

    Raises:
        ValueError: Names the field, the rule and the value.

    Example:
        >>> ThresholdAnnealingCallback(target_relative_macs=2.0)
        Traceback (most recent call last):
            ...
        ValueError: target_relative_macs must be in (0, 1], got 2.0.
    """

    def __init__(
        self,
        temperature_start: float | None = None,
        temperature_end: float | None = None,
        lambda_threshold: float = 0.1,
        lambda_warmup: float = 0.0,
        target_relative_macs: float | None = None,
        gain: float = 2.0,
        integral_gain: float = 0.05,
        measure_every: int = 10,
        measure_examples: int = 64,
        learning_rate: float | None = None,
    ) -> None:
        for name, value in (("temperature_start", temperature_start), ("temperature_end", temperature_end)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, got {value}.")
        if (temperature_start is None) != (temperature_end is None):
            raise ValueError(
                "temperature_start and temperature_end must be given together, "
                f"got {temperature_start} and {temperature_end}."
            )
        if not 0 <= lambda_threshold < float("inf"):
            raise ValueError(f"lambda_threshold must not be negative, got {lambda_threshold}.")
        if not 0 <= lambda_warmup < 1:
            raise ValueError(f"lambda_warmup must be in [0, 1), got {lambda_warmup}.")
        if learning_rate is not None and not 0 <= learning_rate < float("inf"):
            raise ValueError(f"learning_rate must not be negative, got {learning_rate}.")
        if target_relative_macs is not None and not 0 < target_relative_macs <= 1:
            raise ValueError(f"target_relative_macs must be in (0, 1], got {target_relative_macs}.")
        for name, value in (("measure_every", measure_every), ("measure_examples", measure_examples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.temperatures: tuple[float, float] | None = None
        if temperature_start is not None and temperature_end is not None:
            self.temperatures = (temperature_start, temperature_end)
        self.lambda_threshold = lambda_threshold
        self.lambda_warmup = lambda_warmup
        self.target_relative_macs = target_relative_macs
        self.gain = gain
        self.integral_gain = integral_gain
        self.measure_every = measure_every
        self.measure_examples = measure_examples
        self.learning_rate = learning_rate
        self._probe: dict[str, Any] | None = None
        self._thresholds: TokenThresholds | None = None

    def on_new_model(self, model: PreTrainedModel) -> None:
        self._training(model).learning_rate = self.learning_rate

    def _training(self, model: PreTrainedModel) -> TokenPruningTraining:
        return training_of(model, type(self).__name__)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        thresholds = self._thresholds = required_thresholds(kwargs["model"], type(self).__name__)
        if self.learning_rate is not None:
            groups = getattr(kwargs.get("optimizer"), "param_groups", [])
            own = [g for g in groups if any(p is thresholds.values for p in g["params"])]
            # A scheduler that waits for a plateau stores no first rate, and after a resume the rate may be lower.
            rates = [g.get("initial_lr", self.learning_rate if state.global_step else g["lr"]) for g in own]
            if rates != [self.learning_rate]:
                raise ValueError(
                    "learning_rate must be given to the constructor of a trainer of this package "
                    f"(callbacks=[ThresholdAnnealingCallback(...)]); here the thresholds are trained with {rates}."
                )
        if self.target_relative_macs is not None:
            loader = kwargs["train_dataloader"]
            if isinstance(loader.dataset, IterableDataset):
                raise ValueError(
                    "target_relative_macs needs a training set with a length to measure on, got a streaming "
                    f"{type(loader.dataset).__name__}. Leave it out and choose lambda_threshold."
                )
            size = len(loader.dataset)
            count = min(self.measure_examples, size)
            # Evenly spread: files are often sorted by label.
            self._probe = dict(loader.collate_fn([loader.dataset[i * size // count] for i in range(count)]))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, done = kwargs["model"], state.global_step / max(1, state.max_steps)
        thresholds, training = required_thresholds(model, type(self).__name__), self._training(model)
        if self.temperatures is not None:
            training.anneal(*self.temperatures, done)
        warm = min(1.0, done / self.lambda_warmup) if self.lambda_warmup else 1.0
        if self.target_relative_macs is None:
            thresholds.weight.fill_(warm * self.lambda_threshold)
            return
        if state.global_step % self.measure_every:
            return
        measured = None
        if training.phase == "soft":
            measured = relative_macs(model, self._probe or {})
            distance = measured - self.target_relative_macs
            # Both are buffers of the model, so that a resumed training continues with the same controller.
            thresholds.integral += self.integral_gain * distance
            steered = self.lambda_threshold + self.gain * distance + float(thresholds.integral)
            thresholds.weight.fill_(warm * steered)
        self._scale(model, state.global_step, measured)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._scale(kwargs["model"], state.global_step)

    def _scale(self, model: PreTrainedModel, step: int, measured: float | None = None) -> None:
        if self.target_relative_macs is None or self._probe is None:
            return
        factor = scale_thresholds(model, self._probe, self.target_relative_macs, measured=measured)
        if factor != 1:
            logger.info("Update %d: all thresholds times %.4f.", step, factor)

    def logged_values(self) -> dict[str, float]:
        if self._thresholds is None or not self._thresholds.values.requires_grad:
            return {}
        return {"prune/lambda": round(float(self._thresholds.weight), 6)}


class StageSwitchCallback(MethodCallback):
    """Switches from the soft to the hard phase during a training: thresholds freeze, and tokens are really dropped.

    Args:
        fraction: Fraction of the updates that belong to the soft phase, between 0 and 1.

    Source:
        The "mixed" mode that LTP's code names but does not have.
    """

    def __init__(self, fraction: float = 0.5) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
        self.fraction = fraction

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_new_model(kwargs["model"])

    def on_new_model(self, model: PreTrainedModel) -> None:
        # Before the optimizer is made, so that it holds the thresholds even if a run resumes in its hard phase.
        self._training(model).switch_after(self.fraction)

    def _training(self, model: PreTrainedModel) -> TokenPruningTraining:
        return training_of(model, type(self).__name__)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        switch = math.ceil(self.fraction * state.max_steps)
        # Not whenever the mode changes: a training that resumes after the switch begins with a soft model too.
        if state.global_step == switch:
            logger.info("Update %d: the hard phase begins.", state.global_step)
            # In the soft phase, models were measured with thresholds that were still changing.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self._training(kwargs["model"]).enter("soft" if state.global_step < switch else "hard")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training(kwargs["model"]).end_switching()
