"""Test-time averaging: the ways in which a picture is shown to the network, and the way back for the maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch.nn.functional as F
from torch import Tensor

from clearwing.attribution.network import wide
from clearwing.types import ClearwingError


@dataclass(frozen=True)
class View:
    """One way to show a picture: mirrored left to right or not, and resized."""

    flip: bool = False
    scale: float = 1.0

    def see(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) as this view shows them, (N, C, round(scale H), round(scale W))."""
        if self.scale != 1:
            H, W = (max(1, round(side * self.scale)) for side in images.shape[2:])
            fine = F.interpolate(wide(images), (H, W), mode="bilinear", antialias=True)  # has no kernel for bfloat16
            images = fine.to(images.dtype)
        return images.flip(-1) if self.flip else images

    def back(self, maps: Tensor, height: int, width: int, shares: bool = False) -> Tensor:
        """Maps (..., h, w) of what this view showed, at (height, width) of the picture, the right way round.

        shares: of values that share something out, which are fewer or more here than there, their sum is kept.
        """
        maps = maps.flip(-1) if self.flip else maps
        h, w = maps.shape[-2:]
        if (h, w) == (height, width):
            return maps
        fine = upsample(maps, height, width)
        return fine * (h * w / (height * width)) if shares else fine


PLAIN = View()


def views(average: Sequence[str | float]) -> list[View]:
    """The views that `average` asks for, the plain one first: ("flip", 0.75) are four.

    Raises ClearwingError for what is neither "flip" nor a positive number.
    """
    scales, flips = [1.0], [False]
    if isinstance(average, str | int | float):
        average = (average,)
    if not isinstance(average, Sequence):
        raise ClearwingError("average", average, 'give "flip" and scales such as 0.75, as in ("flip", 0.75, 1.25)')
    for item in average:
        if item == "flip":
            flips = [False, True]
        elif isinstance(item, int | float) and not isinstance(item, bool) and isfinite(item) and item > 0:
            scales.append(float(item))
        else:
            raise ClearwingError("average", item, 'give "flip" and scales such as 0.75, as in ("flip", 0.75, 1.25)')
    return [View(flip, scale) for scale in dict.fromkeys(scales) for flip in flips]


def upsample(maps: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, pixel centres at half-integers, (..., h, w) -> (..., height, width)."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    fine = F.interpolate(flat, (height, width), mode="bilinear", align_corners=False)
    return fine.reshape(*maps.shape[:-2], height, width)
