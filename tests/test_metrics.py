"""The metrics of GLUE against counts by hand and against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from hf_compress.report.quality import evaluate_model, predict
from hf_compress.tasks.metrics import classification_metrics, main_metric, regression_metrics, task_metrics
from hf_compress.tasks.sources import DataArguments, load_task


def counted(tp, fp, fn, tn):
    """Predictions and labels with the given confusion counts, in a shuffled order."""
    pairs = np.array([(1, 1)] * tp + [(1, 0)] * fp + [(0, 1)] * fn + [(0, 0)] * tn)
    np.random.default_rng(0).shuffle(pairs)
    return pairs[:, 0], pairs[:, 1]


def test_two_classes_by_hand():
    found = classification_metrics(*counted(tp=6, fp=3, fn=1, tn=2))
    assert found["accuracy"] == pytest.approx(8 / 12)
    precision, recall = 6 / 9, 6 / 7
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["matthews_correlation"] == pytest.approx((6 * 2 - 3 * 1) / np.sqrt(9 * 7 * 5 * 3))


@pytest.mark.parametrize("seed", range(3))
def test_matthews_is_pearson_of_the_two_indicators(seed):
    labels, predictions = np.random.default_rng(seed).integers(0, 2, (2, 50))
    found = classification_metrics(predictions, labels)["matthews_correlation"]
    assert found == pytest.approx(stats.pearsonr(predictions, labels).statistic)


def test_matthews_does_not_overflow_on_large_splits():
    # Products of counts this large do not fit 32-bit and nearly not 64-bit integers.
    found = classification_metrics(*counted(tp=40000, fp=10000, fn=20000, tn=30000))
    tp, fp, fn, tn = (int(n) for n in (40000, 10000, 20000, 30000))
    exact = (tp * tn - fp * fn) / float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert found["matthews_correlation"] == pytest.approx(exact)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"tp": 4, "fp": 0, "fn": 0, "tn": 4}, (1.0, 1.0, 1.0)),
        ({"tp": 0, "fp": 4, "fn": 4, "tn": 0}, (0.0, 0.0, -1.0)),
        # Everything called negative: F1 is 0, and Matthews' correlation, 0 / 0, is 0 by convention.
        ({"tp": 0, "fp": 0, "fn": 3, "tn": 5}, (5 / 8, 0.0, 0.0)),
        ({"tp": 3, "fp": 5, "fn": 0, "tn": 0}, (3 / 8, 6 / 11, 0.0)),
        # No positive anywhere: nothing to find, nothing found.
        ({"tp": 0, "fp": 0, "fn": 0, "tn": 5}, (1.0, 0.0, 0.0)),
    ],
)
def test_two_classes_at_the_edges(counts, expected):
    found = classification_metrics(*counted(**counts))
    assert (found["accuracy"], found["f1"], found["matthews_correlation"]) == pytest.approx(expected)


def test_more_than_two_classes_have_accuracy_only():
    assert classification_metrics(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == {"accuracy": 0.75}


def test_correlations_are_those_of_scipy():
    labels = np.array([0.0, 1.0, 2.0, 3.0, 3.0, 5.0])
    predictions = np.array([0.1, 0.9, 2.5, 2.0, 4.0, 30.0])
    found = regression_metrics(predictions, labels)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    # Spearman's is Pearson's of the ranks; ties share the mean rank.
    ranks = np.array([1, 2, 4, 3, 5, 6]), np.array([1, 2, 3, 4.5, 4.5, 6])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_rank_correlation_does_not_see_monotone_changes():
    labels = np.linspace(0, 5, 20)
    found = regression_metrics(np.exp(labels), labels)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] < 0.95


def test_constant_scores_correlate_with_nothing():
    varied, constant = np.arange(4.0), np.full(4, 2.5)
    assert regression_metrics(constant, varied) == {"pearson": 0.0, "spearman": 0.0}
    assert regression_metrics(varied, constant) == {"pearson": 0.0, "spearman": 0.0}
    assert regression_metrics(np.array([1.0]), np.array([2.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_logits_decide_which_metrics_apply():
    logits = np.array([[2.0, 1.0], [0.0, 3.0]])
    assert task_metrics(logits, np.array([0, 1]))["accuracy"] == 1.0
    assert set(task_metrics(np.array([[1.0], [2.0], [4.0]]), np.arange(3.0))) == {"pearson", "spearman"}


def test_the_metric_that_is_shown():
    assert main_metric("cola", 2) == "matthews_correlation"
    assert main_metric("stsb", 1) == "spearman"
    assert main_metric("sst2", 2) == "accuracy"
    assert main_metric("my own", 1) == "spearman"


@pytest.fixture
def task_rows(tmp_path, sentences, tokenizer):
    file = tmp_path / "validation.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences))
    task = load_task(DataArguments(validation_file=str(file), max_length=32))
    return task.encode("validation", tokenizer, 32)


def test_predictions_come_back_in_the_order_of_the_rows(model, tokenizer, task_rows):
    bert = model("bert", "sequence_classification").train()
    found = predict(bert, task_rows, tokenizer, batch_size=7)
    assert bert.training
    bert.eval()
    for place in (0, 13, 63):
        ids = torch.tensor([task_rows[place]["input_ids"]])
        with torch.no_grad():
            alone = bert(input_ids=ids).logits[0]
        torch.testing.assert_close(found[place], alone, atol=1e-5, rtol=1e-5)
    labels = np.array(task_rows["labels"])
    expected = float((found.argmax(-1).numpy() == labels).mean())
    assert evaluate_model(bert, task_rows, tokenizer)["accuracy"] == pytest.approx(expected)


def test_no_rows_have_no_metric(model, tokenizer, task_rows):
    with pytest.raises(ValueError, match="rows must hold at least one example"):
        evaluate_model(model("bert", "sequence_classification"), task_rows.select([]), tokenizer)
