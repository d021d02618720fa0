"""The job `doctor`: what in a network can fool an explanation, and the self-check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clearwing.attribution.doctor import examine
from clearwing.config import DoctorConfig
from clearwing.data.synthetic import draw_split
from clearwing.jobs import inputs
from clearwing.jobs.progress import Progress
from clearwing.run import plain
from clearwing.types import ClearwingError

PICTURES, SMALLEST = 4, 16


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Examine a network; returns what the command prints. The exit code is 1 where something failed."""
    if config.limit is not None and config.limit < 1:
        raise ClearwingError("--limit", config.limit, "give at least 1 picture")
    loaded = inputs.open_model(config.model, size=config.size, fit=config.fit)
    device = inputs.pick_device(config.device)
    most = PICTURES if config.limit is None else config.limit
    with Progress(config.json) as progress:
        skipped: list[list[str]] = []
        if config.pictures:
            samples = inputs.open_pictures(config.pictures, progress)
            pictures = inputs.load_for(loaded, samples, most, progress)
            skipped = inputs.told_skipped(pictures, progress)
            images = next(iter(pictures.batches(len(pictures), device=device))).images
        else:
            images = drawn(most, loaded.size, loaded.channels).to(device)
        diagnosis = examine(loaded.model.to(device), images, progress.task("self-check"))
    result = {"model": loaded.name, "drawn": not config.pictures, **diagnosis.plain(), "skipped": len(skipped)}
    return {
        "json": plain({**result, "skipped_pictures": skipped}),
        "text": f"{loaded.name}: {diagnosis}",
        "exit_code": int(diagnosis.verdict == "failed"),
    }


def drawn(count: int, size: int, channels: int) -> Tensor:
    """Drawn insects (count, C, size, size) in [0, 1], as a network takes them."""
    pixels, _, _ = draw_split("val", count, size=max(size, SMALLEST))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :, :size, :size].float() / 255
    return images if channels == 3 else images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
