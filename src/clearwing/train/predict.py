"""Logits of many pictures, a batch at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clearwing.data.loader import Pictures


@torch.inference_mode()
def predict_logits(
    module: nn.Module,
    pictures: Pictures,
    fabric: Any,
    batch_size: int | None = None,
    *,
    order: Tensor | None = None,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in float32 and labels (N,), on the CPU; the module is used, and left, in eval mode.

    batch_size: by default what is quickest for pictures of this size, see `quick_batch`.
    order: the positions of the pictures asked for, (N,); None: all of them.
    flip: the mean of the logits of each picture and of its mirror image.
    """
    batch_size = batch_size or quick_batch(pictures.images.shape[2] * pictures.images.shape[3], fabric.device.type)
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


def quick_batch(pixels: int, device: str) -> int:
    """How many pictures of so many pixels a forward pass takes at a time.

    On a CPU few, whose activations stay in its caches (ResNet-14 at 128 px on two cores: 111 pictures a second in
    batches of 16, 61 in batches of 128; ResNet-18 at 32 px is quickest with 128). On a GPU many, for it is waited for
    once a batch.
    """
    return min(max(2**18 // pixels, 16), 128) if device == "cpu" else min(max(2**23 // pixels, 32), 1024)
