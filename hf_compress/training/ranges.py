"""Ranges of `TrainingArguments`, which checks few of them: other values fail late, or nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


# Rule -> its test, and the fields it holds for. A field that is None is not tested.
_RULES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        ("per_device_train_batch_size", "per_device_eval_batch_size"),
    ),
    "at least 0 and finite": (
        lambda value: 0 <= value < math.inf,
        (
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "warmup_steps",
            "eval_delay",
            "dataloader_num_workers",
            "neftune_noise_alpha",
        ),  # fmt: skip
    ),
    "a number, 0 for no limit": (lambda value: not math.isnan(value), ("max_grad_norm",)),
    "at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        ("adam_beta1", "adam_beta2", "label_smoothing_factor"),
    ),
    "above 0 and finite": (
        lambda value: 0 < value < math.inf,
        ("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"),
    ),
    "in 0..2**32 - 1": (lambda value: 0 <= value < 2**32, ("seed",)),
}
_STEPS = {"logging_steps": "logging_strategy", "save_steps": "save_strategy", "eval_steps": "eval_strategy"}


def check_ranges(args: TrainingArguments) -> None:
    """Refuse values with which no training makes sense.

    Raises:
        ValueError: Names the field, the value and the rule.
    """
    for rule, (holds, names) in _RULES.items():
        for name in names:
            _require(name, getattr(args, name, None), holds, rule)
    for name, strategy in _STEPS.items():
        if getattr(args, strategy) == "steps":
            _require(name, getattr(args, name), lambda value: 0 < value < math.inf, f"above 0 with {strategy}=steps")
    _check_optimizer_arguments(args.optim_args)
    if not isinstance(args.lr_scheduler_kwargs or {}, Mapping):
        raise ValueError(
            f"lr_scheduler_kwargs is {args.lr_scheduler_kwargs!r}: it must be a JSON object of names and values."
        )
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise ValueError("load_best_model_at_end is set, but eval_strategy is 'no': nothing says which model is best.")
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to is {name!r}: it must be none, all, or some of {known}.")


def _check_optimizer_arguments(text: str | None) -> None:
    for part in (text or "").replace(" ", "").split(","):
        if part and not all(part.partition("=")):
            raise ValueError(f"optim_args is {text!r}: it must be written as name=value,name=value.")


def _require(name: str, value: Any, holds: Callable[[float], bool], rule: str) -> None:
    if isinstance(value, int | float) and not holds(value):
        raise ValueError(f"{name} is {value}: it must be {rule}.")
