"""A teacher that learns the labels and is held near its student."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress.core.batches import accepted_arguments
from hf_compress.training.checkpoints import readable
from hf_compress.training.collator import split_inputs
from hf_compress.training.output_terms import output_term
from hf_compress.training.signals import Batch, Signals, SignalsOf, WantedSignals, logits_of
from hf_compress.training.teachers import Learner
from hf_compress.training.windows import Window


# The weight of `DualHold` in a checkpoint.
_STATE = "proximal_state.json"


class FixedHold:
    """Adds `(1 - weight) * task + weight * divergence`.

    Args:
        weight: From 0, where the student is not asked, to below 1.

    Source:
        ProKT specification 1.2 (arXiv 2107.09305).
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.asks_student = weight > 0

    def loss(self, task: Tensor, divergence: Tensor) -> Tensor:
        """Add the teacher's loss on the labels and its divergence from the student."""
        return (1 - self.weight) * task + self.weight * divergence


class DualHold(FixedHold):
    """Adds `task + weight * (divergence - epsilon)`, with a weight that rises while the divergence exceeds epsilon.

    Args:
        weight: The first one.
        epsilon: The divergence allowed, in nats.
        learning_rate: Change of the weight for each nat of excess.

    Source:
        ProKT specification 1.2, "dual" (arXiv 2107.09305): the Lagrangian of a trust region.
    """

    def __init__(self, weight: float, epsilon: float, learning_rate: float) -> None:
        super().__init__(weight)
        # Its weight may rise from 0.
        self.asks_student = True
        self._epsilon = epsilon
        self._learning_rate = learning_rate

    def loss(self, task: Tensor, divergence: Tensor) -> Tensor:
        return task + self.weight * (divergence - self._epsilon)

    def adapt(self, divergence: float) -> None:
        """Change the weight after a divergence was measured."""
        self.weight = max(0.0, self.weight + self._learning_rate * (divergence - self._epsilon))


class ProximalTeacher(Learner):
    """Makes one step on the labels and on its divergence from the student; the student then learns from the new one.

    Args:
        model: As for `Learner`, like `wanted`, `learning_rate`, `dropout` and `seed`.
        hold: Weighs the divergence.
        temperature: T > 0, of both distributions.
        reversed_direction: Measure KL(teacher || student) instead of KL(student || teacher).
        published: In a window of several micro-batches, answer all but the last one with the weights before the step,
            and adapt the hold after each.

    Source:
        ProKT specification 1.2 and 1.5 (arXiv 2107.09305). There the window is walked once, so that its micro-batches
        come from different teachers (`published`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: WantedSignals | None = None,
        *,
        learning_rate: float,
        hold: FixedHold,
        temperature: float = 1.0,
        reversed_direction: bool = False,
        published: bool = False,
        dropout: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(model, wanted, learning_rate=learning_rate, dropout=dropout, seed=seed)
        self.hold = hold
        self.temperature = temperature
        self.reversed_direction = reversed_direction
        self.published = published

    def begin(self, trainer: Trainer, num_updates: int) -> None:
        super().begin(trainer, num_updates)
        if self.published and trainer.args.gradient_accumulation_steps > 1:
            _require_whole_windows(trainer)

    def forward(self, batch: Batch, training: bool = False) -> Signals:
        return self.answer(batch, dropout=False)

    def learn(self, window: Window, student: SignalsOf) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {"loss/teacher": [], "loss/teacher_task": [], "loss/proximal": []}
        last = len(window.batches)
        for index, (batch, weight) in enumerate(zip(window.batches, window.weights, strict=True), start=1):
            answers = student(batch.student).logits if self.hold.asks_student else None
            arguments = accepted_arguments(self.model, batch.teacher)
            self.model.train(self.dropout)
            with self.trained.micro_batch(last=index == last) as model:
                outputs = model(**arguments, return_dict=True)
                task = loss = self.own_loss(outputs, arguments, window.update)
                if answers is not None:
                    divergence = self._divergence(answers, logits_of(outputs), batch.teacher)
                    loss = self.hold.loss(task, divergence)
                    seen["loss/proximal"].append(divergence.detach() * weight)
                self.trained.accelerator.backward(loss * weight / last)
            seen["loss/teacher"].append(loss.detach() * weight)
            seen["loss/teacher_task"].append(task.detach() * weight)
            if self.published and last > 1:
                self._adapt(seen["loss/proximal"][-1:])
                if index < last:
                    window.answers.append(self.forward(batch.teacher, training=True))
        self.trained.step()
        self.trained.zero_grad()
        if window.answers:
            window.answers.append(self.forward(window.batches[-1].teacher, training=True))
        else:
            self._adapt(seen["loss/proximal"])
        return {name: torch.stack(values) for name, values in seen.items() if values}

    def _divergence(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], batch: Batch) -> Tensor:
        target, learner = (teacher, student) if self.reversed_direction else (student, teacher)
        return output_term(target, learner, self.model, split_inputs(batch)[0], self.temperature)

    def _adapt(self, divergences: list[Tensor]) -> None:
        # Reading a number makes the processor wait for the device: a fixed hold does not ask for it.
        if isinstance(self.hold, DualHold):
            mean = self.trained.accelerator.reduce(torch.stack(divergences).mean(), reduction="mean")
            self.hold.adapt(float(mean))

    def save(self, folder: Path, process: int, shared: bool) -> None:
        super().save(folder, process, shared)
        if shared and isinstance(self.hold, DualHold):
            (folder / _STATE).write_text(json.dumps({"weight": self.hold.weight}))

    def load(self, folder: Path, process: int) -> None:
        super().load(folder, process)
        if isinstance(self.hold, DualHold):
            with readable(folder, "weight of the divergence (prox_mode='dual')"):
                self.hold.weight = float(json.loads((folder / _STATE).read_text())["weight"])


def _require_whole_windows(trainer: Trainer) -> None:
    """Refuse epochs that end within a window, where the published code leaks gradients into the next epoch."""
    loader, accumulation = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps
    try:
        batches = len(loader)
    except TypeError:
        raise ValueError("compat='prokt' must know the length of the data with gradient_accumulation_steps.") from None
    if batches % accumulation:
        raise ValueError(
            f"gradient_accumulation_steps must divide the {batches} batches of an epoch with compat='prokt', got "
            f"{accumulation}: at the end of an epoch the published code leaves gradients for the next one. Use "
            "dataloader_drop_last, another batch size, or no compat."
        )
