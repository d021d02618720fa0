"""How well classes are told apart, with how sure that is: accuracy, top-k, per class, confusion, loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from clearwing.types import ClearwingError


@dataclass(frozen=True)
class ClassAccuracy:
    """How many pictures of one class were recognised."""

    name: str
    correct: int
    n: int
    accuracy: float | None  # None where the class has no picture
    interval: tuple[float, float]  # Wilson, 95 % unless asked otherwise


def accuracy(logits: Tensor, labels: Tensor | None) -> float:
    """The share of pictures whose largest logit is their label's; logits (N, K), labels (N,)."""
    labels = _check(logits, labels)
    return (logits.argmax(1) == labels).double().mean().item()


def topk_accuracy(logits: Tensor, labels: Tensor | None, k: int = 5) -> float:
    """The share of pictures whose label is among their k largest logits; logits (N, K), labels (N,), k at most K."""
    labels = _check(logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ClearwingError("k", k, f"give a number from 1 to the number of classes, {logits.shape[1]}")
    return (logits.topk(k, 1).indices == labels[:, None]).any(1).double().mean().item()


def cross_entropy(logits: Tensor, labels: Tensor | None) -> float:
    """Mean negative log-likelihood in nats; logits (N, K), labels (N,)."""
    labels = _check(logits, labels)
    return F.cross_entropy(logits.double(), labels).item()


def confusion_matrix(predicted: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """Counts int64 (K, K): row i, column j holds the pictures of true class i that were taken for class j.

    `predicted` and `labels` are class indices (N,).
    """
    labels = _labels(labels, len(predicted), num_classes)
    predicted = _labels(predicted, len(labels), num_classes, "predicted")
    pairs = labels * num_classes + predicted.to(labels.device)
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def per_class(confusion: Tensor, class_names: Sequence[str], level: float = 0.95) -> list[ClassAccuracy]:
    """The accuracy of every class with its interval, from a confusion matrix (K, K), in the order of `class_names`."""
    if confusion.shape != (len(class_names), len(class_names)):
        raise ClearwingError("class_names", f"{len(class_names)} names", f"for a matrix {tuple(confusion.shape)}")
    rows = []
    for name, correct, n in zip(class_names, confusion.diag().tolist(), confusion.sum(1).tolist(), strict=True):
        interval = wilson_interval(correct, n, level)
        rows.append(ClassAccuracy(name, correct, n, correct / n if n else None, interval))
    return rows


def wilson_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share, Wilson 1927: (low, high). With n = 0 nothing is known: (0, 1).

    >>> low, high = wilson_interval(95, 100)  # 0.888, 0.978
    """
    if not 0 <= correct <= n:
        raise ClearwingError("correct", correct, f"give a count from 0 to n, {n}")
    if not 0 < level < 1:
        raise ClearwingError("level", level, "give a level between 0 and 1, such as 0.95")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test of two classifiers on the same pictures, Dietterich 1998, section 3.1: the two-sided p.

    Of the n pictures that one of them alone gets right, n_10 = `only_first` and n_01 = `only_second`, each is equally
    likely to be either's where both err equally often: p = 2 P(Binomial(n, 1/2) <= min(n_10, n_01)), at most 1.

    >>> mcnemar(3, 12)  # 0.035
    """
    for name, count in (("only_first", only_first), ("only_second", only_second)):
        if count < 0:
            raise ClearwingError(name, count, "give a count of pictures, 0 or more")
    n = only_first + only_second
    term = tail = 1  # binomial coefficients, as integers: exact at any n
    for k in range(min(only_first, only_second)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def _check(logits: Tensor, labels: Tensor | None) -> Tensor:
    if logits.ndim != 2 or not logits.numel():
        raise ClearwingError("logits", tuple(logits.shape), "give logits (N, K) of at least one picture")
    if not bool(logits.isfinite().all()):
        raise ClearwingError("logits", "NaN or infinity", "the network's output is broken; look at its weights")
    return _labels(labels, len(logits), logits.shape[1]).to(logits.device)


def _labels(labels: Tensor | None, n: int, num_classes: int, argument: str = "labels") -> Tensor:
    if labels is None:
        raise ClearwingError(argument, None, "accuracy needs labels; without them use predict")
    if labels.shape != (n,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ClearwingError(argument, f"{labels.dtype} {tuple(labels.shape)}", f"give class indices ({n},)")
    if n and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        value = f"{int(labels.min())} to {int(labels.max())}"
        raise ClearwingError(argument, value, f"give class indices from 0 to {num_classes - 1}")
    return labels.long()
