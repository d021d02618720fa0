"""What is to be explained: `target` read at the door, and the score of each picture that follows from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from clearwing.attribution.trace import check_classes
from clearwing.types import ClearwingError, near

Target = str | int | Tensor | tuple[str | int, str | int] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """One score of each picture: the logit of a class, less that of another for a contrast, or a caller's function."""

    classes: Tensor  # (N,) int64; -1 where `function` is asked
    against: Tensor | None = None  # (N,)
    function: Callable[[Tensor], Tensor] | None = None  # (N, K) -> (N,)

    def of(self, logits: Tensor) -> Tensor:
        """The scores (..., N) of logits (..., N, K); also under `no_grad` and `inference_mode`, with a graph."""
        with torch.inference_mode(False), torch.enable_grad():
            if self.function is not None:
                flat = [_called(self.function, one) for one in logits.reshape(-1, *logits.shape[-2:])]
                return torch.stack(flat).reshape(logits.shape[:-1])
            picked = _pick(logits, self.classes)
            return picked if self.against is None else picked - _pick(logits, self.against)

    def shares(self, logits: Tensor) -> Tensor:
        """The same of the probabilities, softmax(logits); a caller's function is given the logits."""
        return self.of(logits if self.function is not None else logits.softmax(-1))


@dataclass(frozen=True)
class Asked:
    """`target`, read before the network runs: one of the three."""

    classes: Tensor | None = None  # (N, M)
    against: Tensor | None = None  # (N, M)
    top: int = 0  # the so many largest logits
    function: Callable[[Tensor], Tensor] | None = None
    argument: str = "target"  # to name in an error

    def questions(self, logits: Tensor, part: slice) -> list[Question]:
        """M questions on the pictures in `part`, whose logits (n, K) these are."""
        n, k = logits.shape
        if self.function is not None:
            return [Question(torch.full((n,), -1, device=logits.device), function=self.function)]
        if self.top > k:
            raise ClearwingError("target", f"top-{self.top}", f"the model has {k} classes")
        if self.classes is None:
            # stable: of equal logits the first comes first, as argmax has it
            order = logits.detach().argsort(dim=1, descending=True, stable=True)
            return [Question(classes) for classes in order[:, : self.top].unbind(1)]
        for wanted in (self.classes, self.against):
            if wanted is not None:
                check_classes(self.argument, wanted[part], k)
        classes = self.classes[part].unbind(1)
        if self.against is None:
            return [Question(one) for one in classes]
        return [Question(one, other) for one, other in zip(classes, self.against[part].unbind(1), strict=True)]


def read_target(target: Target, labels: Any, class_names: tuple[str, ...], images: Tensor) -> Asked:
    """Read `target` for images (N, C, H, W); everything but the number of classes is checked here.

    Raises ClearwingError for what is no target, and for labels that are missing or do not fit.
    """
    n, device = len(images), images.device

    def same(one: Any) -> Tensor:
        return torch.full((n, 1), _class_number(one, class_names), device=device)

    if isinstance(target, str):
        if target == "pred":
            return Asked(top=1)
        if target == "label":
            if labels is None:
                raise ClearwingError("target", "label", "give labels=, or a Batch that has them")
            try:
                numbers = torch.as_tensor(labels, device=device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ClearwingError("labels", labels, f"give class numbers, one for each picture: ({n},)") from error
            return Asked(_class_tensor("labels", numbers, n, (1,)), argument="labels")
        if top := re.fullmatch(r"top-([1-9]\d*)", target):
            return Asked(top=int(top[1]))
        return Asked(same(target))
    if isinstance(target, Tensor) and target.ndim > 0:
        return Asked(_class_tensor("target", target.to(device), n))
    if isinstance(target, Tensor):
        return read_target(target.item(), labels, class_names, images)  # type: ignore[arg-type]
    if isinstance(target, Integral) and not isinstance(target, bool):
        return Asked(same(target))
    if isinstance(target, tuple) and len(target) == 2:
        return Asked(same(target[0]), same(target[1]))
    if callable(target):
        return Asked(function=target)
    mend = 'give "pred", "label", "top-3", a class, a pair of them, a tensor (N,) of them or a function of the logits'
    raise ClearwingError("target", target, mend)


def _class_number(one: Any, class_names: Sequence[str]) -> int:
    if isinstance(one, Integral) and not isinstance(one, bool):
        return int(one)
    if one in class_names:
        return class_names.index(one)
    if class_names:
        raise ClearwingError("target", one, near(str(one), class_names))
    mend = 'the model has no class names; give "pred", "label", "top-3" or a number, or clearwing.wrap it with names'
    raise ClearwingError("target", one, mend)


def _class_tensor(argument: str, classes: Tensor, n: int, dimensions: tuple[int, ...] = (1, 2)) -> Tensor:
    inexact = classes.is_floating_point() or classes.dtype == torch.bool
    if inexact or classes.ndim not in dimensions or len(classes) != n:
        mend = f"give class numbers, one for each picture: ({n},)"
        raise ClearwingError(argument, f"{classes.dtype} {tuple(classes.shape)}", mend)
    return classes.long().reshape(n, -1)


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    index = classes.clone().expand(logits.shape[:-1])[..., None]  # a clone: autograd does not save an inference tensor
    return logits.gather(-1, index)[..., 0]


def _called(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    scores = function(logits)
    n = len(logits)
    if not isinstance(scores, Tensor) or scores.shape != (n,) or (logits.requires_grad and scores.grad_fn is None):
        what = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        mend = f"the function must give one differentiable score a picture, ({n},)"
        raise ClearwingError("target", what, mend)
    return scores
