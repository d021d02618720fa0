"""Logits of many pictures, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clearwing.types import Batch


class Batches(Protocol):
    """What gives pictures in batches, such as `Pictures`."""

    def batches(self, batch_size: int, *, device: Any = ..., order: Tensor | None = ...) -> Iterator[Batch]: ...


@torch.inference_mode()
def predict_logits(
    module: nn.Module,
    pictures: Batches,
    fabric: Any,
    batch_size: int = 128,
    *,
    order: Tensor | None = None,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in float32 and labels (N,), on the CPU; the module is used, and left, in eval mode.

    order: the positions of the pictures asked for, (N,); None: all of them.
    flip: the mean of the logits of each picture and of its mirror image.
    """
    module.eval()
    logits, labels = [], []
    for batch in pictures.batches(batch_size, device=fabric.device, order=order):
        with fabric.autocast():
            found = module(batch.images).float()
            if flip:
                found = (found + module(batch.images.flip(3)).float()) / 2
        logits.append(found)
        if batch.labels is not None:
            labels.append(batch.labels)
    if not logits:  # a process without a share
        return torch.empty(0, 0), torch.empty(0, dtype=torch.long)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu() if labels else torch.empty(0, dtype=torch.long)
