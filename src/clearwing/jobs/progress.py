"""What a running job tells: a bar on stderr where that is a terminal, plain lines elsewhere, and TensorBoard logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """A context in which jobs tell how far they are. Everything goes to stderr; stdout belongs to the result."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """One line, above the bars; none with --json."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def task(self, name: str, *, rate: bool = False) -> Callable[[float, float], None]:
        """A bar for one piece of work: call it with (done, total). With `rate`, it says how many pictures a second."""
        task: TaskID | None = None
        began = time.monotonic()

        def tell(done: float, total: float) -> None:
            nonlocal task
            if task is None:
                task = self.bars.add_task(name, total=total, note="")
            seconds = max(time.monotonic() - began, 1e-9)
            note = f"{done / seconds:.0f} pictures/s  {clock_time(seconds * (total - done) / max(done, 1))} left"
            self.bars.update(task, completed=done, total=total, visible=done < total, note=note if rate else "")

        return tell


class TrainingBar:
    """Accuracy (or what else is `right`), loss, learning rate, pictures a second and time left, as `fit` tells them."""

    def __init__(self, progress: Progress, pictures: int, right: str = "accuracy") -> None:
        self.progress, self.pictures, self.right = progress, pictures, right
        self.task = progress.bars.add_task("epoch 1", total=pictures, note="")
        self.began, self.shown_from = time.monotonic(), 0.0

    def step(self, epoch: int, row: dict[str, float]) -> None:
        now = time.monotonic()
        left = row.get("remaining")
        if left is None and row["progress"] > 0:
            left = (now - self.began) * (1 - row["progress"]) / max(row["progress"] - self.shown_from, 1e-6)
        note = f"{self.right} {row['accuracy']:.1%}  loss {row['loss']:.3f}  lr {row['lr']:.4f}"
        note += f"  {row['images_per_s']:.0f} pictures/s" + (f"  {clock_time(left)} left" if left is not None else "")
        done = int(row["pictures"])
        self.progress.bars.update(self.task, description=f"epoch {epoch}", completed=done, note=note)

    def epoch(self, row: dict[str, Any]) -> None:
        line = f"epoch {row['epoch']:>3}  train loss {row['train_loss']:.3f} {self.right} {row['train_accuracy']:.1%}"
        if "val_accuracy" in row:
            line += f"  val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%}"
        line += f"  lr {row['lr']:.4f}  {row['images_per_s']:.0f} pictures/s  {row['seconds']:.1f} s"
        self.progress.say(line)


class TensorBoard:
    """The rows of the epochs as TensorBoard scalars, and pictures."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def step(self, epoch: int, row: dict[str, float]) -> None:
        pass

    def epoch(self, row: dict[str, Any]) -> None:
        names = {"loss": "loss", "accuracy": "accuracy"}
        for part in ("train", "val"):
            for kind in names:
                if f"{part}_{kind}" in row:
                    self.writer.add_scalar(f"{kind}/{part}", row[f"{part}_{kind}"], row["epoch"])
        for name in ("lr", "images_per_s", "mask_iou"):
            if name in row:
                self.writer.add_scalar(name, row[name], row["epoch"])
        self.writer.flush()

    def image(self, name: str, picture: Any, epoch: int) -> None:
        """A picture, uint8 (H, W, 3)."""
        self.writer.add_image(name, picture, epoch, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def clock_time(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 1:02:03."""
    whole = max(round(seconds), 0)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
