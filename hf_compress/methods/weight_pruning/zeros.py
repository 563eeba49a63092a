"""Keeps weights zero whatever an optimizer does to them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_compress.core.architectures import base_of
from hf_compress.core.engines import own_part
from hf_compress.core.record import record_of
from hf_compress.methods.weight_pruning.config import NAME
from hf_compress.methods.weight_pruning.groups import selected
from hf_compress.methods.weight_pruning.outcome import config_of
from hf_compress.methods.weight_pruning.prunable import PrunableWeight
from hf_compress.methods.weight_pruning.sparsity import sparsity_of


logger = logging.getLogger(__name__)

# Integers of the size of a weight.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# For each training, that is its optimizer: which weights each callback decides about.
_DECIDED: WeakKeyDictionary[Optimizer, dict[TrainerCallback, Collection[nn.Parameter]]] = WeakKeyDictionary()


def decide(optimizer: Optimizer, callback: TrainerCallback, weights: Iterable[PrunableWeight]) -> None:
    """Tell the other callbacks of a training which weights one of them prunes anew.

    Raises:
        ValueError: If two of them prune one weight.
    """
    elsewhere, decided = decided_elsewhere(optimizer, callback), set()
    for prunable in weights:
        if prunable.weight in elsewhere:
            raise ValueError(
                f"Two WeightPruningCallbacks select {prunable.name}. Give them different op_names, or one config with "
                "local_configs."
            )
        decided.add(prunable.weight)
    _DECIDED.setdefault(optimizer, {})[callback] = decided


def decided_elsewhere(optimizer: Optimizer, callback: TrainerCallback) -> set[nn.Parameter]:
    """The weights that other callbacks of a training prune anew."""
    by_callback = _DECIDED.get(optimizer, {})
    return {weight for other, weights in by_callback.items() if other is not callback for weight in weights}


def forget(callback: TrainerCallback) -> None:
    """Forget what a callback decides about, because its training is over."""
    for by_callback in _DECIDED.values():
        by_callback.pop(callback, None)


class Zeros:
    """Keeps elements of some weights zero."""

    def __init__(self) -> None:
        self._kept_bits: dict[PrunableWeight, Tensor] = {}

    def hold(self, prunable: PrunableWeight, mask: Tensor) -> None:
        """From now on a weight is zero where the mask, of its own part, is True."""
        self._kept_bits[prunable] = (~mask).to(_BITS[prunable.weight.element_size()]).neg_()

    def hold_recorded(self, model: nn.Module, decided: Container[nn.Parameter] = frozenset()) -> None:
        """Hold what is zero now in the trained weights that recorded steps chose from, but for those decided anew."""
        for prunable in _recorded_weights(base_of(model)):
            mask = own_part(prunable.weight.detach()) == 0
            if prunable.weight.requires_grad and prunable.weight not in decided and bool(mask.any()):
                self.hold(prunable, mask)

    def release(self, weights: Container[nn.Parameter]) -> None:
        """Stop keeping zeros in these weights."""
        self._kept_bits = {held: bits for held, bits in self._kept_bits.items() if held.weight not in weights}

    def enforce(self) -> None:
        """Make zero again what an optimizer has moved."""
        # All bits of what stays, none of what goes: ten times as fast as `masked_fill_` on the CPU, and 0 times NaN or
        # a negative number is a plain zero, too.
        for prunable, bits in self._kept_bits.items():
            own_part(prunable.weight.data).view(bits.dtype).bitwise_and_(bits)


class HeldZerosCallback(TrainerCallback):
    """Keeps the zeros of a model that went through weight pruning, while it is trained for something else.

    Trainers of this package add it by themselves, unless a `WeightPruningCallback` is there, which keeps the zeros of
    the weights that it does not select.

    Example:
        >>> held = HeldZerosCallback()   # Trainer(pruned_model, args, train_dataset=..., callbacks=[held]).train()
    """

    def __init__(self) -> None:
        self._zeros = Zeros()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._zeros = Zeros()
        if model is not None:
            self._zeros.hold_recorded(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Known when every callback has begun.
        self._zeros.release(decided_elsewhere(kwargs["optimizer"], self))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._zeros.enforce()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._zeros = Zeros()


def _recorded_weights(model: PreTrainedModel) -> Iterable[PrunableWeight]:
    """The weights that the weight pruning steps of a model's record chose from."""
    found: dict[str, PrunableWeight] = {}
    for step in record_of(model.config)["steps"]:
        if step["method"] != NAME:
            continue
        try:
            groups = selected(model, config_of(step))
        except ValueError as error:
            # The model has adapters, or a later step has replaced modules of this one.
            logger.warning("The zeros of weight pruning are no longer kept: %s", error)
            continue
        found.update((prunable.name, prunable) for group in groups for prunable in group.weights)
    return found.values()


# Well below what rounding of a recorded sparsity may do.
_LOST = 0.005


def warn_of_lost_zeros(model: PreTrainedModel) -> None:
    """Say that the weights of an opened model are denser than its record: something trained them without the zeros."""
    steps = record_of(model.config)["steps"]
    index = max(i for i, step in enumerate(steps) if step["method"] == NAME)
    config = config_of(steps[index])
    # Where layers were made smaller, zeros went with what was cut off.
    cut = any(step.get("neurons_per_layer") is not None for step in steps[index:])
    recorded = config.achieved_sparsity or 0.0
    if cut or not recorded:
        return
    try:
        # Packed weights are none of them.
        groups = [group for group in selected(model, config) if group.weights]
    except ValueError:
        return
    if any(prunable.weight.is_meta for group in groups for prunable in group.weights):
        return
    # Counted as it was recorded, in units: one of a smaller layer is as much of it as one of a larger layer.
    if groups and (found := sparsity_of(groups)) < recorded - _LOST:
        logger.warning(
            "config.json records that weight pruning made %.3f of %d weights zero, but %.3f of them is: "
            "the model was trained without holding its zeros. Prune it again; train pruned models with a trainer of "
            "hf_compress, or with HeldZerosCallback() among the callbacks of another one.",
            recorded,
            sum(len(group.weights) for group in groups),
            found,
        )
