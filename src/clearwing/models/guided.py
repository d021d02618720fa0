"""The guided filter: a map that follows the edges of its picture, differentiable, and cheap beside a network's pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def guided_filter(
    maps: Tensor,
    images: Tensor,
    radius: int = 3,
    epsilon: float = 1e-4,
    step: int = 2,
    fine: Tensor | None = None,
) -> Tensor:
    """Maps (N, H, W) as a linear function of the colours of their pictures (N, C, H, W) in every window: (N, H, W), or
    (N, H', W') of `fine` ones.

    He, Sun and Tang 2013: in each window q = a . I + b with a = (Sigma + epsilon U)^-1 (mean(I p) - mean(I) mean(p))
    and b = mean(p) - a . mean(I) (eq. 19 and 20); a and b are averaged over the windows that hold a pixel (eq. 21).
    As in the fast guided filter (He and Sun 2015), a and b are found on pictures smaller by `step` and upsampled.

    images: in [0, 1]; three channels are colours, any other number is averaged to one.
    fine: the same pictures in another size, (N, C, H', W'): the functions found on the small ones are taken of these.
    radius: of the square windows, in pixels of the smaller picture. epsilon: the variance that counts as flat.
    """
    precise = torch.promote_types(maps.dtype, torch.float32)  # a variance is a small difference of large numbers
    maps, images = maps.to(precise), images.to(precise)
    guide = _guide(images)
    small, p = (F.avg_pool2d(x, step, ceil_mode=True) for x in (guide, maps[:, None]))
    colours = small.split(1, 1)
    pairs = [(i, j) for i in range(len(colours)) for j in range(i, len(colours))]
    products = [colours[i] * colours[j] for i, j in pairs]
    found = _box(torch.cat([small, p, small * p, *products], 1), radius).split(
        [len(colours), 1, len(colours), len(pairs)], 1
    )
    mean, mean_p, mean_ip, second = found
    means = mean.split(1, 1)
    variance = {
        (i, j): x - means[i] * means[j] + (epsilon if i == j else 0)
        for (i, j), x in zip(pairs, second.split(1, 1), strict=True)
    }
    a = _solved(variance, (mean_ip - mean * mean_p).split(1, 1))
    b = mean_p - (a * mean).sum(1, keepdim=True)
    if fine is not None:
        guide = _guide(fine.to(precise))
    line = F.interpolate(_box(torch.cat([a, b], 1), radius), guide.shape[2:], mode="bilinear", align_corners=False)
    return (line[:, :-1] * guide).sum(1) + line[:, -1]


def _guide(images: Tensor) -> Tensor:
    return images if images.shape[1] == 3 else images.mean(1, keepdim=True)


def _box(x: Tensor, radius: int) -> Tensor:
    """The mean over windows of 2 radius + 1; the border repeats."""
    x, side = F.pad(x, [radius] * 4, mode="replicate"), 2 * radius + 1
    return F.avg_pool2d(F.avg_pool2d(x, (1, side), stride=1), (side, 1), stride=1)


def _solved(s: dict[tuple[int, int], Tensor], v: tuple[Tensor, ...]) -> Tensor:
    """The solution of S a = v for a symmetric S, one or three rows, at every place: by its factors L D L^T, as plain
    arithmetic goes through a whole batch (and into ONNX) where a solver takes one small matrix after the other. By
    Cramer's rule, digits would be lost where the colours are nearly one, as in a grey picture."""
    if len(v) == 1:
        return v[0] / s[0, 0]
    d1, rg, rb, gg, gb, bb = (s[key] for key in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)))
    l1, l2 = rg / d1, rb / d1
    d2, e = gg - l1 * rg, gb - l1 * rb
    l3 = e / d2
    d3 = bb - l2 * rb - l3 * e
    r, g, b = v
    g = g - l1 * r
    b = (b - l2 * r - l3 * g) / d3
    g = g / d2 - l3 * b
    return torch.cat([r / d1 - l1 * g - l2 * b, g, b], 1)
