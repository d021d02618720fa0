"""How well score maps find the object at every threshold: the IoU curve, PxAP, MaxBoxAcc and MaxBoxAccV2.

What a curve's best point says was chosen by looking at the truth: it bounds what a threshold could reach, and is no
result of a method that has to choose one without it (Choe et al. 2020).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from clearwing.measure.overlap import Masks, masks_of, pairs, share, stacks, together
from clearwing.types import ClearwingError

Maps = Tensor | Sequence[Any]
"""Score maps (N, H, W), one (H, W), or a list of N (H, W) of any sizes; tensors or arrays."""


@dataclass(frozen=True)
class Curve:
    """Score maps cut at every threshold, counted against the truth: what `threshold_curve` gives.

    A pixel is foreground where its score is at least the threshold, s >= tau.
    """

    thresholds: Tensor  # (T,) float64, from 0 to 1 in equal steps
    both: Tensor  # (N, T) int32, pixels of foreground that are the object's
    claimed: Tensor  # (N, T) int32, pixels of foreground
    true: Tensor  # (N,) int32, pixels of the object

    @property
    def iou(self) -> Tensor:
        """The IoU of each picture at each threshold, float32 (N, T); conventions as in `measure.overlap.iou`."""
        return share(self.both, self.claimed + self.true[:, None] - self.both)

    @property
    def mean_iou(self) -> Tensor:
        """The mean over the pictures at each threshold, float64 (T,)."""
        return self.iou.double().mean(0)

    @property
    def precision(self) -> Tensor:
        """PxPrec(tau) of Choe et al. 2020, sec. 4, over the pixels of all pictures: float64 (T,); 1 of nothing."""
        return share(self.both.sum(0).double(), self.claimed.sum(0).double())

    @property
    def recall(self) -> Tensor:
        """PxRec(tau) of Choe et al. 2020, sec. 4, over the pixels of all pictures: float64 (T,)."""
        return share(self.both.sum(0).double(), self.true.sum().double())

    @property
    def pxap(self) -> float:
        """Pixel average precision: the sum of PxPrec(tau_l) (PxRec(tau_l) - PxRec(tau_{l-1})) over falling thresholds.

        Choe et al. 2020, sec. 4. It needs no threshold to be chosen. The sum starts from a recall of 0, above the
        highest threshold.

        Raises ClearwingError where no picture has an object.
        """
        if not self.true.any():
            raise ClearwingError("truth", "no pixel is foreground", "PxAP needs an object in one picture at least")
        recall = self.recall.flip(0)
        return float((self.precision.flip(0) * recall.diff(prepend=recall.new_zeros(1))).sum())

    @property
    def peak(self) -> tuple[float, float]:
        """The ORACLE: the best mean IoU of one threshold for all pictures, and that threshold (the lowest of equals).

        It looks at the truth, so it is a bound for methods that do not, and never their result.
        """
        best = int(self.mean_iou.argmax())
        return float(self.mean_iou[best]), float(self.thresholds[best])

    def at(self, threshold: float) -> Tensor:
        """The IoU of each picture at the threshold of the curve that is nearest, float32 (N,).

        Raises ClearwingError for a threshold outside of [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ClearwingError("threshold", threshold, "give a threshold from 0 to 1")
        i = int((self.thresholds - threshold).abs().argmin())
        return share(self.both[:, i], self.claimed[:, i] + self.true - self.both[:, i])


def threshold_curve(maps: Maps, truth: Masks, *, bins: int = 1000, normalise: bool = False) -> Curve:
    """Cut score maps at bins + 1 thresholds from 0 to 1 and count the pixels against the truth.

    Args:
        maps: (N, H, W) scores in [0, 1], or a list of (H, W).
        truth: as many masks of the same sizes, 0, 1 and perhaps 255: pixels to ignore, which count nowhere.
        bins: steps of the threshold; 1000 is that of Choe et al. 2020.
        normalise: scale each map to [0, 1] by its own minimum and maximum first, as Choe et al. 2020, sec. 4, do; so
            a threshold is a share of the map's range, and raw maps of any sign may be given.

    Every pixel is counted once, in a histogram of the scores per picture, and the sums from the top are the counts of
    all thresholds. A score that reaches a threshold but for rounding (a millionth of it) reaches it. A map that is
    constant, or has a NaN or infinity, holds no evidence and counts as zeros, which only the threshold 0 lets through.

    Raises ClearwingError for scores outside of [0, 1] that are not to be normalised, where sizes differ, or for a truth
    that `iou` would refuse.

    >>> curve = threshold_curve(torch.tensor([[[0.9, 0.6, 0.2, 0.0]]]), torch.tensor([[[1, 1, 0, 0]]]), bins=10)
    >>> curve.mean_iou.tolist()[5:]  # at 0.5, 0.6, 0.7, 0.8, 0.9 and 1
    [1.0, 1.0, 0.5, 0.5, 0.5, 0.0]
    """
    _check_steps("bins", bins)
    size = bins + 1
    histograms = []
    for part, true in pairs(_scores(maps), masks_of(truth, "truth", ignore=True), "maps"):
        true = true.view(torch.uint8) if true.dtype == torch.bool else true.byte()
        histogram = torch.empty(len(part), 2, size, dtype=torch.int32, device=part.device)
        code = torch.empty_like(true[: together(part, 3 * size)])
        for start, reached in _reached(part, bins, normalise, 3 * size):
            n = len(reached)
            torch.add(true[start : start + n], 1, out=code[:n])  # ignore 0 (255 wraps), background 1, foreground 2
            picture = torch.arange(n, dtype=torch.int32, device=part.device)[:, None, None]
            index = reached.add_(code[:n], alpha=size).add_(picture, alpha=3 * size)
            counted = torch.bincount(index.flatten(), minlength=3 * size * n)
            histogram[start : start + n] = counted.view(n, 3, size)[:, 1:]
        histograms.append(histogram)
    # the counts at and above each threshold: sums from the top
    background, both = torch.cat(histograms).flip(2).cumsum(2, dtype=torch.int32).flip(2).unbind(1)
    thresholds = torch.arange(size, dtype=torch.float64, device=both.device) / bins
    return Curve(thresholds, both.contiguous(), background + both, both[:, 0].clone())


@dataclass(frozen=True)
class BoxAccuracy:
    """Boxes around what lies above each threshold, against true boxes: what `max_box_accuracy` gives.

    The maxima over thresholds look at the truth: both figures are oracles by definition.
    """

    thresholds: Tensor  # (T,) float64, from 0 to below 1
    levels: tuple[float, ...]  # (L,) of the IoU from which on a box is right
    largest: Tensor  # (N, T) float64, IoU of the box around the largest connected piece with the nearest true box
    best: Tensor  # (N, T) float64, the largest IoU of the box around any piece with any true box

    @property
    def accuracy(self) -> Tensor:
        """The share of the pictures that have a right box, at each level of IoU and threshold: float64 (L, T)."""
        return torch.stack([(self.best >= level).double().mean(0) for level in self.levels])

    @property
    def v1(self) -> float:
        """MaxBoxAcc, Choe et al. 2020, sec. 4: the box of the largest piece, IoU 0.5, at the best threshold."""
        return float((self.largest >= 0.5).double().mean(0).max())

    @property
    def v1_threshold(self) -> float:
        """Where MaxBoxAcc is taken: the lowest threshold that reaches it."""
        return float(self.thresholds[(self.largest >= 0.5).double().mean(0).argmax()])

    @property
    def v2(self) -> float:
        """MaxBoxAccV2, Choe et al. 2022: any piece's box, the mean over the levels of IoU of each one's maximum."""
        return float(self.accuracy.amax(1).mean())

    @property
    def v2_thresholds(self) -> tuple[float, ...]:
        """Where the maxima of MaxBoxAccV2 are taken, for each level of IoU: the lowest threshold that reaches it."""
        return tuple(self.thresholds[self.accuracy.argmax(1)].tolist())


def max_box_accuracy(
    maps: Maps,
    boxes: Tensor | Sequence[Any],
    *,
    steps: int = 100,
    levels: tuple[float, ...] = (0.3, 0.5, 0.7),
    normalise: bool = False,
    workers: int | None = None,
) -> BoxAccuracy:
    """MaxBoxAcc and MaxBoxAccV2 of score maps: Choe et al. 2020, sec. 4, and 2022.

    Args:
        maps: (N, H, W) scores in [0, 1], or a list of (H, W).
        boxes: the true boxes, (N, 4) or (N, B, 4), or a list of (4,) or (B, 4): x0, y0, x1, y1 in pixels of the maps,
            x1 and y1 exclusive; `box_of` gives those of masks. One true box that is met is enough.
        steps: thresholds, 0, 1/steps, ... below 1; 100 is that of the authors' code.
        levels: IoU from which on a box is right, for MaxBoxAccV2.
        normalise: as in `threshold_curve`.
        workers: threads (cv2 works outside the interpreter's lock); None: one a core.

    What has a score of at least the threshold is cut into connected pieces (8 neighbours), and each piece gives its
    tightest box; the largest piece is that of most pixels, its holes counted in. The authors' code differs in details
    that move a box by a pixel: it rounds scores to bytes, compares strictly, counts the last row and column of a box
    twice, and draws boxes around holes too.

    Raises ClearwingError where the numbers differ, a box has no area, or maps are as `threshold_curve` would refuse.

    >>> truth = torch.zeros(1, 8, 8, dtype=torch.bool)
    >>> truth[:, 2:6, 2:6] = True
    >>> found = max_box_accuracy(truth.roll(1, 2).float(), box_of(truth))  # an IoU of 12 / 20 above threshold 0
    >>> found.v1, found.v1_threshold, found.v2, found.v2_thresholds
    (1.0, 0.01, 0.6666666666666666, (0.01, 0.01, 0.0))
    """
    _check_steps("steps", steps)
    if not levels or not all(0 < level <= 1 for level in levels):
        raise ClearwingError("levels", levels, "give levels of IoU above 0 and up to 1, such as (0.3, 0.5, 0.7)")
    kind = np.uint8 if steps < 256 else np.int32
    reached: list[np.ndarray] = []
    for part in _scores(maps):
        for _, some in _reached(part, steps, normalise):
            reached.extend(some.cpu().numpy().astype(kind))
    wanted = _boxes(boxes, len(reached))

    def one(i: int) -> np.ndarray:
        found, first, largest = _pieces(reached[i], steps)
        ious = _box_iou(found, wanted[i])
        row = np.zeros((2, steps))
        row[:, : len(first)] = ious[largest], np.maximum.reduceat(ious, first)
        return row

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        rows = torch.from_numpy(np.stack(list(pool.map(one, range(len(reached))))))  # (N, 2, T)
    return BoxAccuracy(torch.arange(steps, dtype=torch.float64) / steps, tuple(levels), rows[:, 0], rows[:, 1])


def _check_steps(argument: str, value: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= 100_000:
        raise ClearwingError(argument, value, "give a whole number of steps, from 1 to 100000")


def _scores(maps: Maps) -> list[Tensor]:
    """`stacks` of floating maps."""
    parts = [part.detach() for part in stacks(maps, "maps")]
    for part in parts:
        if not part.is_floating_point():
            raise ClearwingError("maps", part.dtype, "give floating scores; masks are scored by iou")
    return [part if part.dtype in (torch.float32, torch.float64) else part.float() for part in parts]


def _reached(maps: Tensor, bins: int, normalise: bool, least: int = 1) -> Iterator[tuple[int, Tensor]]:
    """How many of the thresholds 1/bins, ..., 1 each score of (N, H, W) reaches, some maps at a time.

    Yields the index of the first map and int32 (n, H, W), from 0 to bins, which the next ones overwrite: fresh memory
    for every few maps would take longer than the arithmetic.
    """
    step = together(maps, least)
    scores, reached = torch.empty_like(maps[:step]), torch.empty_like(maps[:step], dtype=torch.int32)
    for start in range(0, len(maps), step):
        part = maps[start : start + step]
        low, high = part.amin((1, 2), keepdim=True), part.amax((1, 2), keepdim=True)
        span = high - low
        usable = span.isfinite() & (span > 0)  # neither constant nor with a NaN or infinity
        score, level = scores[: len(part)], reached[: len(part)]
        if normalise:
            torch.sub(part, low, out=score)
            score /= torch.where(usable, span, 1)
        elif bool((usable & ((low < 0) | (high > 1))).any()):
            value = f"scores from {low[usable].min():.3g} to {high[usable].max():.3g}"
            raise ClearwingError("maps", value, "give scores in [0, 1], or normalise=True")
        else:
            score.copy_(part)
        level.copy_(score.mul_(bins * (1 + 1e-6)))  # towards 0
        if not bool(usable.all()):
            level[~usable.flatten()] = 0
        yield start, level


def _pieces(reached: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of the connected pieces at every threshold that has any.

    Args:
        reached: (H, W), how many thresholds above 0 a pixel reaches.

    Returns:
        boxes (M, 4) of all thresholds, and for each threshold the index of its first box and of its largest piece's.
    """
    outlines: list[Any] = []
    outer, pieces = [], []
    for k in range(steps):
        mask = (reached >= k).view(np.uint8)
        contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        if not contours:
            break  # and there is nothing above it either
        outlines += contours
        outer.append(tree.reshape(-1, 4)[:, 3] < 0)  # without a parent: no outline of a hole
        pieces.append(int(outer[-1].sum()))
    kept = np.concatenate(outer)
    lengths = np.fromiter(map(len, outlines), np.int64, len(outlines))
    starts = np.cumsum(lengths) - lengths
    points = np.concatenate(outlines).reshape(-1, 2).astype(np.int64)  # x and y of pixels, each outline a closed walk
    after = np.roll(points, -1, 0)
    after[starts + lengths - 1] = points[starts]
    area = abs(np.add.reduceat(points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1], starts)[kept]) / 2
    enclosed = area + np.where(lengths > 1, lengths, 0)[kept] / 2 + 1  # pixels in and on it, by Pick's theorem
    low, high = np.minimum.reduceat(points, starts)[kept], np.maximum.reduceat(points, starts)[kept] + 1
    first = np.cumsum([0, *pieces[:-1]])
    largest = [i + int(enclosed[i : i + n].argmax()) for i, n in zip(first, pieces, strict=True)]
    return np.concatenate([low, high], 1), first, np.array(largest)


def _box_iou(boxes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The IoU of each box with the nearest of those wanted: (M, 4), (B, 4) -> float64 (M,)."""
    low = np.maximum(boxes[:, None, :2], wanted[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], wanted[None, :, 2:])
    both = (high - low).clip(min=0).prod(2)  # (M, B)
    areas = [(side[:, 2:] - side[:, :2]).prod(1) for side in (boxes, wanted)]
    return (both / (areas[0][:, None] + areas[1][None] - both)).max(1)


def _boxes(boxes: Tensor | Sequence[Any], n: int) -> list[np.ndarray]:
    """The true boxes of each picture, float64 (B, 4)."""
    rows = [np.asarray(torch.as_tensor(box).cpu(), np.float64) for box in boxes]
    if len(rows) != n:
        raise ClearwingError("boxes", f"{len(rows)} for {n} maps", "give the boxes of every map")
    for i, box in enumerate(rows):
        rows[i] = box = box[None] if box.ndim == 1 else box
        if box.ndim != 2 or box.shape[1] != 4 or not len(box):
            raise ClearwingError("boxes", f"{box.shape} for picture {i}", "give (4,) or (B, 4): x0, y0, x1, y1")
        if not (box[:, 2:] > box[:, :2]).all():
            mend = "x1 and y1 are exclusive and lie beyond x0 and y0; leave out pictures without an object"
            raise ClearwingError("boxes", f"{box.tolist()} of picture {i}", mend)
    return rows
