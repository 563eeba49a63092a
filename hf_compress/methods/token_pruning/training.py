"""What token pruning does in training: phases, the thresholds' optimizer group, the regulariser, measured arithmetic.

A training has a soft phase, in which thresholds learn, and a hard phase, in which they are frozen and tokens really
disappear. Which one it is stands in the model's config as `masking_mode`.
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
    """The settings that somebody wrote into `config.json` by hand, as the published workflow does."""
    if getattr(config, "prune_mode", None) is None:
        return None
    values = {name: getattr(config, name) for name in TokenPruningConfig.flat if hasattr(config, name)}
    # transformers takes this name for a setting of text generation and refuses to save a config that has it.
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
    """All that the training of one model knows about its phases and thresholds.

    Callbacks find the one of the model that they see with `training_of`: also in a plain `Trainer`, which makes none.

    Attributes:
        thresholds: Of the model; None under `topk`.
        soft_fraction: Fraction of the updates that belong to the soft phase; None in trainings that do not switch.
        learning_rate: Of the thresholds; None: that of the weights.
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
        """Freeze the thresholds where all of the training is hard, and note down what kind of training it is."""
        self._attach()
        # What the config says may be of the training that the weights come from.
        self._mark("switching" if self.soft_fraction is not None else self.phase)

    def _mark(self, kind: Literal["soft", "hard", "switching"]) -> None:
        self.model.config.token_prune_stage = kind
        if self.thresholds is not None:
            self.thresholds.values.requires_grad_(kind != "hard")

    def switch_after(self, soft_fraction: float) -> None:
        """Plan a soft phase, followed by a hard one.

        Args:
            soft_fraction: Of the updates, between 0 and 1.
        """
        self.soft_fraction = soft_fraction
        self._mark("switching")

    def enter(self, phase: Literal["soft", "hard"]) -> None:
        """Go on in a phase."""
        self.model.config.masking_mode = phase

    def end_switching(self) -> None:
        """Note down the phase in which a training that switches has ended, perhaps before the switch."""
        self.model.config.token_prune_stage = self.phase
        self.soft_fraction = None

    def anneal(self, start: float, end: float, done: float) -> None:
        """Set the temperature that a geometric schedule over the soft phase has reached.

        Args:
            start, end: Of the schedule.
            done: Fraction of the training that is over.
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
        """Refuse to go on with the optimizer and the number of updates of another kind of training.

        Raises:
            ValueError: If the checkpoint is of the other phase, or of a training that switches and this one does not.
        """
        kind, config = getattr(checkpoint, "token_prune_stage", None), self.model.config
        # A training that switches is in both phases: its callback knows which.
        if kind in (None, self.phase, config.token_prune_stage):
            return
        found, remedy = f"one of the {kind} stage", "Open it"
        if kind == "switching":
            found = "one of a training that switches stages"
            remedy = "Construct a trainer with that training's StageSwitchCallback (--soft_fraction), or open it"
        raise ValueError(
            f"resume_from_checkpoint must be of the {self.phase} stage, got {found}. {remedy} with "
            "from_pretrained and call train() without resume_from_checkpoint, into another output_dir."
        )


def training_of(model: PreTrainedModel, asking: str) -> TokenPruningTraining:
    """The training of a model with thresholds; a new one where no trainer of this package has made any.

    Args:
        model: Being trained.
        asking: The class that needs thresholds, for the message.

    Raises:
        ValueError: If the model has none.
    """
    return required_thresholds(model, asking).session or TokenPruningTraining(model)
