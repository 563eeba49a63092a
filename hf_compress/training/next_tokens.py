"""The losses of a causal language model in training: counted per predicted token, and without all logits in memory.

Letters: B batch, S padded length, N counted tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_compress.core.architectures import base_of
from hf_compress.core.forward_state import FORWARD_STATE
from hf_compress.training.collator import split_inputs
from hf_compress.training.language_head import LanguageHead, language_head, reading_head
from hf_compress.training.output_terms import counted_positions, predicts_next_token
from hf_compress.training.signals import Batch, Signals
from hf_compress.training.token_losses import TokenLosses, summed_over_tokens


def predicted_tokens(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """[B, S] bool of the positions at which a model predicts a token that counts; None where the batch does not tell.

    Args:
        model: A causal language model, without adapters.
        batch: Its labels count where they are not -100; without labels, the real tokens do.
    """
    ids = batch.get("input_ids")
    if not torch.is_tensor(ids) or ids.ndim != 2:
        return None
    labels = batch.get("labels")
    if labels is not None and (not torch.is_tensor(labels) or labels.shape != ids.shape):
        return None
    counted = counted_positions(model, ids.shape, batch)
    return torch.ones_like(ids, dtype=torch.bool) if counted is None else counted


class NextTokens:
    """What a trainer asks about the tokens that its student predicts; of other students it knows nothing.

    Args:
        trainer: Its `model` is the student, perhaps with adapters around it.
        ours: The class whose `compute_loss` calls this object.
        model_divides: Whether the student's forward takes the number of tokens by which its own loss is divided.
    """

    def __init__(self, trainer: Trainer, ours: type, model_divides: bool) -> None:
        self._trainer = trainer
        self._model_divides = model_divides
        owners = [kind for kind in type(trainer).__mro__ if {"loss_terms", "compute_loss"} & vars(kind).keys()]
        before, after = owners[: owners.index(ours)], owners[owners.index(ours) + 1 :]
        # Code of others may read the logits, or compute a loss of its own.
        self._plain = after == [Trainer]
        package = __name__.partition(".")[0]
        self._own = self._plain and all(
            "loss_terms" not in vars(kind) or kind.__module__.partition(".")[0] == package for kind in before
        )
        self._head: tuple[PreTrainedModel, LanguageHead | None] | None = None
        self._whole = True
        self._mean_number: Tensor | None = None

    @property
    def _student(self) -> PreTrainedModel:
        return cast(PreTrainedModel, base_of(self._trainer.model))

    def in_window(self, batches: Sequence[Batch]) -> Tensor | None:
        """The number of tokens that the student predicts in a window, over all processes; None if none are."""
        args, student = self._trainer.args, self._student
        if self._trainer.compute_loss_func is not None or not predicts_next_token(student):
            return None
        masks = [predicted_tokens(student, split_inputs(batch)[0]) for batch in batches]
        known = [mask.sum().to(args.device) for mask in masks if mask is not None]
        if not known or len(known) < len(masks):
            return None
        number = torch.stack(known).sum()
        if args.average_tokens_across_devices and args.world_size > 1:
            everywhere: Any = self._trainer.accelerator.gather(number)
            number = everywhere.sum()
        return number

    @contextmanager
    def asked(self, whole: bool, number: Tensor | int | None, micro_batches: int) -> Iterator[None]:
        """Compute the losses of one micro-batch inside the block.

        Args:
            whole: Whether the student's logits are wanted, too.
            number: The predicted tokens of the window, over all processes; None: a micro-batch counts by itself.
            micro_batches: By how many the gradients of the window are divided.
        """
        args = self._trainer.args
        shares = micro_batches * (args.world_size if args.average_tokens_across_devices else 1)
        before = self._whole, self._mean_number
        # Micro-batches and processes are averaged: over the mean number of their tokens, sums become sums over the
        # number of all tokens. A window without any token has no loss either.
        self._whole = whole
        self._mean_number = None if number is None else torch.as_tensor(number).clamp(min=1) / shares
        try:
            yield
        finally:
            self._whole, self._mean_number = before

    def weight(self, batch: Batch) -> Tensor | float:
        """The weight of a micro-batch's mean over its tokens; 1 unless all tokens of a window count alike."""
        mask = None if self._mean_number is None else predicted_tokens(self._student, batch)
        return 1.0 if mask is None or self._mean_number is None else mask.sum() / self._mean_number

    def weights(self, batches: Sequence[Batch]) -> list[Tensor | float]:
        """`weight` of each micro-batch of a window, as a collator made it."""
        return [self.weight(split_inputs(batch)[0]) for batch in batches]

    @property
    def _divided_by_model(self) -> bool:
        smoothed = getattr(self._trainer, "label_smoother", None) is not None
        return self._model_divides and not smoothed and self._mean_number is not None

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the student's forward is given: its own loss then counts the tokens of the window, if it can."""
        return {**batch, "num_items_in_batch": self._mean_number} if self._divided_by_model else {**batch}

    def counted(self, loss: Tensor, batch: Batch) -> Tensor:
        """The student's own loss, counted over the tokens of the window."""
        return loss if self._divided_by_model or not self._plain else loss * self.weight(batch)

    def from_head(self, inputs: Mapping[str, Any], labelled: bool = True) -> bool:
        """Whether the losses of a batch are computed from what the head reads, a chunk of tokens at a time.

        Args:
            inputs: The student's batch.
            labelled: Whether one of the losses reads labels.
        """
        trainer, args = self._trainer, self._trainer.args
        ready = (
            self._own
            and not self._whole
            and not (args.label_smoothing_factor or args.torch_compile or args.use_liger_kernel)
            and trainer.compute_loss_func is None
            and trainer.accelerator.distributed_type != DistributedType.FSDP
            and ("labels" in inputs or not labelled)
            and not {"inputs_embeds", "logits_to_keep", "shift_labels"} & inputs.keys()
            and inputs.get(FORWARD_STATE) is None
            and not _learns_prompts(trainer.model)
            and predicts_next_token(self._student)
        )
        return ready and predicted_tokens(self._student, inputs) is not None and self.head() is not None

    def head(self) -> LanguageHead | None:
        """The student's head; None if its logits come about in another way."""
        if self._head is None or self._head[0] is not self._student:
            self._head = self._student, language_head(self._student)
        return self._head[1]

    def terms(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        weights: tuple[float, float] = (1.0, 0.0),
        teacher: Signals | None = None,
        temperature: float = 1.0,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weighted losses of a batch for which `from_head` is true, and the outputs without logits.

        Args:
            model: The student as its trainer calls it.
            inputs: Its batch.
            weights: Of the loss on the labels (`task`) and of the divergence from the teacher (`output`); one of them
                is above 0, and those that are 0 have no term.
            teacher: The teacher's answer, where the divergence has a weight.
            temperature: Of the divergence.
        """
        head, mask = self.head(), predicted_tokens(self._student, inputs)
        assert head is not None
        assert mask is not None
        places = mask.flatten().nonzero().squeeze(1)
        # The last position of a row predicts nothing, so that no row's end reads the next row's beginning.
        targets = inputs["labels"].flatten().roll(-1)[places] if weights[0] else None
        found: list[Tensor] = []

        def read(hidden: Tensor) -> None:
            logits_of = teacher.token_logits(places, mask.shape) if teacher is not None and weights[1] else None
            losses = TokenLosses(targets, logits_of, temperature, weights)
            found.append(summed_over_tokens(hidden.flatten(0, 1)[places], head, losses))

        with reading_head(head, read):
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, return_dict=True)
        (sums,) = found
        number = max(len(places), 1) if self._mean_number is None else self._mean_number.to(sums.device)
        names = [name for name, weight in zip(("task", "output"), weights, strict=True) if weight]
        terms = dict(zip(names, (sums / number).unbind(), strict=True))
        return terms, {name: value for name, value in outputs.items() if name != "logits"}


def _learns_prompts(model: Any) -> bool:
    """Whether adapters put tokens of their own before a text, which the labels do not know."""
    return any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values())
