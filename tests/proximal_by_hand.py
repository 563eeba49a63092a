"""Proximal training written out by hand: two optimizers, plain tensors, no trainer.

Specification of ProKT, 1.2-1.6 and 5; `published` are the original's order inside a window and its AdamW (1.5, 11).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Walk:
    """The settings of both trainings."""

    num_updates: int
    student_rate: float = 1e-2
    teacher_rate: float = 3e-3
    proximal_weight: float = 0.4
    temperature: float = 1.0
    student_ce_weight: float = 0.0
    reverse: bool = False
    dual: tuple = ()  # epsilon, first beta, learning rate of beta
    weight_decay: float = 0.0
    warmup: int = 0
    max_grad_norm: float = 1.0
    sgd: bool = False
    published: bool = False
    stale: bool = False  # the student learns from the teacher before its step: a mistake that tests must see


def divergence(target, logits, kind="classes", temperature=1.0):
    """From a fixed distribution to a trained one: the mean over the examples."""
    if kind == "regression":
        return (logits - target).square().mean()
    if kind == "labels":
        p, q = (torch.stack([t, torch.zeros_like(t)], -1) for t in (target, logits))
        return divergence(p, q, temperature=temperature)
    p, q = (F.log_softmax(t / temperature, -1) for t in (target, logits))
    return temperature**2 * (p.exp() * (p - q)).reshape(len(p), -1).sum(1).mean()


class Optimizer:
    """AdamW, or plain gradient descent, with warm-up and linear decay and clipping."""

    def __init__(self, model, rate, walk):
        self.walk, self.rate, self.done = walk, rate, 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        # As in the original and in Trainer: biases and the norms are not decayed.
        self.decay = [0.0 if "bias" in name or "LayerNorm" in name else walk.weight_decay for name, _ in named]
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.norms = []

    def step(self):
        walk = self.walk
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        self.norms.append(float(norm))
        if walk.max_grad_norm:
            grads = [g * (walk.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for g in grads]
        if self.done < walk.warmup:
            share = self.done / walk.warmup
        else:
            share = (walk.num_updates - self.done) / (walk.num_updates - walk.warmup)
        self.done += 1
        with torch.no_grad():
            for index, (p, g) in enumerate(zip(self.parameters, grads, strict=True)):
                self._update(p, g, self.first[index], self.second[index], self.rate * share, self.decay[index])
                p.grad = None

    def _update(self, p, g, m, v, rate, decay):
        if self.walk.sgd:
            p -= rate * (g + decay * p)
            return
        if not self.walk.published:
            p *= 1 - rate * decay
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        one, two = 1 - 0.9**self.done, 1 - 0.999**self.done
        if self.walk.published:
            p -= rate * (two**0.5 / one) * m / (v.sqrt() + 1e-8)
            p -= rate * decay * p
        else:
            p -= rate / one * m / ((v / two).sqrt() + 1e-8)


def views(batch):
    """What the student reads, what the teacher reads, and the labels."""
    teacher = {name[8:]: value for name, value in batch.items() if name.startswith("teacher_")}
    student = {name: value for name, value in batch.items() if not name.startswith("teacher_") and name != "labels"}
    return student, teacher or student, batch["labels"]


def logits_of(model, inputs, train):
    model.train(train)
    with torch.set_grad_enabled(train):
        return model(**inputs).logits


def task_loss(logits, labels, kind):
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels)
    if kind == "labels":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels)


def walk_by_hand(student, teacher, windows, walk, kind="classes"):
    """Train both models in place; returns what happened: lists with one entry for each micro-batch or update."""
    seen = {name: [] for name in ("teacher", "teacher_task", "proximal", "output", "task", "beta", "targets")}
    for_student = Optimizer(student, walk.student_rate, walk)
    for_teacher = Optimizer(teacher, walk.teacher_rate, walk) if walk.teacher_rate else None
    epsilon, beta, beta_rate = walk.dual or (0.0, 0.0, 0.0)
    near = walk.dual or walk.proximal_weight

    def teach(batch, size):
        inputs, own, labels = views(batch)
        task = task_loss(logits := logits_of(teacher, own, True), labels, kind)
        loss, distance = task, torch.zeros(())
        if near:
            answers = logits_of(student, inputs, False)
            if walk.reverse:
                distance = reversed_divergence(answers, logits, kind, walk.temperature)
            else:
                distance = divergence(answers, logits, kind, walk.temperature)
            weight = walk.proximal_weight
            loss = task + beta * (distance - epsilon) if walk.dual else (1 - weight) * task + weight * distance
        (loss / size).backward()
        seen["teacher"].append(float(loss.detach()))
        seen["teacher_task"].append(float(task.detach()))
        seen["proximal"].append(float(distance.detach()))
        return float(distance.detach())

    def follow(batch, size, target):
        inputs, _, labels = views(batch)
        logits = logits_of(student, inputs, True)
        distance = divergence(target, logits, kind, walk.temperature)
        task = task_loss(logits, labels, kind)
        ((distance + walk.student_ce_weight * task) / size).backward()
        seen["output"].append(float(distance.detach()))
        seen["task"].append(float(task.detach()))
        seen["targets"].append(target)

    for window in windows:
        size = len(window)
        targets = [logits_of(teacher, views(batch)[1], False) for batch in window]
        distances = []
        if for_teacher is not None:
            for batch in window:
                if walk.published:
                    seen["beta"].append(beta)
                distances.append(teach(batch, size))
                if walk.dual and walk.published:
                    beta = max(0.0, beta + beta_rate * (distances[-1] - epsilon))
            for_teacher.step()
            if walk.dual and not walk.published:
                seen["beta"].append(beta)
                beta = max(0.0, beta + beta_rate * (sum(distances) / size - epsilon))
        if not walk.stale:
            # The original asks the new teacher about the last micro-batch only.
            first = size - 1 if walk.published else 0
            targets[first:] = [logits_of(teacher, views(batch)[1], False) for batch in window[first:]]
        for batch, target in zip(window, targets, strict=True):
            follow(batch, size, target)
        for_student.step()
    seen["norms"] = {"student": for_student.norms, "teacher": for_teacher.norms if for_teacher else []}
    return seen


def reversed_divergence(answers, logits, kind, temperature):
    """From the trained distribution to the fixed one: textbook mirror descent."""
    if kind == "regression":
        return (logits - answers).square().mean()
    if kind == "labels":
        answers, logits = (torch.stack([t, torch.zeros_like(t)], -1) for t in (answers, logits))
    p, q = (F.log_softmax(t / temperature, -1) for t in (answers, logits))
    return temperature**2 * (q.exp() * (q - p)).reshape(len(p), -1).sum(1).mean()


def zero_heads_(*models):
    for model in models:
        for parameter in model.classifier.parameters():
            parameter.data.zero_()
