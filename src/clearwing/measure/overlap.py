"""How well masks cover the truth, picture by picture, and how sure the mean is: IoU, Dice, boundaries, intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from clearwing.types import BACKGROUND, FOREGROUND, IGNORE, ClearwingError

Masks = Tensor | Sequence[Any]
"""(N, H, W), one (H, W), or a list of N (H, W) of any sizes; tensors or arrays."""

PIXELS = 2**21
"""How many pixels are looked at together: the temporaries of so many stay in the processor's cache."""

FLIPS = 2_000_000
"""Signs that are flipped at a time, of pictures times flips: some 48 MB."""


def iou(masks: Masks, truth: Masks) -> Tensor:
    """Intersection over union of each picture: float32 (N,), in [0, 1].

    `masks` hold 0 and 1 (any dtype), `truth` 0, 1 and perhaps 255: pixels to ignore, which count nowhere. Where both
    are empty the IoU is 1: nothing was asked for and nothing was claimed.

    Raises ClearwingError where sizes differ, or values are others; a PNG's 0 and 255 go through `read_mask` first.

    >>> iou(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[1, 0, 0, 255]]]))
    tensor([0.5000])
    """
    both, claimed, true, _ = counts(masks, truth)
    return share(both, claimed + true - both)


def dice(masks: Masks, truth: Masks) -> Tensor:
    """Dice coefficient, twice the intersection over the sum of both areas, (N,); conventions as in `iou`."""
    both, claimed, true, _ = counts(masks, truth)
    return share(2 * both, claimed + true)


def mean_class_iou(masks: Masks, truth: Masks) -> Tensor:
    """The mean of the IoU of the foreground and that of the background of each picture, (N,): mIoU with two classes.

    Conventions as in `iou`, for either class: one that is in neither mask has an IoU of 1. The mIoU of PASCAL VOC adds
    up the pixels of all pictures before it divides; this one is a mean over pictures.

    >>> mean_class_iou(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[1, 0, 0, 0]]]))  # 1/2 and 2/3
    tensor([0.5833])
    """
    both, claimed, true, seen = counts(masks, truth)
    either = claimed + true - both
    return (share(both, either) + share(seen - either, seen - both)) / 2


def boundary_f(masks: Masks, truth: Masks, tolerance: float = 0.0075) -> Tensor:
    """The boundary F measure of each picture, 2PR / (P + R): float32 (N,), in [0, 1].

    P is the share of the mask's contour pixels that lie near the truth's contour, R that of the truth's contour pixels
    that lie near the mask's: Martin, Fowlkes and Malik 2004; Csurka et al. 2013; F of Perazzi et al. 2016.

    Contours are those of the DAVIS code: the pixels that differ from their neighbour to the right, below, or below to
    the right; the border of the picture is no contour. Near is a Euclidean distance, between the centres of pixels, of
    at most `tolerance` times the picture's diagonal, rounded up to whole pixels: what lies in the dilation by a disk of
    that radius. DAVIS has 0.008. Pixels to ignore (255) are background on both sides before contours are drawn.

    Where one side alone has a contour F is 0. Where neither has one, F is 1 if both are the same, all or nothing, else
    0.

    Raises ClearwingError as `iou` does, and for a tolerance that is no share of the diagonal.

    >>> truth = torch.zeros(1, 64, 64, dtype=torch.bool)
    >>> truth[:, 16:48, 16:48] = True
    >>> boundary_f(truth.roll(1, 2), truth), boundary_f(truth.roll(8, 2), truth)  # to the right, by 1 pixel and by 8
    (tensor([1.]), tensor([0.4219]))
    """
    if not 0 <= tolerance < 1:
        raise ClearwingError("tolerance", tolerance, "give a share of the picture's diagonal, such as 0.0075")
    scores: list[float] = []
    device = torch.device("cpu")
    for mask, true in _in_turn(masks, truth):
        device = mask.device
        mask, true = (mask == FOREGROUND) & (true != IGNORE), true == FOREGROUND
        same = (mask == true).flatten(1).all(1).tolist()
        disk = _disk(max(1, math.ceil(tolerance * math.hypot(*mask.shape[1:]))))
        claimed, wanted = (contour(side).byte().cpu().numpy() for side in (mask, true))
        scores += [_f(claimed[i], wanted[i], disk, same[i]) for i in range(len(same))]
    return torch.tensor(scores, device=device)


def contour(masks: Tensor) -> Tensor:
    """The pixels that differ from their neighbour to the right, below, or below to the right: bool (N, H, W) -> same.

    One pixel wide, half a pixel up and to the left of the outline between the pixels (Martin et al. 2004, `seg2bmap`).
    """
    edges = torch.zeros_like(masks)
    edges[:, :, :-1] |= masks[:, :, :-1] ^ masks[:, :, 1:]
    edges[:, :-1] |= masks[:, :-1] ^ masks[:, 1:]
    edges[:, :-1, :-1] |= masks[:, :-1, :-1] ^ masks[:, 1:, 1:]
    return edges


def box_of(masks: Masks) -> Tensor:
    """The tightest box around the foreground of each mask: int64 (N, 4), as x0, y0, x1, y1.

    x1 and y1 are exclusive, so x1 - x0 is the width. A mask without foreground gives zeros; 255 is no foreground.

    >>> box_of(torch.tensor([[[0, 0, 0], [0, 1, 1]]]))
    tensor([[1, 1, 3, 2]])
    """
    boxes = []
    for part in masks_of(masks, "masks", ignore=True):
        mask = (part == FOREGROUND).view(torch.uint8)
        sides = [mask.amax(1).int(), mask.amax(2).int()]  # columns (N, W), rows (N, H); argmax finds the first of them
        low = torch.stack([side.argmax(1) for side in sides], 1)
        high = torch.stack([side.shape[1] - side.flip(1).argmax(1) for side in sides], 1)
        boxes.append(torch.cat([low, high], 1) * sides[0].amax(1, keepdim=True))
    return torch.cat(boxes)


def bootstrap_interval(
    values: Tensor | Sequence[float], level: float = 0.95, n: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,), Efron 1979: (low, high).

    `n` times N values are drawn with replacement. One value alone gives an interval of no width.
    """
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
        raise ClearwingError("values", f"{tuple(values.shape)}", "give at least one finite number, as (N,)")
    if not 0 < level < 1:
        raise ClearwingError("level", level, "give a level between 0 and 1, such as 0.95")
    if n < 1:
        raise ClearwingError("n", n, "draw at least once")
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, 4_000_000 // len(values))  # bounds the memory to some 64 MB
    means = torch.cat(
        [
            values[torch.randint(len(values), (min(rows, n - start), len(values)), generator=generator)].mean(1)
            for start in range(0, n, rows)
        ]
    ).sort()[0]
    tail = (1 - level) / 2 * (n - 1)
    return float(means[int(tail)]), float(means[n - 1 - int(tail)])


def paired_interval(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    level: float = 0.95,
    n: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the mean of a - b, two scores (N,) of the same pictures; a beats b where low > 0."""
    a, b = torch.as_tensor(a, dtype=torch.float64).cpu(), torch.as_tensor(b, dtype=torch.float64).cpu()
    if a.shape != b.shape:
        raise ClearwingError("b", tuple(b.shape), f"give as many scores as a has, {tuple(a.shape)}")
    return bootstrap_interval(a - b, level, n, seed)


def surely_best(
    scores: Tensor | Sequence[Sequence[float]], level: float = 0.05, n: int = 10_000, seed: int = 0
) -> tuple[int, float]:
    """Of several ways, which is better than the first by more than chance: (its row, its p-value). Where none is, row 0
    and the smallest p-value.

    scores: (M, N), of M ways on the same N pictures. A way's p-value is the share of sign flips of the pictures' gains
    on the first way (Fisher 1935, section 21) under which any of the ways gains as clearly: the maximum of Westfall and
    Young (1993, section 2.3), so that it is no easier to be the best of many ways than of two. How clearly a way gains
    is the sum of its gains by the root of the sum of their squares, which grows with the paired t: a way that is far
    worse does not drown the others. Of the ways whose p-value is at most `level`, the one with the largest mean gain is
    given. All 2^N flips are made, or `n` drawn ones where these are fewer: with less than five pictures no p-value is
    below 0.05.

    >>> surely_best([[0.5, 0.6, 0.4, 0.5, 0.6, 0.5], [0.6, 0.7, 0.6, 0.7, 0.7, 0.6], [0.9, 0.9, 0.1, 0.1, 0.2, 0.1]])
    (1, 0.03125)
    """
    scores = torch.as_tensor(scores, dtype=torch.float64).cpu()
    if scores.ndim != 2 or not scores.numel() or not bool(scores.isfinite().all()):
        raise ClearwingError("scores", f"{tuple(scores.shape)}", "give finite numbers, as (ways, pictures)")
    if not 0 < level <= 1:
        raise ClearwingError("level", level, "give a level above 0 and up to 1, such as 0.05")
    if n < 1:
        raise ClearwingError("n", n, "draw at least once")
    gains = scores[1:] - scores[0]
    if not len(gains):
        return 0, 1.0
    N, clear = scores.shape[1], gains / gains.norm(dim=1, keepdim=True).clamp(min=1e-12)
    every = N < 60 and n >= 2**N
    generator = torch.Generator().manual_seed(seed)
    count, rows = 2**N if every else n, max(1, FLIPS // N)
    as_clear = torch.zeros(len(gains), dtype=torch.float64)
    for start in range(0, count, rows):
        some = torch.arange(start, min(start + rows, count))
        if every:
            flips = (some[:, None] >> torch.arange(N)) & 1
        else:
            flips = torch.randint(2, (len(some), N), generator=generator)
        if start == 0:
            flips[0] = 0  # nothing flipped is one of them, so that no p-value is 0
        largest = ((1 - 2 * flips).double() @ clear.T).amax(1)
        as_clear += (largest[:, None] >= clear.sum(1) - 1e-9).sum(0)
    p = as_clear / count
    sure = torch.where((p <= level) & (gains.mean(1) > 0), gains.mean(1), -torch.inf)
    if sure.max() == -torch.inf:
        return 0, float(p.min())
    return 1 + int(sure.argmax()), float(p[sure.argmax()])


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 1 where the whole is 0: nothing was asked for and nothing was claimed."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0)


def counts(masks: Masks, truth: Masks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in both, in `masks`, in `truth`, and in the picture, those to ignore left out: four int64 (N,)."""
    rows = []
    for mask, true in _in_turn(masks, truth):
        seen = true != IGNORE
        mask, true = (mask == FOREGROUND) & seen, true == FOREGROUND
        sides = (mask & true, mask, true, seen)
        rows.append(torch.stack([side.flatten(1).sum(1, dtype=torch.int32) for side in sides]))
    both, claimed, true, seen = torch.cat(rows, 1).long()
    return both, claimed, true, seen


def pairs(given: list[Tensor], truth: list[Tensor], argument: str = "masks") -> list[tuple[Tensor, Tensor]]:
    """Stacks (n, H, W) of one size side by side, the truth brought to the device of what is given; see `stacks`.

    Raises ClearwingError where the numbers or the sizes differ.
    """
    n, n_truth = sum(len(part) for part in given), sum(len(part) for part in truth)
    if n != n_truth:
        raise ClearwingError(argument, f"{n} {argument} for {n_truth} truths", "give one for every truth")
    if len(given) != len(truth):  # one side stacked, the other a list
        given, truth = ([part[i : i + 1] for part in side for i in range(len(part))] for side in (given, truth))
    for part, true in zip(given, truth, strict=True):
        if part.shape != true.shape:
            sizes = " and ".join("x".join(map(str, side.shape[1:])) for side in (part, true))
            value = f"{argument.removesuffix('s')} and truth of sizes {sizes}"
            raise ClearwingError(argument, value, "bring both to one size; see restore")
    return [(part, true.to(part.device)) for part, true in zip(given, truth, strict=True)]


def together(part: Tensor, least: int = 1) -> int:
    """How many pictures of a stack (N, H, W) to look at together; `least` is what one costs at any size."""
    return max(1, PIXELS // max(part[0].numel(), least))


def stacks(values: Masks, argument: str) -> list[Tensor]:
    """One stack (N, H, W), or a list of N stacks (1, H, W), whatever they hold.

    Raises ClearwingError for another number of dimensions, and where nothing is given.
    """
    kind = "map" if argument == "maps" else "mask"
    if isinstance(values, Tensor) or hasattr(values, "__array__"):
        stack = torch.as_tensor(values)
        parts = [stack[None] if stack.ndim == 2 else stack]
    else:
        parts = [torch.as_tensor(value)[None] for value in values]
    if not parts:
        raise ClearwingError(argument, "[]", f"give at least one {kind}")
    for part in parts:
        if part.ndim != 3 or not part.numel():
            raise ClearwingError(argument, tuple(part.shape), f"give {kind}s (N, H, W), or a list of (H, W)")
    return parts


def masks_of(masks: Masks, argument: str, ignore: bool = False) -> list[Tensor]:
    """`stacks` of masks: of bool, or 0 and 1, and of 255 where pixels to `ignore` may be.

    Raises ClearwingError for other values.
    """
    parts = stacks(masks, argument)
    for part in parts:
        _check_values(part, argument, ignore)
    pictures = [picture for part in parts for picture in part]
    if (
        ignore
        and len(pictures) > 1
        and all(p.dtype != torch.bool and (p == IGNORE).any() and not (p == FOREGROUND).any() for p in pictures)
    ):
        mend = "255 means ignore, so every one here is empty; read_mask reads a PNG's 0 and 255"
        raise ClearwingError(argument, "holds 0 and 255 alone", mend)
    return parts


def _check_values(part: Tensor, argument: str, ignore: bool) -> None:
    if part.dtype == torch.bool or (part.dtype == torch.uint8 and part.amax() <= FOREGROUND):
        return
    allowed = (BACKGROUND, FOREGROUND, IGNORE) if ignore else (BACKGROUND, FOREGROUND)
    for some in part.split(together(part)):
        wrong = torch.ones_like(some, dtype=torch.bool)
        for value in allowed:
            wrong &= some != value
        if wrong.any():
            found = some[wrong][0].item()
            if found == IGNORE:
                mend = "a mask is bool or 0 and 1; read_mask reads a PNG's 0 and 255"
            else:
                mend = f"give {', '.join(map(str, allowed))} or bool; threshold a map first (see segment)"
            raise ClearwingError(argument, f"holds {found}", mend)


def _in_turn(masks: Masks, truth: Masks) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks and truths checked and side by side, as many together as is quickest: two (n, H, W)."""
    for mask, true in pairs(masks_of(masks, "masks"), masks_of(truth, "truth", ignore=True)):
        yield from zip(mask.split(together(mask)), true.split(together(true)), strict=True)


def _f(claimed: np.ndarray, wanted: np.ndarray, disk: np.ndarray, same: bool) -> float:
    """F of two contours, uint8 (H, W), whose masks are the `same` or not; see `boundary_f`."""
    found, true = int(claimed.sum()), int(wanted.sum())
    if not found or not true:
        return float(same)
    precision = int((cv2.dilate(wanted, disk) & claimed).sum()) / found
    recall = int((cv2.dilate(claimed, disk) & wanted).sum()) / true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _disk(radius: int) -> np.ndarray:
    """The pixels whose centres lie within `radius` of the middle one's: uint8 (2 radius + 1, 2 radius + 1)."""
    x = np.arange(-radius, radius + 1)
    return (x[None] ** 2 + x[:, None] ** 2 <= radius**2).astype(np.uint8)
