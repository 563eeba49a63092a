"""The trainings of our trainers as loops by hand: what their steps are measured against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


TEMPERATURE, LEARNING_RATE, CLIP = 2.0, 5e-5, 1.0
PROXIMAL_WEIGHT = 0.4
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def layer_loss(teacher: tuple[Tensor, ...], student: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """What a careful person would write: mean square over width, live positions, examples and layers."""
    mask = mask.float()
    per_layer = [
        (((s - t) ** 2).mean(-1) * mask).sum(1) / mask.sum(1) for t, s in zip(teacher[1:], student[1:], strict=True)
    ]
    return torch.stack(per_layer).mean()


class Side:
    """One model by hand: its optimizer, and its loss scale in fp16."""

    def __init__(self, model: PreTrainedModel, precision: str) -> None:
        self.model = model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")

    def learn(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def divergence(target: Tensor, learner: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(target || learner)`, mean over the batch."""
    log_p, log_q = (F.log_softmax(logits.float() / temperature, -1) for logits in (target, learner))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class HandLoop:
    """The same training as the trainer's, as directly as it can be written."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, mode: str, precision: str) -> None:
        self.device, self.precision, self.mode = student.device, precision, mode
        self.student, self.teacher = Side(student, precision), teacher
        self.with_layers = mode in ("layer", "joint")
        self.learner = Side(teacher, precision) if mode in ("joint", "proximal") else None
        self.losses: list[float] = []

    def run(self, model: PreTrainedModel, batch: Mapping[str, Tensor], labels: bool = True) -> ModelOutput:
        inputs = {name: value for name, value in batch.items() if labels or name != "labels"}
        with torch.autocast(self.device.type, HALF.get(self.precision), enabled=self.precision in HALF):
            return model(**inputs, output_hidden_states=self.with_layers)

    @torch.no_grad()
    def answer(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> ModelOutput:
        training = model.training
        outputs = self.run(model.eval(), batch, labels=False)
        model.train(training)
        return outputs

    def step(self, batch: Mapping[str, Tensor]) -> None:
        batch = {name: value.to(self.device) for name, value in batch.items()}
        loss = self.proximal_loss(batch) if self.mode == "proximal" else self.guided_loss(batch)
        self.student.learn(loss)
        self.losses.append(float(loss.detach()))

    def proximal_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        assert self.learner is not None
        teacher, student = self.learner.model, self.student.model
        near = self.answer(student, batch).logits
        outputs = self.run(teacher, batch)
        held = divergence(near, outputs.logits, 1.0)
        self.learner.learn((1 - PROXIMAL_WEIGHT) * outputs.loss + PROXIMAL_WEIGHT * held)
        return divergence(self.answer(teacher, batch).logits, self.run(student, batch, labels=False).logits, 1.0)

    def guided_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        outputs = self.run(self.student.model, batch)
        loss = outputs.loss
        if self.teacher is not None:
            targets = self.targets(batch)
            if self.with_layers:
                hidden = tuple(state.detach() for state in targets.hidden_states)
                loss = loss + layer_loss(hidden, outputs.hidden_states, batch["attention_mask"])
            else:
                loss = loss + divergence(targets.logits, outputs.logits, TEMPERATURE)
        return loss

    def targets(self, batch: Mapping[str, Tensor]) -> ModelOutput:
        if self.learner is None:
            assert self.teacher is not None
            return self.answer(self.teacher, batch)
        outputs = self.run(self.learner.model, batch)
        self.learner.learn(outputs.loss)
        return outputs
