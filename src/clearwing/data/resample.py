"""Each picture's own box at the network's size: antialiased, mirrored and brought to [0, 1] in one go."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clearwing.data.preprocess import square


def resample(images: Tensor, boxes: Tensor, size: int | Sequence[int], flip: Tensor | None = None) -> Tensor:
    """Each picture's own box, resized to `size` with a triangle filter (antialiased bilinear), the whole batch at once.

    `images` (N, C, H, W) uint8, quickest channels last, or floating; `boxes` (N, 4) top, left, height, width in pixels,
    inside the pictures, fractions allowed; `flip` (N,) bool mirrors left to right. Gives (N, C, rows, columns): uint8
    pictures become float32 in [0, 1], channels last, floating ones keep their dtype and range.

    For boxes of whole pixels this is torchvision's `resize(crop, antialias=True)`, of uint8 pictures to one level
    (1/255), of float32 ones to 1e-5 of their range. On a CPU, uint8 pictures and boxes of whole pixels give the same
    bits whatever the number of threads.

    Example: `resample(pixels, torch.tensor([[0, 0, 200, 180]]), 128)` of pixels (1, 3, 256, 256): (1, 3, 128, 128).
    """
    rows, columns = square(size)
    if images.dtype != torch.uint8:
        return _products(images, boxes, rows, columns, flip)
    if images.device.type == "cpu" and torch.equal(boxes, boxes.round()):
        return _one_by_one(images, boxes, rows, columns, flip)
    # the weights' products give 0 to 255 in float32
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    sampled = _products(pixels, boxes, rows, columns, flip)
    return sampled.div_(255).contiguous(memory_format=torch.channels_last)


def _one_by_one(images: Tensor, boxes: Tensor, rows: int, columns: int, flip: Tensor | None) -> Tensor:
    """uint8 pictures in memory, boxes of whole pixels: torch's own 8-bit kernel.

    A loop over the pictures, because nothing batched is near it: from 256 to 128 px it took 0.12 ms of processor time a
    picture (AMD EPYC, torch 2.15, a busy machine), Pillow 0.42, sparse taps (`embedding_bag`) 0.62, matrix products
    2.0; benchmarks/load.py has the whole epoch on a quiet one. Every step of it
    stays in the calling thread (so not `Tensor.flip`): one shared among threads would wait at its end for cores that a
    training step holds.
    """
    N, C, H, W = images.shape
    pixels = images.permute(0, 2, 3, 1).numpy()
    mirrored = [False] * N if flip is None else flip.tolist()
    # pages fresh from the system cost more than the arithmetic: NumPy asks for huge ones, and all crops share a buffer
    result = np.empty((N, rows, columns, C), np.float32)
    buffer = np.empty(H * W * C, np.uint8)
    for i, (top, left, height, width) in enumerate(boxes.to(torch.int64).tolist()):
        crop = buffer[: height * width * C].reshape(1, height, width, C)
        np.copyto(crop, pixels[i : i + 1, top : top + height, left : left + width])
        channels_last = torch.from_numpy(crop).permute(0, 3, 1, 2)
        small = F.interpolate(channels_last, (rows, columns), mode="bilinear", antialias=True)
        levels = small.permute(0, 2, 3, 1).numpy()[0]
        if mirrored[i]:
            levels = cv2.flip(levels, 1).reshape(levels.shape)
        np.divide(levels, np.float32(255), out=result[i])
    return torch.from_numpy(result).permute(0, 3, 1, 2)


def _products(images: Tensor, boxes: Tensor, rows: int, columns: int, flip: Tensor | None) -> Tensor:
    """Floating pictures: two batched matrix products, one for each side, with a weight matrix for each picture."""
    N, C, H, W = images.shape
    boxes = boxes.to(images.device, images.dtype)
    down = _triangle(boxes[:, 0], boxes[:, 2], rows, H)  # (N, rows, H)
    across = _triangle(boxes[:, 1], boxes[:, 3], columns, W)  # (N, columns, W)
    if flip is not None:
        across = torch.where(flip.to(images.device)[:, None, None], across.flip(1), across)
    narrow = torch.bmm(images.reshape(N, C * H, W), across.transpose(1, 2))
    return down[:, None] @ narrow.view(N, C, H, columns)


def _triangle(start: Tensor, length: Tensor, count: int, full: int) -> Tensor:
    """(N, count, full) weights: `count` triangles spread over [start, start + length), each row summing to 1."""
    scale = length / count  # (N,)
    centre = start[:, None] + scale[:, None] * (torch.arange(count, device=start.device, dtype=start.dtype) + 0.5)
    pixel = torch.arange(full, device=start.device, dtype=start.dtype)
    reach = scale.clamp(min=1)[:, None, None]
    weight = (pixel + 0.5 - centre[:, :, None]).abs_().div_(-reach).add_(1).clamp_(min=0)
    inside = (pixel + 1 > start[:, None]) & (pixel < (start + length)[:, None])  # (N, full): the box ends the picture
    weight.mul_(inside[:, None])
    return weight.div_(weight.sum(2, keepdim=True).clamp_(min=1e-12))
