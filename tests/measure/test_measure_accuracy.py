"""Accuracy, top-k, the confusion matrix, classes and intervals against counting by hand."""

import itertools
import math

import pytest
import torch
from scipy.stats import binomtest

from clearwing.measure.accuracy import (
    ClassAccuracy,
    accuracy,
    confusion_matrix,
    cross_entropy,
    mcnemar,
    per_class,
    topk_accuracy,
    wilson_interval,
)
from clearwing.types import ClearwingError

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [2.0, 3.0, 1.0]])
LABELS = torch.tensor([0, 1, 2, 2])


def test_accuracy_and_top_k():
    assert accuracy(LOGITS, LABELS) == 0.5
    assert topk_accuracy(LOGITS, LABELS, 1) == 0.5
    assert topk_accuracy(LOGITS, LABELS, 2) == 0.75
    assert topk_accuracy(LOGITS, LABELS, 3) == 1.0


def test_cross_entropy_is_the_mean_negative_log_likelihood():
    expected = [
        -math.log(math.exp(row[y]) / sum(map(math.exp, row))) for row, y in zip(LOGITS.tolist(), LABELS, strict=True)
    ]
    assert cross_entropy(LOGITS, LABELS) == pytest.approx(sum(expected) / 4)


def test_confusion_has_true_rows_and_predicted_columns():
    predicted = LOGITS.argmax(1)
    matrix = confusion_matrix(predicted, LABELS, 4)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for true, taken_for in zip(LABELS, predicted, strict=True):
        expected[true, taken_for] += 1
    assert torch.equal(matrix, expected)
    assert matrix[2, 1] == 2


def test_per_class_has_counts_and_intervals():
    rows = per_class(confusion_matrix(LOGITS.argmax(1), LABELS, 4), ["ape", "bee", "cat", "dog"])
    assert rows[0] == ClassAccuracy("ape", 1, 1, 1.0, wilson_interval(1, 1))
    assert (rows[2].correct, rows[2].n, rows[2].accuracy) == (0, 2, 0.0)
    assert rows[3] == ClassAccuracy("dog", 0, 0, None, (0.0, 1.0))  # no picture: nothing is known


def test_wilson_interval_solves_its_equation():
    """The ends p of the interval are where |x/n - p| = z sqrt(p (1 - p) / n) (Wilson 1927)."""
    for correct, n in ((0, 10), (7, 10), (95, 100), (10, 10), (9300, 10000)):
        for p in wilson_interval(correct, n):
            distance = abs(correct / n - p)
            assert distance == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-5, abs=1e-7)
    assert wilson_interval(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    low, high = wilson_interval(7, 10, level=0.5)
    assert wilson_interval(7, 10)[0] < low < 0.7 < high < wilson_interval(7, 10)[1]


@pytest.mark.parametrize("n", range(9))
def test_mcnemar_is_the_share_of_coin_throws_at_least_as_uneven(n):
    throws = [abs(2 * sum(heads) - n) for heads in itertools.product((0, 1), repeat=n)]
    for first in range(n + 1):
        as_uneven = sum(uneven >= abs(2 * first - n) for uneven in throws) / len(throws)
        assert mcnemar(first, n - first) == pytest.approx(as_uneven, abs=1e-15)


@pytest.mark.parametrize("counts", [(3, 12), (0, 40), (130, 180), (5000, 5200), (0, 3000)])
def test_mcnemar_is_scipys_binomial_test(counts):
    assert mcnemar(*counts) == mcnemar(*counts[::-1])
    assert mcnemar(*counts) == pytest.approx(binomtest(counts[0], sum(counts)).pvalue, rel=1e-9, abs=0)


@pytest.mark.parametrize("score", [accuracy, topk_accuracy, cross_entropy])
def test_scores_need_labels(score):
    with pytest.raises(ClearwingError, match=r"labels: None; .*predict"):
        score(LOGITS, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy(LOGITS, LABELS[:3]), r"labels: torch.int64 \(3,\); give class indices \(4,\)"),
        (lambda: accuracy(LOGITS, LABELS + 1), "labels: 1 to 3; give class indices from 0 to 2"),
        (lambda: accuracy(LOGITS, LABELS.float()), r"labels: torch.float32 \(4,\)"),
        (lambda: accuracy(LOGITS * math.nan, LABELS), "logits: NaN or infinity"),
        (lambda: accuracy(LOGITS[0], LABELS), r"logits: \(3,\)"),
        (lambda: topk_accuracy(LOGITS, LABELS, 5), "k: 5; give a number from 1 to the number of classes, 3"),
        (lambda: confusion_matrix(LABELS, None, 3), "labels: None"),
        (lambda: confusion_matrix(LABELS, LABELS, 2), "labels: 0 to 2; give class indices from 0 to 1"),
        (lambda: confusion_matrix(LABELS + 5, LABELS, 3), "predicted: 5 to 7"),
        (lambda: per_class(torch.zeros(3, 3), ["a"]), "class_names: 1 names"),
        (lambda: wilson_interval(5, 4), "correct: 5"),
        (lambda: wilson_interval(1, 4, level=95), "level: 95"),
        (lambda: mcnemar(3, -1), "only_second: -1"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ClearwingError, match=message):
        call()
