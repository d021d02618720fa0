"""The loop: one function that trains any module on any batches with any loss, and can stop, resume and repeat."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from clearwing.train.schedule import Plan, Schedule
from clearwing.types import Batch, ClearwingError

Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
"""(module, batch) -> the mean loss to descend, and how many pictures were right (both scalars on the device)."""


class Watcher(Protocol):
    """What is told of the run: a progress bar, a log, a file."""

    def step(self, epoch: int, row: dict[str, float]) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...


@dataclass
class FitState:
    """Where a run stands; what `torch.save` keeps of it is enough to go on to the bit."""

    epoch: int = 0  # epochs that are over
    step: int = 0  # steps that are taken
    rows: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False


def classification(label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy with label smoothing (Szegedy et al. 2016) on `batch.labels`."""

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.labels is None:
            raise ClearwingError("batch.labels", None, "training needs labels")
        logits = module(batch.images).float()
        value = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
        return value, (logits.detach().argmax(1) == batch.labels).sum()

    return loss


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """A launched Fabric for one device: cpu, cuda, cuda:1, mps or auto; bfloat16 where the processor has it."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise ClearwingError("--device", device, "give auto, cpu, cuda, cuda:1 or mps")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise ClearwingError("--device", device, f"this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ClearwingError("--device", device, "this machine has no MPS device; use cpu")
    accelerator = {"auto": "auto", "cuda": "gpu"}.get(kind, kind)
    devices: Any = [int(index)] if index else 1
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(kind) else "float32"
    # Fabric announces its precision on every start; the jobs say it once, in their own words.
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
    )
    fabric.launch()
    return fabric


def has_bfloat16(kind: str = "auto") -> bool:
    """Whether the device multiplies in bfloat16 in hardware (AVX512-BF16 on a CPU, Ampere or later on CUDA)."""
    if kind in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps" or (kind == "auto" and torch.backends.mps.is_available()):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def fit(
    module: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    loss: Loss,
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    plan: Plan,
    fabric: Fabric,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    validation_share: float = 1.0,
    watchers: Iterable[Watcher] = (),
    save: Callable[[FitState], None] | None = None,
    state: FitState | None = None,
) -> FitState:
    """Train `module` in place until the plan says that the run is over.

    `batches(epoch)` gives the batches of an epoch, already on the device and augmented; it must depend on the epoch
    alone, so that a resumed run sees what the uninterrupted one would have seen. `validate(module)` is called after
    an epoch with the module in eval mode and its figures join the row; epochs are passed over while it has taken more
    than `validation_share` of the time, never the last one. `save(state)` is called after every
    epoch. Ctrl-C ends the run where it stands: the module keeps what it learned and `state.interrupted` is set.

    Raises ClearwingError (exit code 1) when the loss is no longer finite: the weights of the last saved epoch stay.
    """
    state = state or FitState()
    run = _Running(module, loss, optimizer, schedule, plan, fabric, tuple(watchers), state)
    over = plan.over(state.step)
    try:
        while not over:
            row = run.epoch(batches(state.epoch))
            over = plan.over(state.step)
            if validate is not None and (over or run.validation_is_due(validation_share)):
                row |= run.validated(validate, module)
            row["seconds"] = time.monotonic() - run.began
            state.epoch += 1
            state.rows.append(row)
            plan.epoch_ended(state.step)
            for watcher in run.watchers:
                watcher.epoch(row)
            if save is not None:
                save(state)
    except KeyboardInterrupt:
        state.interrupted = True
    module.eval()
    return state


@dataclass
class _Sums:
    """Sums over an epoch; kept on the device so that no step waits for them."""

    loss: Tensor | None = None
    correct: Tensor | None = None
    pictures: int = 0
    lr: float = 0.0

    def add(self, loss: Tensor, correct: Tensor, n: int) -> None:
        self.loss = loss * n if self.loss is None else self.loss + loss * n
        self.correct = correct if self.correct is None else self.correct + correct
        self.pictures += n

    def means(self) -> dict[str, float]:
        if self.loss is None or self.correct is None:
            return {}
        return {
            "train_loss": float(self.loss) / self.pictures,
            "train_accuracy": float(self.correct) / self.pictures,
            "lr": self.lr,
        }


class _Running:
    """What stays the same from step to step of one call of `fit`."""

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        plan: Plan,
        fabric: Fabric,
        watchers: tuple[Watcher, ...],
        state: FitState,
    ) -> None:
        self.peaks = [float(group.setdefault("peak_lr", group["lr"])) for group in optimizer.param_groups]
        self.module, self.optimizer = fabric.setup(module, optimizer)
        self.loss, self.schedule, self.plan, self.fabric = loss, schedule, plan, fabric
        self.watchers, self.state = watchers, state
        self.first = self.began = time.monotonic()
        self.validating = 0.0  # seconds spent on validation

    def validation_is_due(self, share: float) -> bool:
        return self.validating <= share * (time.monotonic() - self.first)

    def validated(self, validate: Callable[[nn.Module], dict[str, float]], module: nn.Module) -> dict[str, float]:
        began = time.monotonic()
        module.eval()
        figures = validate(module)
        self.validating += time.monotonic() - began
        return figures

    def epoch(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """One pass over the batches, unless the plan ends it earlier: the row of the epoch."""
        self.began = time.monotonic()
        self.module.train()
        sums = _Sums()
        for batch in batches:
            if sums.pictures and self.plan.over(self.state.step):
                break
            self.step(batch, sums)
        if not sums.pictures:
            raise ClearwingError("batches", "none in this epoch", "give at least one picture to train on")
        self.check(sums.means()["train_loss"])  # before the weights of this epoch are saved
        speed = sums.pictures / max(time.monotonic() - self.began, 1e-9)
        return {"epoch": self.state.epoch + 1, "step": self.state.step, **sums.means(), "images_per_s": speed}

    def step(self, batch: Batch, sums: _Sums) -> None:
        progress = self.plan.progress(self.state.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.schedule(progress)
        value, correct = self.loss(self.module, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(value)
        self.optimizer.step()
        self.state.step += 1
        sums.lr = self.optimizer.param_groups[0]["lr"]
        sums.add(value.detach(), correct, len(batch))
        # Reading a sum waits for the device: on an accelerator it is done now and then only.
        if self.fabric.device.type == "cpu" or self.state.step % 50 == 0:
            self.tell(sums, progress)

    def check(self, loss: float) -> None:
        if not math.isfinite(loss):
            mend = f"not finite at step {self.state.step}; try a smaller --lr or --precision float32"
            raise ClearwingError("loss", loss, mend, exit_code=1)

    def tell(self, sums: _Sums, progress: float) -> None:
        means = sums.means()
        self.check(means["train_loss"])
        row = {
            "loss": means["train_loss"],
            "accuracy": means["train_accuracy"],
            "lr": sums.lr,
            "progress": progress,
        }
        row["pictures"], row["images_per_s"] = sums.pictures, sums.pictures / (time.monotonic() - self.began)
        remaining = self.plan.remaining(self.state.step)
        if remaining is not None:
            row["remaining"] = remaining
        for watcher in self.watchers:
            watcher.step(self.state.epoch + 1, row)
