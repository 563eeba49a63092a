"""A teacher that is trained beside its student, on its own loss alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress.core.batches import accepted_arguments
from hf_compress.training.compat import Arithmetic
from hf_compress.training.signals import Batch, Signals, SignalsOf, WantedSignals
from hf_compress.training.teachers import Learner
from hf_compress.training.windows import Window


class LearningTeacher(Learner):
    """Makes one step on its own loss every `cycle` updates; its targets come from the weights before that step.

    It runs once on each batch, for its own loss and for the targets: it learns from all micro-batches of an update
    before the student begins, and keeps its answers until the student has used them.

    Args:
        model: As for `Learner`, like `wanted`, `learning_rate` and `seed`.
        cycle: T_u: the teacher learns in one of this many student updates; it is not trained on the other batches.
        stretched: Use the student's schedule, advanced only when the teacher learns, so that it never ends.
        dropout: Run it in train mode, for the targets too.
        arithmetic: Decides when its turn is, and how its micro-batches are weighed.

    Source:
        CALD specification 3.2 and 6.10-6.12 (arXiv 2410.06846).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: WantedSignals | None = None,
        *,
        learning_rate: float,
        cycle: int = 1,
        stretched: bool = False,
        dropout: bool = True,
        arithmetic: Arithmetic | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, wanted, learning_rate=learning_rate, dropout=dropout, seed=seed)
        self.cycle = cycle
        self.stretched = stretched
        self.arithmetic = arithmetic or Arithmetic()

    def begin(self, trainer: Trainer, num_updates: int) -> None:
        share = 1 if self.stretched else self.cycle
        warmup = trainer.args.get_warmup_steps(num_updates)
        self.trained.prepare(trainer, self.peak, num_updates // share, warmup // share)

    def forward(self, batch: Batch, training: bool = False) -> Signals:
        # Evaluations compare with targets without dropout.
        return self.answer(batch, self.dropout and training)

    def learn(self, window: Window, student: SignalsOf) -> dict[str, Tensor]:
        losses = self._computed_gradients(window) if self.arithmetic.learns(window, self.cycle) else []
        if self.arithmetic.steps(window, self.cycle):
            self.trained.step()
        self.trained.zero_grad()
        return {"loss/teacher": torch.stack(losses)} if losses else {}

    def _computed_gradients(self, window: Window) -> list[Tensor]:
        """Accumulate the gradients of a window, keep the targets in it, and return the losses."""
        self.model.train(self.dropout)
        losses, divisor = [], self.arithmetic.divisor(len(window.batches), window.accumulation)
        for index, (batch, weight) in enumerate(zip(window.batches, window.weights, strict=True), start=1):
            arguments = accepted_arguments(self.model, batch.teacher)
            with self.trained.micro_batch(last=index == len(window.batches)) as model:
                outputs = model(**arguments, **self.wanted.arguments)
                loss = self.own_loss(outputs, arguments, window.update) * weight
                self.trained.accelerator.backward(loss / divisor)
            losses.append(loss.detach())
            window.answers.append(self.wanted.of(outputs, arguments))
        return losses
