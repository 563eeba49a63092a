"""Checks the needs of a training before its first update."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from hf_compress.core.engines import refuse_deepspeed
from hf_compress.training.arguments import DistillationArguments
from hf_compress.training.ranges import check_ranges


logger = logging.getLogger(__name__)

# What `Trainer` adds to the metrics after its loop.
_TIMES = ("_runtime", "_per_second", "_time")


def check_training(args: TrainingArguments) -> None:
    """Refuse values with which nothing would be trained.

    Raises:
        ValueError: Names the field, the value and the rule.
    """
    refuse_deepspeed(args)
    check_ranges(args)
    if isinstance(args, DistillationArguments):
        args.check()
    if args.gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}: it must be at least 1, the number of "
            "batches of one update."
        )
    if args.max_steps <= 0 and not 0 <= args.num_train_epochs < math.inf:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs:g} and max_steps is {args.max_steps}: one of them must say "
            "how long to train."
        )


def _two_rows(data: Any) -> Any:
    """The first two rows of a data set, in a form that a data loader takes."""
    if hasattr(data, "take"):
        return data.take(2)
    if isinstance(data, IterableDataset) or not has_length(data):
        return list(itertools.islice(data, 2))
    return Subset(cast("Dataset[Any]", data), range(min(2, len(data))))


class MetricCallback(TrainerCallback):
    """Base of this package's callbacks whose `on_evaluate` adds metrics."""


def _adds_metrics(trainer: Trainer, ours: type) -> bool:
    """Whether a user's code may add metrics that only a whole evaluation shows."""
    named = next(base for base in type(trainer).__mro__ if "evaluate" in vars(base))
    if not issubclass(ours, named):
        return True
    packages = ("transformers", __name__.partition(".")[0])
    return any(
        isinstance(callback, MetricCallback)
        or type(callback).on_evaluate is not TrainerCallback.on_evaluate
        and type(callback).__module__.partition(".")[0] not in packages
        for callback in trainer.callback_handler.callbacks
    )


def check_best_metric(trainer: Trainer, ours: type) -> None:
    """Evaluate a little and look for `metric_for_best_model` among the metrics.

    Args:
        trainer: About to make its first step.
        ours: The class whose `evaluate` adds no metrics.

    Raises:
        ValueError: Names the metrics that there are.
    """
    args = trainer.args
    if args.metric_for_best_model is None or args.eval_strategy == "no" or trainer.eval_dataset is None:
        return
    if _adds_metrics(trainer, ours):
        return
    wanted = args.metric_for_best_model
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    if wanted.endswith(_TIMES):
        return
    found: set[str] = set()
    # Where names depend on the rows, all of them decide.
    for rows in (_two_rows, lambda data: data):
        found = _metrics(trainer, rows)
        if wanted in found:
            return
    if found:
        names = ", ".join(sorted(name.removeprefix("eval_") for name in found))
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model!r}, which no evaluation gives. There are: {names}."
        )


def _metrics(trainer: Trainer, rows: Callable[[Any], Any]) -> set[str]:
    """The names of the metrics of an evaluation that leaves no trace; none where it fails."""
    given: Any = trainer.eval_dataset
    several = isinstance(given, Mapping)
    sets = given if several else {"": given}
    found: set[str] = set()
    handler = trainer.callback_handler
    callbacks, handler.callbacks = handler.callbacks, []
    try:
        for name, data in sets.items():
            loader = trainer.get_test_dataloader(rows(data))
            prefix = f"eval_{name}" if several else "eval"
            with warnings.catch_warnings():
                # Scores of two rows may be undefined.
                warnings.simplefilter("ignore")
                found.update(trainer.evaluation_loop(loader, "Check", metric_key_prefix=prefix).metrics or ())
    except Exception as error:
        # Two rows may be too few for a metric, and a trainer may prepare what its loop needs in `evaluate`.
        logger.debug("metric_for_best_model is not checked: %s", error)
        return set()
    finally:
        handler.callbacks = callbacks
    return found


def check_labels_are_numbers(trainer: Trainer) -> None:
    """Raise `ValueError` when a collator that only pads would meet labels that are texts."""
    if not isinstance(trainer.data_collator, DataCollatorWithPadding):
        return
    features = getattr(trainer.train_dataset, "features", None) or {}
    for name in ("label", "labels"):
        if getattr(features.get(name), "dtype", None) in ("string", "large_string"):
            raise ValueError(
                f"train_dataset holds texts in the column {name!r}: map them to numbers, for example with "
                "model.config.label2id."
            )


@contextlib.contextmanager
def missing_labels_named(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Say what a batch holds when a model that is called in the block gives no loss for it.

    Raises:
        ValueError: Names the columns and the remedy.
    """
    try:
        yield
    except ValueError as error:
        if "did not return a loss" not in str(error):
            raise
        raise ValueError(
            f"The model gave no loss: its batches hold {', '.join(inputs)} and no labels. Name their column "
            "'label' or 'labels' in the data set; columns of other names are dropped."
        ) from error


class Preflight(TrainerCallback):
    """Checks right before the first step what only a prepared trainer can tell."""

    def __init__(self, trainer: Trainer, ours: type) -> None:
        self.trainer, self.ours = trainer, ours

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_labels_are_numbers(self.trainer)
        check_best_metric(self.trainer, self.ours)
