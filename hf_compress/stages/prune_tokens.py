"""Teach a classifier which tokens it can do without."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, TrainingArguments

from hf_compress.api import compress, steps_of
from hf_compress.core.saving import require_own_folder
from hf_compress.methods.token_pruning import TokenPruningConfig
from hf_compress.methods.token_pruning.callbacks import StageSwitchCallback, ThresholdAnnealingCallback
from hf_compress.stages.finetune import add_teacher_columns, model_folders, prepare, run, trainer_arguments
from hf_compress.stages.models import ModelArguments, open_classifier
from hf_compress.tasks.sources import DataArguments
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.distillation import DistillationTrainer


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
        soft_fraction: Part of the updates that learns thresholds; the rest trains under real pruning. 0: thresholds
            keep the shape they have (`topk` has none). Thresholds that went through a hard stage are fixed.
        temperature_start: Width of the soft decision at the first update, in units of importance.
        temperature_end: Width of the soft decision when the hard stage begins, in units of importance.
        lambda_threshold: Weight of the regulariser that pushes thresholds up, that is towards fewer tokens.
        lambda_warmup: Part of the training over which that weight rises from 0.
        target_relative_macs: Fraction of the dense model's arithmetic to steer to. Left out: the regulariser alone
            decides.
        threshold_learning_rate: Learning rate of the thresholds. Left out: that of the weights.
        teacher_name_or_path: Hub name or folder of the dense model, whose outputs are then distilled in both stages.
        alpha_output: Weight of that distillation beside the task loss.
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
    teacher_name_or_path: str | None = None
    alpha_output: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.soft_fraction < 1:
            raise ValueError(f"soft_fraction must be in [0, 1), got {self.soft_fraction}.")
        for name in ("temperature_start", "temperature_end"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.threshold_learning_rate is not None and not 0 <= self.threshold_learning_rate < float("inf"):
            raise ValueError(f"threshold_learning_rate must not be negative, got {self.threshold_learning_rate}.")
        if self.teacher_name_or_path is not None and self.alpha_output == 0:
            raise ValueError("alpha_output must be above 0 with teacher_name_or_path: it would teach nothing.")

    def config(self) -> TokenPruningConfig:
        """What the model shall be."""
        names = [f.name for f in dataclasses.fields(TokenPruningConfig) if hasattr(self, f.name)]
        return TokenPruningConfig(**{name: getattr(self, name) for name in names}, temperature=self.temperature_start)


def _set_by_hand(pruning: TokenPruningArguments, given: Collection[str] | None) -> set[str]:
    """Names of the settings that the user wrote, equal to the default or not; of those that differ when not told."""
    fields = dataclasses.fields(pruning)
    if given is not None:
        return {field.name for field in fields if field.name in given}
    return {field.name for field in fields if getattr(pruning, field.name) != field.default}


def _require_same(config: PretrainedConfig, pruning: TokenPruningArguments, chosen: set[str]) -> None:
    for name in TokenPruningConfig.flat:
        if name in chosen and getattr(pruning, name) != getattr(config, name):
            raise ValueError(
                f"{name} must be {getattr(config, name)!r} or left out for a model that prunes tokens already, got "
                f"{getattr(pruning, name)!r}."
            )


def _begin_stage(config: PretrainedConfig, pruning: TokenPruningArguments) -> bool:
    """Write down the stage that training begins with; returns whether thresholds are learned."""
    if pruning.soft_fraction == 0:
        config.masking_mode = "hard"
    elif config.prune_mode == "absolute_threshold" and config.token_prune_stage is None:
        config.masking_mode = "soft"
    return config.masking_mode == "soft"


def _require_effect(config: PretrainedConfig, pruning: TokenPruningArguments, learns: bool, chosen: set[str]) -> None:
    """Refuse settings that would change nothing."""
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
        (("alpha_output",), pruning.teacher_name_or_path is not None, "teacher_name_or_path"),
        (("score_reference_length",), config.score_norm == "reference", "score_norm='reference'"),
    ]
    for names, effective, needs in rules:
        for name in names:
            if not effective and name in chosen:
                raise ValueError(f"{name} must go with {needs}, got {getattr(pruning, name)}.")


def prune_tokens(
    model_args: ModelArguments,
    pruning: TokenPruningArguments,
    data: DataArguments,
    args: TrainingArguments,
    given: Collection[str] | None = None,
) -> dict[str, Any]:
    """Let a fine-tuned classifier drop tokens, learn the thresholds, train on under real pruning, and save it.

    Args:
        model_args: The fine-tuned dense model, or one that prunes tokens already.
        pruning: What to prune and how to learn it.
        data: The task.
        args: As for `transformers.Trainer`.
        given: Names of the settings that the user wrote; None: those that differ from their defaults. A setting that
            contradicts the model or would change nothing is refused when it was written, and ignored otherwise.

    Returns:
        Metrics of the validation split, `eval_relative_macs` among them, and the training time in seconds.

    Raises:
        ValueError: If the model cannot drop tokens or does not fit the data.
    """
    require_own_folder(args.output_dir, model_folders(model_args, pruning.teacher_name_or_path))
    task, tokenizer, model, rows = prepare(model_args, data, args.seed)
    config = pruning.config()
    chosen = _set_by_hand(pruning, given)
    if "token_pruning" in [step["method"] for step in steps_of(model)]:
        _require_same(model.config, pruning, chosen)
    else:
        compress(model, config)
    learns = _begin_stage(model.config, pruning)
    _require_effect(model.config, pruning, learns, chosen)
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}
    uses_teacher = pruning.teacher_name_or_path is not None
    arguments = DistillationArguments(**shared, alpha_output=pruning.alpha_output if uses_teacher else 0.0)
    common = trainer_arguments(task, model, tokenizer, arguments, rows)
    teacher = None
    if uses_teacher:
        teacher = open_classifier(pruning.teacher_name_or_path, task)
        add_teacher_columns(common, task, data, pruning.teacher_name_or_path)
    callbacks = []
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
    if learns:
        callbacks.append(StageSwitchCallback(pruning.soft_fraction))
    trainer = DistillationTrainer(teacher_model=teacher, callbacks=callbacks, **common)
    return run(trainer, model, tokenizer, arguments)
