"""Labels of teachers are matched by name: another order is put right, other labels are refused."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, PretrainedConfig

from hf_compress.training.teacher_fit import teacher_label_order
from hf_compress.training.teachers import FixedTeacher
from tests.crash_program import pad
from tests.guided_setup import ROWS, dense, linear, same, trained, trainer_of, weights


NAMES = ("negative", "neutral", "positive")
# The teacher's output for each of NAMES.
ORDER = [2, 0, 1]


def named(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def permuted(model, order=ORDER):
    """The same classifier, whose outputs stand in another order under their names."""
    model = copy.deepcopy(model)
    names = [model.config.id2label[i] for i in range(len(order))]
    with torch.no_grad():
        for tensor in (model.classifier.weight, model.classifier.bias):
            old = tensor.clone()
            for ours, theirs in enumerate(order):
                tensor[theirs] = old[ours]
    model.config.update(named([names[order.index(i)] for i in range(len(order))]))
    return model


def student():
    model = linear(0)
    wide = dense(0, num_labels=3)
    model.classifier, model.num_labels = wide.classifier, 3
    model.config.update(named(NAMES))
    return model


@pytest.mark.parametrize(("ours", "theirs", "expected"), [
    (NAMES, NAMES, None),
    (NAMES, ("NEGATIVE", "Neutral", " positive"), None),
    (NAMES, ("neutral", "positive", "negative"), ORDER),
    (NAMES, ("LABEL_0", "LABEL_1", "LABEL_2"), None),
    (("0", "1", "2"), NAMES, None),
    (("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1"), None),
    (("LABEL_1", "LABEL_0", "x"), ("x", "LABEL_1", "LABEL_0"), [1, 2, 0]),
    (("not_entailment", "entailment"), ("entailment", "not entailment"), [1, 0]),
    (("us", "US"), ("US", "us"), [1, 0]),
    (NAMES, ("negative", "neutral", "good"), "must have the student's labels"),
    (("a", "a", "b"), ("a", "b", "b"), "must have the student's labels"),
    (NAMES, NAMES[:2], "must have the student's 3 labels, got 2"),
])  # fmt: skip
def test_order_of_labels(ours, theirs, expected):
    configs = [PretrainedConfig(**named(names)) for names in (ours, theirs)]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            teacher_label_order(*configs)
    else:
        assert teacher_label_order(*configs) == expected


@pytest.mark.parametrize("cached", [False, True])
def test_a_permuted_teacher_teaches_the_same(tmp_path, cached):
    teacher, ends = dense(1, num_labels=3, **named(NAMES)), []
    for name, one in (("plain", teacher), ("permuted", permuted(teacher)), ("again", permuted(teacher))):
        options = {"teacher_cache_dir": str(tmp_path / f"cache of {name[:5]}")} if cached else {}
        ends.append(trained("fixed", tmp_path / name, student(), copy.deepcopy(one), alpha_output=5.0, **options))
    for key, value in ends[0].items():
        for other in ends[1:]:
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


def test_labels_of_tokens_are_permuted_too():
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16, **named(NAMES)}  # fmt: skip
    teacher, batch = BertForTokenClassification(BertConfig(**sizes)), pad(ROWS[:4])
    other = permuted(teacher)
    seen = FixedTeacher(other, label_order=teacher_label_order(teacher.config, other.config)).forward(batch).logits[0]
    torch.testing.assert_close(seen, FixedTeacher(teacher).forward(batch).logits[0], rtol=0, atol=1e-6)


def snapshots_of(folder, models):
    for number, model in enumerate(models, 1):
        model.save_pretrained(folder / f"checkpoint-{number}")
    return [str(folder / "checkpoint-*")]


def test_a_permuted_series_teaches_the_same(tmp_path):
    models, ends = [dense(seed, num_labels=3, **named(NAMES)) for seed in (11, 12)], []
    for name, change in (("plain", copy.deepcopy), ("permuted", permuted)):
        folders = snapshots_of(tmp_path / name, [change(model) for model in models])
        ends.append(trained("snapshots", tmp_path / "out", student(), alpha_output=5.0, teacher_snapshots=folders))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-5)


def test_a_later_snapshot_with_other_labels_is_refused_before_the_start(tmp_path):
    model = dense(11, num_labels=3, **named(NAMES))
    folders = snapshots_of(tmp_path / "snapshots", [model, permuted(model)])
    with pytest.raises(
        ValueError, match=r"states of one model: .*checkpoint-2' has id2label=.*checkpoint-1' has id2l"
    ):
        trainer_of("snapshots", tmp_path / "out", student(), alpha_output=1.0, teacher_snapshots=folders)


@pytest.mark.parametrize("alpha_output", [0.0, 1.0])
def test_a_learning_teacher_counts_labels_as_its_student(tmp_path, alpha_output):
    model = dense(1, num_labels=3, **named(NAMES))
    with pytest.raises(ValueError, match="A teacher that learns must count its labels as the student does"):
        trainer_of("joint", tmp_path, student(), permuted(model), alpha_output=alpha_output)
    teacher = copy.deepcopy(model)
    trained("joint", tmp_path, student(), teacher, alpha_output=alpha_output)
    assert not same(weights(teacher), weights(model))
