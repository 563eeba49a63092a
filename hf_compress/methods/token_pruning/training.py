"""Token pruning in training: phases, the optimizer group of the thresholds, the regulariser, measured arithmetic.

A training has a soft phase, in which thresholds learn, and a hard phase, in which they are frozen and tokens really
disappear. The model's config names the phase as `masking_mode`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_compress.core.forward_state import ForwardState
from hf_compress.core.method_training import MethodCallback, MethodTraining, ParameterGroup
from hf_compress.methods.token_pruning.config import TokenPruningConfig
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.measures import regularizer, relative_cost
from hf_compress.methods.token_pruning.modeling import required_thresholds, thresholds_of


logger = logging.getLogger(__name__)


def implied(config: PretrainedConfig) -> TokenPruningConfig | None:
    """Read the settings that a user wrote into `config.json` by hand, as in the published workflow."""
    if getattr(config, "prune_mode", None) is None:
        return None
    values = {name: getattr(config, name) for name in TokenPruningConfig.flat if hasattr(config, name)}
    # transformers treats this name as a setting of text generation and refuses to save a config that has it.
    if "temperature" in config.__dict__:
        values["temperature"] = config.__dict__.pop("temperature")
    return TokenPruningConfig(**values)


class SteeringCallback(MethodCallback):
    """A callback that sets the weight of the regulariser."""


class _UnsteeredWarning(TrainerCallback):
    """Warns once when thresholds learn without a regulariser."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Only now: the weight may have come from a checkpoint.
        model: PreTrainedModel = kwargs["model"]
        thresholds = thresholds_of(model)
        if thresholds is not None and model.config.masking_mode == "soft" and not thresholds.weight:
            logger.warning(
                "Thresholds are in their soft phase, but lambda is 0: nothing pushes tokens out. Add "
                "ThresholdAnnealingCallback() to the callbacks, or set masking_mode to 'hard' to train under pruning."
            )


class TokenPruningTraining(MethodTraining):
    """The phases and thresholds of one model in one training.

    Callbacks find the object of their model with `training_of`, also in a plain `Trainer`, which makes none.

    Attributes:
        thresholds: The thresholds of the model; None with `topk`.
        soft_fraction: Fraction of the updates that belong to the soft phase; None in trainings that do not switch.
        learning_rate: Learning rate of the thresholds. None: that of the weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.thresholds = thresholds_of(model)
        self.soft_fraction: float | None = None
        self.learning_rate: float | None = None
        self._attach()

    def _attach(self) -> None:
        if self.thresholds is not None:
            self.thresholds.session = self

    @property
    def phase(self) -> Literal["soft", "hard"]:
        phase: Literal["soft", "hard"] = self.model.config.masking_mode
        return phase

    def begin(self) -> None:
        """Freeze the thresholds if the whole training is hard, and record the kind of training."""
        self._attach()
        # The config may name the phase of the training that the weights come from.
        self._mark("switching" if self.soft_fraction is not None else self.phase)

    def _mark(self, kind: Literal["soft", "hard", "switching"]) -> None:
        self.model.config.token_prune_stage = kind
        if self.thresholds is not None:
            self.thresholds.values.requires_grad_(kind != "hard")

    def switch_after(self, soft_fraction: float) -> None:
        """Plan a soft phase and then a hard one.

        Args:
            soft_fraction: Fraction of the updates in the soft phase, between 0 and 1.
        """
        self.soft_fraction = soft_fraction
        self._mark("switching")

    def enter(self, phase: Literal["soft", "hard"]) -> None:
        """Continue the training in a phase."""
        self.model.config.masking_mode = phase

    def end_switching(self) -> None:
        """Record the phase in which a training that switches has ended, perhaps before the switch."""
        self.model.config.token_prune_stage = self.phase
        self.soft_fraction = None

    def anneal(self, start: float, end: float, done: float) -> None:
        """Set the temperature that a geometric schedule over the soft phase has reached.

        Args:
            start, end: First and last value of the schedule.
            done: Finished fraction of the training.
        """
        soft = 1.0 if self.soft_fraction is None else self.soft_fraction
        if self.thresholds is not None:
            self.thresholds.temperature = start * (end / start) ** min(1.0, done / soft)

    def callbacks(self, present: Sequence[TrainerCallback]) -> list[TrainerCallback]:
        steered = any(isinstance(callback, SteeringCallback) for callback in present)
        return [] if steered else [_UnsteeredWarning()]

    def loss_terms(self, state: ForwardState | None) -> dict[str, Tensor]:
        if self.thresholds is None or not isinstance(state, LiveTokens) or not state.soft:
            return {}
        return {"threshold": self.thresholds.weight * regularizer(state)}

    def measures(self, state: ForwardState | None) -> dict[str, tuple[Tensor, Tensor]]:
        return relative_cost(self.model, state) if isinstance(state, LiveTokens) else {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The thresholds: no weight decay, a learning rate of their own where one is set.

        With `compat="ltp"`, one norm clips their gradients and the weights'.
        """
        if self.thresholds is None or not self.thresholds.values.requires_grad:
            return []
        options: dict[str, Any] = {"weight_decay": 0.0}
        if self.learning_rate is not None:
            options["lr"] = self.learning_rate
        return [ParameterGroup([self.thresholds.values], options, clipped_apart=not self.thresholds.published)]

    def check_resume(self, checkpoint: PretrainedConfig) -> None:
        """Refuse to resume with the optimizer and the number of updates of another kind of training.

        Raises:
            ValueError: If the checkpoint belongs to the other phase, or to a training that switches while this one
                does not.
        """
        kind, config = getattr(checkpoint, "token_prune_stage", None), self.model.config
        # A training that switches is in both phases: its callback knows which.
        if kind in (None, self.phase, config.token_prune_stage):
            return
        found, remedy = f"one of the {kind} phase", "Open it"
        if kind == "switching":
            found = "one of a training that switches phases"
            remedy = "Construct a trainer with that training's StageSwitchCallback (--soft_fraction), or open it"
        raise ValueError(
            f"resume_from_checkpoint must be of the {self.phase} phase, got {found}. {remedy} with "
            "from_pretrained and call train() without resume_from_checkpoint, into another output_dir."
        )


def training_of(model: PreTrainedModel, asking: str) -> TokenPruningTraining:
    """Find the training of a model with thresholds; make one if no trainer of this package has.

    Args:
        model: The model to train.
        asking: The class that needs thresholds, for the message.

    Raises:
        ValueError: If the model has none.
    """
    return required_thresholds(model, asking).session or TokenPruningTraining(model)
