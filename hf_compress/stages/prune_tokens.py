"""Teach a classifier which tokens it can do without."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig, TrainingArguments

from hf_compress.api import compress, steps_of
from hf_compress.core.saving import require_own_folder
from hf_compress.methods.token_pruning import TokenPruningConfig
from hf_compress.methods.token_pruning.callbacks import StageSwitchCallback, ThresholdAnnealingCallback
from hf_compress.stages.finetune import add_teacher_columns, model_folders, prepare, run, trainer_arguments
from hf_compress.stages.models import ModelArguments, open_model
from hf_compress.tasks.sources import DataArguments
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
        compat: `ltp` trains as the published code of LTP does: the first token may be dropped, padding counts in the
            regulariser, one norm clips everything. Where they are left out, `soft_fraction` is 1 (all updates learn
            thresholds; a second run from the result, with 0, is the hard stage), both temperatures are 0.001,
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
    teacher_name_or_path: str | None = None
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


def _as_published(pruning: TokenPruningArguments, chosen: set[str]) -> TokenPruningArguments:
    """The settings with what `compat` makes of those that were left out."""
    if pruning.compat is None:
        return pruning
    if "soft_fraction" in chosen and pruning.soft_fraction not in (0, 1):
        raise ValueError(
            f"soft_fraction must be 0 or 1 with compat={pruning.compat!r}, whose stages are trainings of their own, "
            f"got {pruning.soft_fraction}."
        )
    return dataclasses.replace(pruning, **{name: value for name, value in _PUBLISHED.items() if name not in chosen})


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
        (("score_reference_length",), config.score_norm == "reference" or pruning.compat, "score_norm='reference'"),
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
    chosen = _set_by_hand(pruning, given)
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
    learns = _begin_stage(model.config, pruning)
    _require_effect(model.config, pruning, learns, chosen)
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}
    uses_teacher = pruning.teacher_name_or_path is not None
    arguments = DistillationArguments(**shared, alpha_output=pruning.alpha_output if uses_teacher else 0.0)
    common = trainer_arguments(task, model, tokenizer, arguments, rows)
    teacher = None
    if uses_teacher:
        teacher = open_model(pruning.teacher_name_or_path, task)
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
    if learns and pruning.soft_fraction < 1:
        callbacks.append(StageSwitchCallback(pruning.soft_fraction))
    trainer = DistillationTrainer(teacher_model=teacher, callbacks=callbacks, **common)
    return run(trainer, model, tokenizer, arguments)
