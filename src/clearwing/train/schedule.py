"""Learning-rate schedules as functions of progress, and the plans that say how far a run has come.

A schedule maps progress p in [0, 1] to a factor of the peak learning rate. A plan maps the step to p: by counting
steps, by the clock, or by repeating what an earlier run did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from clearwing.types import ClearwingError, near

Schedule = Callable[[float], float]


def one_cycle(p: float, warm: float = 0.25, start: float = 0.04) -> float:
    """Smith and Topin 2018: up from `start` along a cosine for the share `warm`, then down to 0 along a cosine."""
    if p < warm:
        return start + (1 - start) * (1 - math.cos(math.pi * p / warm)) / 2
    return (1 + math.cos(math.pi * (p - warm) / (1 - warm))) / 2


def cosine(p: float, warm: float = 0.05) -> float:
    """Loshchilov and Hutter 2017, without restarts: a short linear warm-up, then half a cosine down to 0."""
    if p < warm:
        return (p + 0.01) / (warm + 0.01)
    return (1 + math.cos(math.pi * (p - warm) / (1 - warm))) / 2


def step(p: float, drops: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> float:
    """He et al. 2016 section 4.2: divide by ten after a half and after three quarters of the run."""
    return factor ** sum(p >= drop for drop in drops)


def constant(p: float) -> float:
    """The peak learning rate throughout."""
    return 1.0


SCHEDULES: dict[str, Schedule] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "step": step,
    "constant": constant,
}


def schedule(name: str, warmup: float | None = None) -> Schedule:
    """The schedule of that name, rising for the share `warmup` of the run instead of its own.

    Raises ClearwingError for another name, a share outside [0, 1), and for `step` and `constant`, which do not rise.
    """
    if name not in SCHEDULES:
        raise ClearwingError("schedule", name, near(name, list(SCHEDULES)))
    if warmup is None:
        return SCHEDULES[name]
    if not 0 <= warmup < 1:
        raise ClearwingError("--warmup", warmup, "give a share from 0 to below 1")
    if name not in ("one-cycle", "cosine"):
        raise ClearwingError("--warmup", warmup, f"the schedule {name} has none; leave it out")
    rising = one_cycle if name == "one-cycle" else cosine
    return partial(rising, warm=warmup)


class Plan(Protocol):
    """How far a run has come. `step` is always the number of steps taken."""

    def over(self, step: int) -> bool:
        """Whether the run is over; asked before every step."""
        ...

    def progress(self, step: int) -> float:
        """The share of the run that is behind the step to be taken, in [0, 1]."""
        ...

    def took(self, progress: float) -> None:
        """Told of the progress with which a step is taken: that of the process that is furthest."""
        ...

    def share(self, step: int) -> float:
        """The share of the run that `step` steps are, where they are taken already."""
        ...

    def epoch_ended(self, step: int) -> None:
        """Told after every epoch and its validation."""
        ...

    def remaining(self, step: int) -> float | None:
        """Seconds left, where they are known."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore` goes on."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Steps:
    """So many steps."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ClearwingError("epochs", total, "train for at least one step")
        self.total = total

    def over(self, step: int) -> bool:
        return step >= self.total

    def progress(self, step: int) -> float:
        return step / self.total

    def took(self, progress: float) -> None:
        pass

    def share(self, step: int) -> float:
        return step / self.total

    def epoch_ended(self, step: int) -> None:
        pass

    def remaining(self, step: int) -> float | None:
        return None

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def restore(self, state: dict[str, Any]) -> None:
        pass  # the number asked for now holds, so that a run can be made longer


class Replay(Steps):
    """The steps of an earlier run, from the progress that its plan kept."""

    def __init__(self, history: Sequence[float]) -> None:
        if not history or any(not 0 <= p <= 1 for p in history):
            raise ClearwingError("--replay", f"{len(history)} steps", "give the plan.json of a run under a time budget")
        super().__init__(len(history))
        self.history = [float(p) for p in history]

    def progress(self, step: int) -> float:
        return self.history[step]

    def share(self, step: int) -> float:
        return self.history[step - 1] if step else 0.0


class Budget:
    """Progress is the share of `seconds` that was used, so the schedule reaches its end when the time does.

    The progress of every step is kept in `history`: a run that follows it again (`Replay`) takes the same steps at the
    same learning rates. A step is not begun when, at the pace of the last ones, it would end too late.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        if seconds <= 0:
            raise ClearwingError("--time-budget", f"{seconds:.1f} s left for training", "give more time")
        self.seconds, self.clock = seconds, clock
        self.begun = clock()
        self.reserve = 0.0
        self.history: list[float] = []
        self._last: float | None = None
        self._pace = 0.0  # seconds of the slowest of the last steps, forgotten slowly

    @property
    def elapsed(self) -> float:
        return self.clock() - self.begun

    def hold_back(self, seconds: float) -> None:
        """Keep this much of the time for what follows the training: the last validation, saving."""
        self.reserve = min(max(self.reserve, seconds), 0.5 * self.seconds)

    def over(self, step: int) -> bool:
        now = self.elapsed
        if self._last is not None:
            self._pace = max(now - self._last, 0.9 * self._pace)
        self._last = now
        return step > 0 and now + self._pace > self.seconds - self.reserve

    def progress(self, step: int) -> float:
        p = min(self.elapsed / (self.seconds - self.reserve), 1.0)
        return max(p, self.history[-1]) if self.history else p  # a grown reserve never turns it back

    def took(self, progress: float) -> None:
        self.history.append(progress)

    def share(self, step: int) -> float:
        return self.history[step - 1] if step else 0.0

    def epoch_ended(self, step: int) -> None:
        self._last = None  # a validation must not count as the pace of a step

    def remaining(self, step: int) -> float | None:
        return max(self.seconds - self.reserve - self.elapsed, 0.0)

    def state(self) -> dict[str, Any]:
        return {"used": self.elapsed, "reserve": self.reserve, "history": list(self.history)}

    def restore(self, state: dict[str, Any]) -> None:
        self.begun = self.clock() - float(state["used"])
        self.reserve, self.history = float(state["reserve"]), [float(p) for p in state["history"]]
        self._last = None


class FirstEpoch(Budget):
    """The classic alternative: time the first epoch, then plan `share` of the epochs that fit into what is left.

    The first epoch runs at the start of the schedule; the rest of the schedule is spread over the planned epochs.
    """

    def __init__(self, seconds: float, share: float = 0.8, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(seconds, clock)
        self.used_share, self.first, self.total = share, 0, 0

    def over(self, step: int) -> bool:
        return step >= self.total if self.total else super().over(step)

    def progress(self, step: int) -> float:
        return min((step - self.first) / max(self.total - self.first, 1), 1.0) if self.total else 0.0

    def epoch_ended(self, step: int) -> None:
        super().epoch_ended(step)
        if not self.total:
            left = self.seconds - self.reserve - self.elapsed
            self.first, self.total = step, step * (1 + max(int(self.used_share * left / self.elapsed), 0))

    def remaining(self, step: int) -> float | None:
        return (self.total - step) * self.elapsed / step if self.total and step else None

    def state(self) -> dict[str, Any]:
        return super().state() | {"first": self.first, "total": self.total}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.first, self.total = int(state["first"]), int(state["total"])
