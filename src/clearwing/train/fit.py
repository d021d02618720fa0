"""The loop: one function that trains any module on any batches with any loss, and can stop, resume and repeat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from clearwing.train.collectives import agreement, summed
from clearwing.train.ema import EMA
from clearwing.train.optim import SAM
from clearwing.train.processes import first_stop
from clearwing.train.schedule import Plan, Schedule
from clearwing.types import Batch, ClearwingError

Loss = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""(module, a Batch or a kind of it) -> the mean loss to descend, and how many pictures were right (both scalars on the
device)."""


class Watcher(Protocol):
    """What is told of the run: a progress bar, a log, a file."""

    def step(self, epoch: int, row: dict[str, float]) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...


@dataclass
class Sums:
    """Sums over an epoch; kept on the device so that no step waits for them."""

    loss: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    pictures: int = 0

    def add(self, loss: Tensor, correct: Tensor, n: int) -> None:
        exact = torch.float32 if loss.device.type == "mps" else torch.float64
        self.loss = self.loss + loss.to(exact) * n
        self.correct = self.correct + correct.to(exact)
        self.pictures += n

    def numbers(self) -> list[float]:
        return [float(self.loss), float(self.correct), float(self.pictures)]


@dataclass
class FitState:
    """Where a run stands. With the module, the optimiser, the plan and the average it is enough to go on to the bit."""

    epoch: int = 0  # epochs that are over
    step: int = 0  # steps that are taken
    batch: int = 0  # batches of the epoch under way that are behind
    epoch_step: int = 0  # steps that were taken when the epoch under way began
    sums: Sums = field(default_factory=Sums)  # of the epoch under way
    seconds: float = 0.0  # that the epoch under way took before it was saved
    rows: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def next_epoch(self) -> None:
        """An epoch is over."""
        self.epoch, self.batch, self.epoch_step, self.sums, self.seconds = self.epoch + 1, 0, self.step, Sums(), 0.0

    def numbers(self) -> dict[str, Any]:
        """Plain values, from which `from_numbers` makes the state again."""
        counts = {"epoch": self.epoch, "step": self.step, "batch": self.batch, "epoch_step": self.epoch_step}
        return counts | {"sums": self.sums.numbers(), "seconds": self.seconds, "rows": list(self.rows)}

    @staticmethod
    def from_numbers(kept: dict[str, Any]) -> FitState:
        loss, correct, pictures = kept["sums"]
        epoch, step, batch, epoch_step = (int(kept[name]) for name in ("epoch", "step", "batch", "epoch_step"))
        sums, seconds = Sums(loss, correct, int(pictures)), float(kept["seconds"])
        return FitState(epoch, step, batch, epoch_step, sums, seconds, list(kept["rows"]))


def classification(label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> Loss:
    """Cross-entropy with label smoothing (Szegedy et al. 2016) on `batch.targets` (N, K), or else `batch.labels` (N,).

    `class_weights` (K,) multiply the loss of each class; the mean is over pictures, so give weights whose mean over
    the training pictures is 1 (see `balanced_weights`).
    """

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.labels is None:
            raise ClearwingError("batch.labels", None, "training needs labels")
        logits = module(batch.images).float()
        wanted = batch.labels if batch.targets is None else batch.targets
        weights = None if class_weights is None else class_weights.to(logits.device)
        each = nn.functional.cross_entropy(
            logits, wanted, weight=weights, reduction="none", label_smoothing=label_smoothing
        )
        return each.mean(), (logits.detach().argmax(1) == batch.labels).sum()

    return loss


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights (K,) by which every class counts the same in the loss, 1 in the mean over pictures; `counts` (K,).

    w_k = N / (K n_k) (King and Zeng 2001). A class without pictures gets 0.
    """
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1)).float()
    return torch.where(present, weights, torch.zeros_like(weights))


def fit(
    module: nn.Module,
    batches: Callable[[int, int], Iterable[Batch]],
    loss: Loss,
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    plan: Plan,
    fabric: Fabric,
    accumulate: int = 1,
    clip: float = 0.0,
    sam: SAM | None = None,
    ema: EMA | None = None,
    prepare: Callable[[nn.Module, int], Any] | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    validation_share: float = math.inf,
    enough: Callable[[list[dict[str, Any]]], bool] | None = None,
    watchers: Iterable[Watcher] = (),
    save: Callable[[FitState], None] | None = None,
    save_every: float = math.inf,
    compiled: Callable[[nn.Module], nn.Module] | None = None,
    state: FitState | None = None,
) -> FitState:
    """Train `module` in place until the plan says that the run is over, or `enough(rows)` after an epoch.

    `batches(epoch, start)` gives the batches of an epoch without its first `start`, already on the device and
    augmented; it must depend on these two alone, so that a resumed run sees what the uninterrupted one would have
    seen. `prepare(module, epoch)` sets the mode for an epoch (by default `module.train()`) and may freeze layers.
    `accumulate` batches make one step; the gradient's norm is cut to `clip`. With `ema`, its average is what is
    validated. `validate(module)` is called after an epoch with a module in eval mode and its figures join the row;
    epochs are passed over while it has taken more than `validation_share` of the time, never the last one.
    `save(state)` is called at the end, after an epoch unless saving so often would take a twentieth of the time, and
    wherever `save_every` seconds have gone by. Ctrl-C or SIGTERM ends the run after the step under way: it is saved,
    and `state.interrupted` is set; a second one raises KeyboardInterrupt at once. `compiled` is torch.compile, or
    nothing.

    With several processes each gives its own share of every batch, and all take the same number of steps.

    Raises ClearwingError (exit code 1) when the loss is no longer finite: the weights of the last saved epoch stay.
    """
    state = state or FitState()
    peaks = [float(group.setdefault("peak_lr", group["lr"])) for group in optimizer.param_groups]
    run = _Running(
        loss=loss,
        optimizer=fabric.setup_optimizers(optimizer),
        peaks=peaks,
        schedule=schedule,
        plan=plan,
        fabric=fabric,
        accumulate=accumulate,
        clip=clip,
        sam=sam,
        ema=ema,
        compiled=compiled,
        watchers=tuple(watchers),
        save=save,
        save_every=save_every,
        state=state,
        agree=agreement(fabric),
    )
    prepare = prepare or (lambda module, epoch: bool(module.train()))
    # What was stopped within an epoch still has its end to come, the validation and the row, whatever the plan says.
    stopped = bool(enough is not None and state.rows and not state.batch and enough(state.rows))
    over = bool(run.agree([stopped or (plan.over(state.step) and not state.batch)])[0])
    try:
        with first_stop(lambda: setattr(run, "asked", True)):
            while not over:
                prepare(module, state.epoch)
                run.wrap(module)
                row = run.epoch(batches(state.epoch, state.batch))
                over, valid = map(bool, run.agree([plan.over(state.step), run.validation_is_due(validation_share)]))
                if validate is not None and (over or valid):
                    row |= run.validated(validate, module)
                row["seconds"] = time.monotonic() - run.began
                state.rows.append(row)
                state.next_epoch()
                plan.epoch_ended(state.step)
                for watcher in run.watchers:
                    watcher.epoch(row)
                stopped = enough is not None and enough(state.rows)
                over, due = map(bool, run.agree([over or stopped or plan.over(state.step), run.saving_is_due()]))
                if over or due:
                    run.store()
                    over = over or bool(run.agree([plan.over(state.step)])[0])  # saving takes time, too
    except _StoppedError:
        state.interrupted = True
        run.store()
    module.eval()
    return state


class _StoppedError(Exception):
    """Ctrl-C or SIGTERM, found between two steps."""


@dataclass(kw_only=True)
class _Running:
    """One call of `fit`: what it was told, and the clocks and counts that a row is made of."""

    loss: Loss
    optimizer: Any
    peaks: list[float]  # learning rates of the groups at the schedule's peak
    schedule: Schedule
    plan: Plan
    fabric: Fabric
    accumulate: int
    clip: float
    sam: SAM | None
    ema: EMA | None
    compiled: Callable[[nn.Module], nn.Module] | None
    watchers: tuple[Watcher, ...]
    save: Callable[[FitState], None] | None
    save_every: float
    state: FitState
    agree: Callable[[Sequence[float]], list[float]]
    asked: bool = False  # to stop, by a signal
    module: Any = None  # as Fabric made it
    trained: tuple[bool, ...] = ()  # which parameters were, when it did
    validating: float = 0.0  # seconds spent on validation
    saving: float = 0.0  # seconds that the last save took
    here: int = 0  # pictures of the epoch that this process has seen in this call

    def __post_init__(self) -> None:
        # When this call began, when the epoch would have without a break, when this part of it did, the last save.
        self.first = self.began = self.since = self.saved = time.monotonic()

    def wrap(self, module: nn.Module) -> None:
        """Hand the module to Fabric; again where other parameters are trained than before (DDP fixes them then)."""
        trained = tuple(p.requires_grad for p in module.parameters())
        if trained != self.trained:
            self.trained = trained
            self.module = self.fabric.setup_module(module if self.compiled is None else self.compiled(module))

    def validation_is_due(self, share: float) -> bool:
        return math.isinf(share) or self.validating <= share * (time.monotonic() - self.first)

    def saving_is_due(self) -> bool:
        return time.monotonic() - self.saved >= min(self.save_every, 20 * self.saving)

    def validated(self, validate: Callable[[nn.Module], dict[str, float]], module: nn.Module) -> dict[str, float]:
        began = time.monotonic()
        module.eval()
        figures = validate(module if self.ema is None else self.ema.module)
        self.validating += time.monotonic() - began
        return figures

    def epoch(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """One pass over the batches, unless the plan ends it earlier: the row of the epoch."""
        self.here, waited, self.since = 0, 0.0, time.monotonic()
        self.began = self.since - self.state.seconds
        stream = iter(batches)
        try:
            while True:
                over, stop, store = self.agree(
                    [
                        self.state.sums.pictures > 0 and self.plan.over(self.state.step),
                        self.asked,
                        time.monotonic() - self.saved > self.save_every,
                    ]
                )
                if stop:
                    raise _StoppedError
                if store:
                    self.store()
                if over:
                    break
                asked = time.monotonic()
                group = list(islice(stream, self.accumulate))
                waited += time.monotonic() - asked
                if not group:
                    break
                self.step(group)
        finally:
            if isinstance(stream, Iterator) and hasattr(stream, "close"):
                stream.close()  # a thread that makes batches ahead ends with it
        loss, correct, pictures = summed(self.fabric, *self.state.sums.numbers())
        if not pictures:
            raise ClearwingError("batches", "none in this epoch", "give at least one picture to train on")
        self.check(loss / pictures)  # before the weights of this epoch are saved
        seconds = max(time.monotonic() - self.since, 1e-9)
        return {
            "epoch": self.state.epoch + 1,
            "step": self.state.step,
            "train_loss": loss / pictures,
            "train_accuracy": correct / pictures,
            "lr": self.lr,
            "images_per_s": self.here * self.fabric.world_size / seconds,
            "waited": waited / seconds,
        }

    @property
    def lr(self) -> float:
        """The largest learning rate in use."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def step(self, group: list[Batch]) -> None:
        """One step of the optimiser on the gradients of a group of batches."""
        progress = self.agree([self.plan.progress(self.state.step)])[0]
        self.plan.took(progress)
        for parameters, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            parameters["lr"] = peak * self.schedule(progress)
        self.optimizer.zero_grad(set_to_none=True)
        pictures = sum(map(len, group))
        for i, batch in enumerate(group):
            with self.fabric.no_backward_sync(self.module, enabled=i < len(group) - 1):
                value, correct = self.loss(self.module, batch)
                self.fabric.backward(value * (len(batch) / pictures))
            self.state.sums.add(value.detach(), correct, len(batch))
            self.here += len(batch)
        if self.sam is not None:
            self.sharpen(group[0])
        if self.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module)
        self.state.step += 1
        self.state.batch += len(group)
        # Reading a sum waits for the device: on an accelerator it is done now and then only.
        if self.fabric.device.type == "cpu" or self.state.step % 50 == 0:
            self.tell(progress)

    def sharpen(self, batch: Batch) -> None:
        """Replace the gradients by those at the worst point near by (Foret et al. 2021, eq. 3)."""
        if self.sam is None:
            return
        self.sam.climb(self.module.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with steady_statistics(self.module):
                self.fabric.backward(self.loss(self.module, batch)[0])
        finally:
            self.sam.descend()

    def store(self) -> None:
        """Save; the sums over the processes are kept by the first, so that a resumed run counts them once."""
        if self.state.batch:
            self.state.seconds = time.monotonic() - self.began
        if self.save is None:
            return
        began = time.monotonic()
        loss, correct, pictures = summed(self.fabric, *self.state.sums.numbers())
        self.state.sums = Sums(loss, correct, int(pictures))
        self.save(self.state)
        if self.fabric.global_rank:
            self.state.sums = Sums()
        self.saved = time.monotonic()
        self.saving = self.saved - began

    def check(self, loss: float) -> None:
        if not math.isfinite(loss):
            mend = f"not finite at step {self.state.step}; try a smaller --lr or --precision float32"
            raise ClearwingError("loss", loss, mend, exit_code=1)

    def tell(self, progress: float) -> None:
        loss, correct, pictures = self.state.sums.numbers()
        self.check(loss / pictures)
        row = {"loss": loss / pictures, "accuracy": correct / pictures, "lr": self.lr, "progress": progress}
        seconds = max(time.monotonic() - self.since, 1e-9)
        row["pictures"], row["images_per_s"] = pictures, self.here * self.fabric.world_size / seconds
        remaining = self.plan.remaining(self.state.step)
        if remaining is not None:
            row["remaining"] = remaining
        for watcher in self.watchers:
            watcher.step(self.state.epoch + 1, row)


@contextmanager
def steady_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm goes by the batch, but its running statistics do not move: one step must not count a batch twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
