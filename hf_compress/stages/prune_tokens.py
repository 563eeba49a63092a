"""Trains a classifier that drops tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PretrainedConfig, TrainerCallback, TrainingArguments

from hf_compress.api import compress, steps_of
from hf_compress.methods.token_pruning import TokenPruningConfig
from hf_compress.methods.token_pruning.callbacks import StageSwitchCallback, ThresholdAnnealingCallback
from hf_compress.stages.arguments import DeviceArguments, OptionalTeacherArguments, StageArguments
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.stages.training import add_teacher_columns, prepare, run_training, trainer_arguments
from hf_compress.tasks.arguments import DataArguments
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.distillation import DistillationTrainer


# What `compat="ltp"` makes of settings that were left out: the published soft stage is a training of its own, with a
# temperature and a lambda that stay as they are.
_PUBLISHED = {"soft_fraction": 1.0, "temperature_start": 1e-3, "temperature_end": 1e-3, "lambda_warmup": 0.0}


@dataclass
class TokenPruningArguments:
    """How tokens are pruned and how the thresholds are found.

    Args:
        prune_mode: How tokens are chosen. `absolute_threshold`: a token whose importance is below the layer's
            threshold is dropped; `topk`: a fixed fraction of the most important ones stays. A model that prunes tokens
            already keeps this and the next five settings and refuses others.
        final_token_threshold: Threshold of the last layer before training; those of earlier layers rise to it
            linearly.
        token_keep_rate: Fraction of the tokens that the last layer keeps under `topk`; at most 1.
        threshold_ramp: Where the ramp of thresholds starts. `zero_based`: layer 0 never prunes; `one_based`: it does.
        score_norm: What importance is divided by. `reference`: by `score_reference_length`; `live`: by the number of
            tokens still there; `initial`: by the number of tokens at the start.
        score_reference_length: Length in tokens that importance is divided by under `score_norm=reference`.
        soft_fraction: Fraction of the updates that learn thresholds; the others train with real pruning. 0: thresholds
            keep their ratios (`topk` has none). Thresholds that went through a hard phase are fixed.
        temperature_start: Width of the soft decision at the first update, in units of importance.
        temperature_end: Width of the soft decision when the hard phase begins, in units of importance.
        lambda_threshold: Weight of the regulariser that pushes thresholds up, that is towards fewer tokens.
        lambda_warmup: Fraction of the training over which that weight rises from 0.
        target_relative_macs: Target for the fraction of the dense model's arithmetic. Left out: the regulariser alone
            decides.
        threshold_learning_rate: Learning rate of the thresholds. Left out: that of the weights.
        alpha_output: Weight of the distillation of the teacher's outputs beside the task loss.
        compat: `ltp` trains as the published code of LTP does: the first token may be dropped, padding counts in the
            regulariser, one norm clips everything. Where they are left out, `soft_fraction` is 1 (all updates learn
            thresholds; a second run from the result, with 0, is the hard phase), both temperatures are 0.001,
            `lambda_warmup`, `warmup_steps` and `weight_decay` are 0, and batches are drawn at random.
    """

    prune_mode: str = "absolute_threshold"
    final_token_threshold: float = 0.01
    token_keep_rate: float = 1.0
    threshold_ramp: str = "zero_based"
    score_norm: str = "reference"
    score_reference_length: int = 128
    soft_fraction: float = 0.5
    temperature_start: float = 2e-3
    temperature_end: float = 1e-4
    lambda_threshold: float = 0.1
    lambda_warmup: float = 0.1
    target_relative_macs: float | None = None
    threshold_learning_rate: float | None = None
    alpha_output: float = 1.0
    compat: Literal["ltp"] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.soft_fraction < 1 and not (self.compat and self.soft_fraction == 1):
            raise ValueError(f"soft_fraction must be in [0, 1), got {self.soft_fraction}.")
        for name in ("temperature_start", "temperature_end"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.threshold_learning_rate is not None and not 0 <= self.threshold_learning_rate < float("inf"):
            raise ValueError(f"threshold_learning_rate must not be negative, got {self.threshold_learning_rate}.")

    def config(self) -> TokenPruningConfig:
        """What the model shall be."""
        names = [f.name for f in dataclasses.fields(TokenPruningConfig) if hasattr(self, f.name)]
        return TokenPruningConfig(**{name: getattr(self, name) for name in names}, temperature=self.temperature_start)


@dataclass(frozen=True, kw_only=True)
class PruneTokens(StageArguments):
    """What `prune_tokens` takes.

    Args:
        model: The fine-tuned dense model, or one that prunes tokens already.
        pruning: What to prune and how to learn it.
        teacher: Usually the dense model, whose outputs are then distilled in both phases.
        data: The task.
        device: Where the training runs.
        training: As for `transformers.Trainer`.
    """

    model: ModelArguments
    pruning: TokenPruningArguments
    teacher: OptionalTeacherArguments = field(default_factory=OptionalTeacherArguments)
    data: DataArguments
    device: DeviceArguments = DeviceArguments()
    training: TrainingArguments


def _as_published(pruning: TokenPruningArguments, chosen: Set[str]) -> TokenPruningArguments:
    """The settings with what `compat` makes of those that were left out."""
    if pruning.compat is None:
        return pruning
    if "soft_fraction" in chosen and pruning.soft_fraction not in (0, 1):
        raise ValueError(
            f"soft_fraction must be 0 or 1 with compat={pruning.compat!r}, whose stages are trainings of their own, "
            f"got {pruning.soft_fraction}."
        )
    published: dict[str, Any] = {name: value for name, value in _PUBLISHED.items() if name not in chosen}
    return dataclasses.replace(pruning, **published)


def _require_same(config: PretrainedConfig, pruning: TokenPruningArguments, chosen: Set[str]) -> None:
    for name in TokenPruningConfig.flat:
        if name in chosen and getattr(pruning, name) != getattr(config, name):
            raise ValueError(
                f"{name} must be {getattr(config, name)!r} or left out for a model that prunes tokens already, got "
                f"{getattr(pruning, name)!r}."
            )


def _begin_phase(config: PretrainedConfig, pruning: TokenPruningArguments) -> bool:
    """Write down the phase that training begins with; returns whether thresholds are learned."""
    if pruning.soft_fraction == 0:
        config.masking_mode = "hard"
    elif config.prune_mode == "absolute_threshold" and config.token_prune_stage is None:
        config.masking_mode = "soft"
    return bool(config.masking_mode == "soft")


def _require_effect(config: PretrainedConfig, arguments: PruneTokens, learns: bool) -> None:
    """Refuse written settings that would change nothing."""
    pruning, chosen = arguments.pruning, arguments.chosen()
    learning = (
        "learned thresholds (prune_mode='absolute_threshold', soft_fraction above 0, a model whose thresholds are not "
        "fixed yet)"
    )
    steering = ("lambda_threshold", "lambda_warmup", "temperature_start", "temperature_end", "threshold_learning_rate")
    ramp = ("final_token_threshold", "threshold_ramp", "target_relative_macs")
    rules = [
        (steering, learns, learning),
        (("soft_fraction",), learns or pruning.soft_fraction == 0, learning),
        (ramp, config.prune_mode == "absolute_threshold", "prune_mode='absolute_threshold'"),
        (("token_keep_rate",), config.prune_mode == "topk", "prune_mode='topk'"),
        (("alpha_output",), arguments.teacher.teacher_name_or_path is not None, "teacher_name_or_path"),
        (("score_reference_length",), config.score_norm == "reference" or pruning.compat, "score_norm='reference'"),
    ]
    for names, effective, needs in rules:
        for name in names:
            if not effective and name in chosen:
                raise ValueError(f"{name} must go with {needs}, got {getattr(pruning, name)}.")


def prune_tokens(arguments: PruneTokens) -> dict[str, Any]:
    """Let a fine-tuned model drop tokens, learn the thresholds, train on under real pruning, and save it.

    A setting that contradicts the model or would change nothing is refused when the user wrote it, and ignored
    otherwise.

    Returns:
        Metrics of the validation split, `eval_relative_macs` among them, and the training time in seconds.

    Raises:
        ValueError: If the model cannot drop tokens or does not fit the data.
    """
    args, pruning, chosen = arguments.training, arguments.pruning, arguments.chosen()
    teacher_name = arguments.teacher.teacher_name_or_path
    if teacher_name is not None and pruning.alpha_output == 0:
        raise ValueError("alpha_output must be above 0 with teacher_name_or_path: it would teach nothing.")
    task, tokenizer, model, rows = prepare(arguments.model, arguments.data, args.seed)
    pruning = _as_published(pruning, chosen)
    recorded = [step for step in steps_of(model) if step["method"] == "token_pruning"]
    if recorded:
        _require_same(model.config, pruning, chosen)
        if pruning.compat != recorded[0].get("compat") and "compat" in chosen:
            raise ValueError(
                f"compat must be {recorded[0].get('compat')!r} or left out for a model that prunes tokens already, "
                f"got {pruning.compat!r}."
            )
    else:
        compress(model, pruning.config())
    learns = _begin_phase(model.config, pruning)
    _require_effect(model.config, arguments, learns)
    shared = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(args) if entry.init}
    distillation = DistillationArguments(**shared, alpha_output=0.0 if teacher_name is None else pruning.alpha_output)
    common = trainer_arguments(task, model, tokenizer, distillation, rows)
    teacher = None
    if teacher_name is not None:
        teacher = open_model(teacher_name, task)
        add_teacher_columns(common, task, arguments.data, teacher_name)
    callbacks: list[TrainerCallback] = common["callbacks"]
    if learns or pruning.target_relative_macs is not None:
        callbacks.append(
            ThresholdAnnealingCallback(
                temperature_start=pruning.temperature_start,
                temperature_end=pruning.temperature_end,
                lambda_threshold=pruning.lambda_threshold,
                lambda_warmup=pruning.lambda_warmup,
                target_relative_macs=pruning.target_relative_macs,
                learning_rate=pruning.threshold_learning_rate,
            )
        )
    if learns and pruning.soft_fraction < 1:
        callbacks.append(StageSwitchCallback(pruning.soft_fraction))
    trainer = DistillationTrainer(teacher_model=teacher, **common)
    return run_training(trainer, task, model, tokenizer, distillation, teacher_name)
