"""Teaching a mask: pictures with a share of foreground and a weight for every pixel, and the loss on both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from clearwing.data.augment import Draw, colour_jitter, random_flip, random_resized_crop
from clearwing.data.loader import Pictures
from clearwing.models.decoder import Segmenter
from clearwing.train.fit import Loss
from clearwing.types import Batch, ClearwingError


def with_masks(pictures: Pictures, shares: Tensor, weights: Tensor) -> Pictures:
    """The pictures with two channels more: the share of foreground, and how much each pixel counts.

    shares: (N, H, W) in [0, 1]. weights: (N,) or (N, H, W) in [0, 1]. Both are kept in 8 bits, and go through every
    crop and flip with their picture.
    """
    N, C, H, W = pictures.images.shape
    for argument, values in (("shares", shares), ("weights", weights)):
        fits = values.shape == (N, H, W) or (values.ndim == 1 and argument == "weights" and len(values) == N)
        if not fits or not (values.min() >= 0 and values.max() <= 1):
            found = f"{tuple(values.shape)}, {values.min():.3g} to {values.max():.3g}"
            raise ClearwingError(argument, found, f"give values in [0, 1] for {N} pictures of {H} x {W}")
    images = torch.empty(N, C + 2, H, W, dtype=torch.uint8, memory_format=torch.channels_last)
    images[:, :C] = pictures.images
    images[:, C] = (shares * 255).round()
    images[:, C + 1] = (weights * 255).round().view(N, *(weights.shape[1:] or (1, 1)))
    return replace(pictures, images=images)


@dataclass(frozen=True)
class MaskAugment:
    """Crop, mirror and change the colours of pictures with masks, uint8 (N, C + 2, H, W) from `with_masks`.

    size: side of what comes out. scale: areas of the crops, as shares of the picture's. jitter: of the picture alone.
    """

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    jitter: float = 0.3

    def __call__(self, images: Tensor, draw: Generator | Draw) -> Tensor:
        images = random_flip(random_resized_crop(images, draw, self.size, self.scale), draw)
        picture, mask = images[:, :-2], images[:, -2:]
        picture = colour_jitter(picture, draw, self.jitter, self.jitter, self.jitter if picture.shape[1] == 3 else 0.0)
        return torch.cat([picture, mask.to(picture.dtype)], 1)


@dataclass(frozen=True)
class Lesson(Batch):
    """A batch for a decoder: its images end with the two channels of `with_masks`."""

    features: tuple[Tensor, ...] = ()  # (N, C, h, w) each, as `Segmenter.features` gives them, fine to coarse


def lessons(
    segmenter: Segmenter,
    batches: Iterable[Batch],
    size: int,
    *,
    times: int = 1,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Lesson]:
    """Lessons of `size` pictures from larger batches of pictures with masks, each picture in `times` of them.

    Data echoing with a shuffle buffer (Choi et al. 2019, section 2): a classifier's pass costs more than the lesson,
    so each batch passes once, and its pictures are drawn from it in another order every time. What is left over when
    a batch is divided is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        with torch.no_grad(), autocast():
            features = segmenter.features(batch.images[:, :-2])[1]
        for _ in range(times):
            for rows in torch.randperm(len(batch), generator=generator).split(size):
                if len(rows) == size:
                    rows = rows.to(batch.images.device)
                    yield Lesson(batch.images[rows], features=tuple(x[rows] for x in features))


def mask_loss() -> Loss:
    """Cross-entropy of every pixel plus the soft Jaccard loss of every picture (Rahman and Wang 2016, eq. 3), for a
    decoder that gives mask logits (N, H, W), on lessons.

    What it counts as right is the sum of the IoUs with what was taught, so the share of it is a mean IoU.
    """

    def loss(module: nn.Module, lesson: Lesson) -> tuple[Tensor, Tensor]:
        share, weight = lesson.images[:, -2].float(), lesson.images[:, -1].float()
        logits = module(lesson.features, share.shape[1:]).float()
        entropy = F.binary_cross_entropy_with_logits(logits, share, reduction="none")
        p = logits.sigmoid()
        both, either = (weight * p * share).sum((1, 2)), (weight * (p + share - p * share)).sum((1, 2))
        jaccard = 1 - (both + 1) / (either + 1)  # the one keeps it smooth where neither holds anything
        trust = weight.mean((1, 2))
        by_pixel = (weight * entropy).sum() / weight.sum().clamp(min=1)
        by_picture = (trust * jaccard).sum() / trust.sum().clamp(min=1)
        with torch.no_grad():
            found, taught = logits > 0, share > 0.5
            union = (found | taught).sum((1, 2))
            right = torch.where(union > 0, (found & taught).sum((1, 2)) / union.clamp(min=1), 1.0).sum()
        return by_pixel + by_picture, right

    return loss
