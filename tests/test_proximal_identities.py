"""What proximal training is in exact terms, seen on models whose logits are free numbers.

Specification of ProKT, 1.3 and T1-T4 of 7. One step of plain gradient descent shows the gradient behind it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_compress as hc
from hf_compress.training.losses import multilabel_divergence, output_divergence, regression_distance
from tests.proximal_by_hand import divergence
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding


ROWS, RATE = 6, 0.5


class Table(PreTrainedModel):
    """Logits of each example, which are its parameters."""

    config_class = PretrainedConfig

    def __init__(self, values, kind="classes"):
        problem = {"classes": "single_label_classification", "labels": "multi_label_classification"}.get(kind, kind)
        super().__init__(PretrainedConfig(num_labels=values.shape[1], problem_type=problem))
        self.values, self.kind = nn.Parameter(values.clone()), kind

    def forward(self, input_ids, labels=None, **options):
        logits, loss = self.values[input_ids[:, 0]], None
        if labels is not None:
            loss = own_loss(logits, labels, self.kind)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def own_loss(logits, labels, kind):
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels)
    return (F.binary_cross_entropy_with_logits if kind == "labels" else F.cross_entropy)(logits, labels)


def drawn(classes, kind="classes", seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(ROWS, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "regression":
        labels = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    elif kind == "labels":
        labels = torch.randint(2, (ROWS, classes), generator=generator).double()
    else:
        labels = torch.randint(classes, (ROWS,), generator=generator)
    return student, teacher, labels


def walked(folder, student, teacher, labels, kind="classes", updates=1, rate=RATE, teacher_rate=RATE, **options):
    """Both tables after this many updates on all rows at once."""
    args = hc.ProximalArguments(
        str(folder), max_steps=updates, per_device_train_batch_size=ROWS, optim="sgd", learning_rate=rate,
        teacher_learning_rate=teacher_rate, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
        zero_init_heads=False, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        save_teacher=False, logging_steps=1, **options,
    )  # fmt: skip

    class InOrder(hc.ProximalTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    trainer = InOrder(
        Table(student, kind), Table(teacher, kind), args,
        train_dataset=[{"input_ids": torch.tensor([row]), "labels": labels[row]} for row in range(ROWS)],
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )  # fmt: skip
    trainer.train()
    return trainer.model.values.detach(), trainer.teacher_model.values.detach(), trainer


@pytest.mark.parametrize(("classes", "weight"), [(2, 0.3), (5, 0.4), (5, 0.0), (3, 0.95)])
def test_gradients(tmp_path, classes, weight):
    """The teacher's is (q - m) / B with m = (1 - weight) e_y + weight p; the student's (p - q') / B."""
    student, teacher, labels = drawn(classes)
    p, q, e = student.softmax(-1), teacher.softmax(-1), F.one_hot(labels, classes).double()
    after = walked(tmp_path, student, teacher, labels, proximal_weight=weight)
    mixture = (1 - weight) * e + weight * p
    assert_equal_to_rounding(after[1], teacher - RATE * (q - mixture) / ROWS)
    assert_equal_to_rounding(after[0], student - RATE * (p - after[1].softmax(-1)) / ROWS)
    # The teacher before its step is another one.
    assert differ_beyond_rounding(after[0], student - RATE * (p - q) / ROWS)


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@pytest.mark.parametrize("kind", ["classes", "labels", "regression"])
def test_gradients_agree_with_differences(tmp_path, kind, direction):
    classes, weight, step = 1 if kind == "regression" else 4, 0.4, 1e-6
    student, teacher, labels = drawn(classes, kind)
    _, after, _ = walked(
        tmp_path, student, teacher, labels, kind, proximal_weight=weight, proximal_direction=direction
    )  # fmt: skip

    def loss(logits):
        pair = (student, logits) if direction == "student_teacher" else (logits, student)
        return (1 - weight) * own_loss(logits, labels, kind) + weight * divergence(*pair, kind)

    slopes = torch.empty_like(teacher)
    for place in range(teacher.numel()):
        change = torch.zeros_like(teacher)
        change.view(-1)[place] = step
        slopes.view(-1)[place] = (loss(teacher + change) - loss(teacher - change)) / (2 * step)
    found = (teacher - after) / RATE
    assert float((found - slopes).abs().max()) < 1e-6 * float(slopes.abs().max())


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_the_teacher_learns_smoothed_labels(tmp_path, weight):
    """Its loss is the cross-entropy against m less what does not depend on it; the regression twin likewise."""
    student, teacher, labels = drawn(5)
    _, _, trainer = walked(tmp_path / "classes", student, teacher, labels, proximal_weight=weight)
    p, log_q = student.softmax(-1), teacher.log_softmax(-1)
    mixture = (1 - weight) * F.one_hot(labels, 5).double() + weight * p
    expected = -(mixture * log_q).sum(-1).mean() + weight * (p * p.log()).sum(-1).mean()
    found = next(entry["loss/teacher"] for entry in trainer.state.log_history if "loss/teacher" in entry)
    assert found == pytest.approx(float(expected), abs=1e-6)

    student, teacher, labels = drawn(1, "regression")
    _, after, _ = walked(
        tmp_path / "numbers", student, teacher, labels, "regression", proximal_weight=weight
    )  # fmt: skip
    mixture = (1 - weight) * labels[:, None] + weight * student
    assert_equal_to_rounding(after, teacher - RATE * 2 * (teacher - mixture) / ROWS)


@pytest.mark.parametrize("weight", [0.3, 0.8])
def test_a_teacher_that_can_say_everything_teaches_the_labels(tmp_path, weight):
    """Its loss, convex in free logits, is least at m, at the distance (1 - weight) (1 - p_y) from the student.

    The student's gradient is then (1 - weight) times that of the labels.
    """
    student, _, labels = drawn(3)
    p, e = student.softmax(-1), F.one_hot(labels, 3).double()
    optimum = ((1 - weight) * e + weight * p).log()
    assert_equal_to_rounding((p - optimum.exp()).abs().sum(-1) / 2, (1 - weight) * (1 - (p * e).sum(-1)))
    student_after, teacher_after, _ = walked(tmp_path, student, optimum, labels, proximal_weight=weight)
    assert_equal_to_rounding(teacher_after, optimum)
    assert_equal_to_rounding(student_after, student - RATE * (1 - weight) * (p - e) / ROWS)


def test_a_constant_for_each_row_changes_nothing(tmp_path):
    student, teacher, labels = drawn(4)
    shifts = torch.linspace(-3, 3, ROWS, dtype=torch.float64)[:, None]
    plain = walked(tmp_path / "plain", student, teacher, labels)
    moved = walked(tmp_path / "moved", student + shifts, teacher - 2 * shifts, labels)
    assert_equal_to_rounding(moved[0] - shifts, plain[0])
    assert_equal_to_rounding(moved[1] + 2 * shifts, plain[1])


def test_divergences_vanish_for_equal_logits_alone():
    student, teacher, _ = drawn(5)
    shifted = student + torch.arange(ROWS)[:, None]
    assert abs(float(output_divergence(student, shifted, 1.0))) < 1e-12
    assert float(output_divergence(teacher, student, 1.0)) > 1e-2
    for precise in (output_divergence, multilabel_divergence):
        low = precise(teacher.bfloat16(), student.bfloat16(), 1.0)
        high = precise(teacher.float(), student.float(), 1.0)
        assert low.dtype == torch.float32
        assert abs(float(low - high)) < 1e-2
    assert_equal_to_rounding(regression_distance(teacher, student), (teacher - student).square().mean())


def test_the_divergence_is_from_the_student(tmp_path):
    """The first argument is the fixed distribution: KL(p || q), not KL(q || p)."""
    student, teacher, labels = drawn(5)
    for direction, pair in (("student_teacher", (student, teacher)), ("teacher_student", (teacher, student))):
        _, _, trainer = walked(tmp_path / direction, student, teacher, labels, proximal_direction=direction)
        found = next(e["loss/proximal"] for e in trainer.state.log_history if "loss/proximal" in e)
        assert found == pytest.approx(float(divergence(*pair)), abs=1e-6)
    assert differ_beyond_rounding(divergence(student, teacher), divergence(teacher, student))
