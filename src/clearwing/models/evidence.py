"""Where a classifier's own features see its class, found in the same pass: no gradient is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FLAT = 0.01
"""The deviation that counts as none: features behind batch normalisation are of order one. Of larger ones, this share
of their mean does: the steps of bfloat16 are up to 0.8 % of a number."""


def with_evidence(features: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Features (N, C, h, w), fine to coarse, with channels more that say where the class is: two of the coarsest, one
    of each other: (N, C + 2, h, w) and (N, C + 1, h, w), in channels_last. Where nothing stands out they are 0.

    weight: (N, C), of the mean of the coarsest features in the logit of the class.
    The two are the class activation map, sum_k w_k A^k (Zhou et al. 2016, eq. 2), and the same of the positive weights
    alone, which is LayerCAM there (Jiang et al. 2021) if no feature is negative, as behind a ReLU; both with mean 0 and
    deviation 1 over their picture. The second tells the finer features what to look for: see `discriminant`.
    """
    *finer, coarsest = features
    found = torch.stack([weight, weight.clamp(min=0)], 1).to(coarsest.dtype) @ coarsest.flatten(2)
    maps = _standardised(_precise(found)).unflatten(2, coarsest.shape[2:])  # (N, 2, h, w)
    own = [discriminant(x, maps[:, 1]) for x in finer]
    told = [*(one[:, None] for one in own), maps]
    return [_joined(x, more.to(x.dtype)) for x, more in zip(features, told, strict=True)]


def discriminant(features: Tensor, seeds: Tensor) -> Tensor:
    """What tells the places that the seeds favour from those that they oppose: (N, H, W) of features (N, C, H, W).

    x . d - (m+ + m-) . d / 2 with d = (m+ - m-) / s^2, channel by channel: Fisher's linear discriminant of each
    picture's own features, their channels taken as independent (Bickel and Levina 2004), with the variance s^2 over the
    picture in the place of that within the two sides. m+ is the mean of the features weighted by the positive seeds, m-
    by the negative ones; 0 lies midway between them. So a picture is searched for the colours and textures that are its
    object's alone. Means and variances are those of 2 x 2 pooled features, and of these the deviation is made 1.

    seeds: (N, h, w), of any size.
    """
    few = _precise(F.avg_pool2d(features, 2, ceil_mode=True))
    seeds = F.interpolate(seeds[:, None], few.shape[2:], mode="bilinear", align_corners=False)
    mean = few.mean((2, 3))
    few = few - mean[:, :, None, None]  # else what is nearly flat would be told apart by its rounding
    inside, outside = (_mean(few, side) for side in (seeds.clamp(min=0), -seeds.clamp(max=0)))
    variance = few.square().mean((2, 3))  # `var` takes ten times as long here
    direction = (inside - outside) / (variance + FLAT**2 * (1 + mean.square()))
    along = torch.einsum("nc,nchw->nhw", direction, few)
    direction = direction / along.std((1, 2), correction=0).clamp(min=FLAT)[:, None]
    direction = direction.to(features.dtype)
    middle = (_precise(direction) * (mean + (inside + outside) / 2)).sum(1)
    return _precise(torch.einsum("nc,nchw->nhw", direction, features)) - middle[:, None, None]


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _joined(features: Tensor, more: Tensor) -> Tensor:
    """Both, (N, C, h, w), as channels of one, in channels_last: `cat` alone would give that up for one channel."""
    return torch.cat([x.permute(0, 2, 3, 1) for x in (features, more)], 3).permute(0, 3, 1, 2)


def _mean(features: Tensor, weights: Tensor) -> Tensor:
    """The mean (N, C) over the places, by weights (N, 1, h, w) of at least 0; 0 where all weights are 0."""
    return (features * weights).sum((2, 3)) / weights.sum((2, 3)).clamp(min=FLAT**2)


def _standardised(maps: Tensor) -> Tensor:
    """Maps (N, M, hw) with mean 0 and deviation 1."""
    deviation, mean = torch.std_mean(maps, 2, correction=0, keepdim=True)
    return (maps - mean) / deviation.clamp(min=FLAT**2)
