"""The LR range test: train a copy with a learning rate that grows at every step, and see where the loss falls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from clearwing.train.fit import Loss, fit
from clearwing.train.optim import SAM
from clearwing.train.schedule import Steps
from clearwing.types import Batch, ClearwingError

SURE = 4.0
"""A slope is a descent where it is below zero by so many of its standard errors."""
SPAN = 1 / 12
"""The slope at a step is taken between so large a share of the steps before it and after it."""
SKIPPED = 1 / 10
"""So large a share of the steps is passed over at the beginning: their average is of few batches."""


@dataclass(frozen=True)
class RangeTest:
    """What `range_test` saw, a value a step, and the learning rates that it suggests (None where nothing was learned).

    `suggestion` is where the smoothed loss falls fastest over log lr (`steep` in fastai); `minimum_tenth` is a tenth
    of the rate at which it is lowest (`minimum` there), in most runs the more careful of the two.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]  # raw: of each step's batch, before the step
    smoothed: tuple[float, ...]
    suggestion: float | None
    minimum_tenth: float | None
    diverged: bool  # before the highest rate was reached

    def __str__(self) -> str:
        low, high = self.lrs[0], self.lrs[-1]
        if self.suggestion is None or self.minimum_tenth is None:
            return (
                f"no suggestion: between {low:.2g} and {high:.2g} the loss does not fall by more than its noise; "
                "take more steps, larger batches or another range"
            )
        text = (
            f"suggested learning rate: {self.suggestion:.2g} (where the smoothed loss falls fastest over log lr)\n"
            f"to compare: {self.minimum_tenth:.2g} (a tenth of the rate at which it is lowest)"
        )
        if 10 * self.minimum_tenth > 0.9 * high and not self.diverged:
            text += f"\nthe loss still falls at {high:.2g}: look at higher rates, too"
        return text


def range_test(
    module: nn.Module,
    batches: Callable[[int, int], Iterable[Batch]],
    loss: Loss,
    *,
    optimizer: torch.optim.Optimizer,
    fabric: Fabric,
    reference: float | None = None,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    smooth: float = 0.95,
    stop: float = 4.0,
    accumulate: int = 1,
    clip: float = 0.0,
    sam: SAM | None = None,
    prepare: Callable[[nn.Module, int], None] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> RangeTest:
    """Train a copy of `module` for `steps` steps of `fit`, while the learning rate grows geometrically, low to high.

    The range test of Smith 2017 (Cyclical Learning Rates for Training Neural Networks, section 3.3), over log lr as in
    fastai. Every group of `optimizer` keeps its ratio to `reference`, the rate that these rates stand for: by default
    the largest of the groups. The loss is smoothed by an exponential average, `smooth` being the weight of what went
    before; the test ends early where that average is over `stop` times its minimum, or the loss is not finite.
    `batches`, `loss`, `accumulate`, `clip`, `sam` and `prepare` are those of `fit`; `progress` is called with the
    steps done and all steps.

    The module, the optimizer and the random numbers are as before afterwards, to the bit: deep copies are trained, so
    weights and optimizer state take twice their memory meanwhile.

    Raises ClearwingError for settings that cannot be meant.

    >>> found = range_test(model, batches, classification(), optimizer=optimizer(model, "sgd", 0.1), fabric=fabric)
    >>> found.suggestion, found.minimum_tenth
    """
    _check(low, high, steps, smooth, stop)
    plan = _Rising(loss, steps, smooth, stop, accumulate, fabric, progress)
    with torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []):
        trained, stepped = _copies(module, optimizer, reference)
        try:
            state = fit(
                trained,
                batches,
                plan.noted,
                optimizer=stepped,
                schedule=lambda p: low * (high / low) ** p,
                plan=plan,
                fabric=fabric,
                accumulate=accumulate,
                clip=clip,
                sam=sam,
                prepare=prepare,
            )
            if state.interrupted:
                raise KeyboardInterrupt
        except ClearwingError:  # that of a loss that is not finite is what is looked for here
            plan.read()
            if not plan.diverged or not plan.losses:
                raise
    lrs = [low * (high / low) ** plan.progress(i) for i in range(len(plan.losses))]
    smoothed, suggestion, minimum = suggest(lrs, plan.losses, smooth, steps)
    tenth = None if minimum is None else minimum / 10
    return RangeTest(tuple(lrs), tuple(plan.losses), tuple(smoothed), suggestion, tenth, plan.diverged)


def suggest(
    lrs: Sequence[float], losses: Sequence[float], smooth: float = 0.95, steps: int | None = None
) -> tuple[list[float], float | None, float | None]:
    """The smoothed losses, the rate where they fall fastest over log lr, and the rate where they are lowest.

    The average is exponential and corrected for its start as in Kingma and Ba 2015, section 3; the slope at step i is
    its difference between a few steps after i and a few before. Of slopes that are within a standard error of the
    steepest, that at the largest rate is taken: on a long even slope the steepest step is a matter of chance. Both
    rates are None where no slope is clearly below zero. `steps` is the number of steps of the test in full.
    """
    n, steps = len(losses), steps or len(losses)
    first, span = math.ceil(SKIPPED * steps), max(1, round(SPAN * steps))
    values = torch.tensor(losses, dtype=torch.float64)
    age = torch.arange(n)[:, None] - torch.arange(n)
    weights = torch.tril(smooth ** age.clamp(min=0).double())
    weights /= weights.sum(1, keepdim=True)  # (n, n): smoothed i = sum over j of weights ij x loss j
    smoothed = weights @ values
    if n <= first + span:
        return smoothed.tolist(), None, None
    lowest = first + int(smoothed[first:].argmin())
    middle = torch.arange(first, min(lowest + 1, n - span))
    difference = weights[middle + span] - weights[middle - span]
    slope = difference @ values
    # A trend that bends little cancels in second differences: what is left is the noise of a batch, times sqrt 6.
    noise = 1.4826 * values[: lowest + 1].diff(n=2).abs().median() / math.sqrt(6)
    error = noise * difference.norm(dim=1)
    clear = slope < -SURE * error - 1e-9 * values.abs().max()  # more than rounding
    if not clear.any():
        return smoothed.tolist(), None, None
    steepest = torch.where(clear, slope, torch.inf).argmin()
    as_steep = clear & (slope <= slope[steepest] + error[steepest])
    return smoothed.tolist(), lrs[int(middle[as_steep][-1])], lrs[lowest]


class _Rising(Steps):
    """So many steps, or fewer where the loss diverges; notes the loss of each."""

    def __init__(
        self,
        loss: Loss,
        steps: int,
        smooth: float,
        stop: float,
        accumulate: int,
        fabric: Fabric,
        tell: Callable[[float, float], None] | None,
    ) -> None:
        super().__init__(steps)
        self.loss, self.smooth, self.stop, self.accumulate = loss, smooth, stop, accumulate
        self.fabric, self.tell = fabric, tell
        self.pending: list[Tensor] = []  # of the batches since the last reading
        self.losses: list[float] = []
        self.average, self.best, self.diverged = 0.0, math.inf, False

    def noted(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        value, correct = self.loss(module, batch)
        self.pending.append(value.detach())
        return value, correct

    def progress(self, step: int) -> float:
        return step / (self.total - 1)

    def over(self, step: int) -> bool:
        self.read()
        return self.diverged or super().over(step)

    def read(self) -> None:
        """Take in the loss of the step that is behind."""
        if not self.pending:
            return
        # SAM asks for the loss a second time, elsewhere
        value: Any = self.fabric.all_reduce(torch.stack(self.pending[: self.accumulate]).mean(), reduce_op="mean")
        self.pending, loss = [], float(value)
        self.diverged = not math.isfinite(loss)
        if not self.diverged:
            self.losses.append(loss)
            self.average = self.smooth * self.average + (1 - self.smooth) * loss
            corrected = self.average / (1 - self.smooth ** len(self.losses))
            self.best = min(self.best, corrected)
            self.diverged = corrected > self.best + (self.stop - 1) * abs(self.best)
        if self.tell is not None:
            self.tell(self.total if self.diverged else len(self.losses), self.total)


def _copies(
    module: nn.Module, optimizer: torch.optim.Optimizer, reference: float | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Copies of a module and its optimizer that belong together; the peak rates are relative to the reference."""
    trained, stepped = copy.deepcopy((module, optimizer))
    stepped._optimizer_step_pre_hooks.update(optimizer._optimizer_step_pre_hooks)  # a copy comes without them
    stepped._optimizer_step_post_hooks.update(optimizer._optimizer_step_post_hooks)
    peaks = [float(group.get("peak_lr", group["lr"])) for group in stepped.param_groups]
    for group, peak in zip(stepped.param_groups, peaks, strict=True):
        group["peak_lr"] = peak / (reference or max(peaks))
    return trained, stepped


def _check(low: float, high: float, steps: int, smooth: float, stop: float) -> None:
    if not 0 < low < high < math.inf:
        raise ClearwingError("low, high", f"{low:g}, {high:g}", "give two rates, 0 < low < high")
    if steps < 20:
        raise ClearwingError("steps", steps, "give at least 20: fewer say nothing")
    if not 0 <= smooth < 1:
        raise ClearwingError("smooth", smooth, "give a weight from 0 to below 1")
    if not stop > 1:
        raise ClearwingError("stop", stop, "give a factor above 1")
