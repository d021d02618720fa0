"""From a map to a mask by one number per map: percentile, Otsu, mean, a share of the maximum, a value.

A map without evidence (zero, constant, or with a NaN or infinity) gives an empty mask; `informative` tells which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearwing.types import ClearwingError, near

THRESHOLDS = ("percentile:80", "otsu", "mean", "max:0.2")
"""What `binarize` takes, besides a plain number; the numbers after the colon are examples."""


def informative(maps: Tensor) -> Tensor:
    """Which maps hold evidence: finite, and not one value everywhere. (N, H, W) -> bool (N,)."""
    flat = _floating(maps).flatten(1)
    return flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1))


def quantiles(maps: Tensor, shares: tuple[float, ...]) -> Tensor:
    """The quantiles of each map, interpolated linearly as by NumPy: (N, H, W) -> (len(shares), N, 1, 1).

    Written with a sort because `torch.quantile` refuses inputs of more than 16 million elements.
    """
    if not all(0 <= share <= 1 for share in shares):
        raise ClearwingError("shares", shares, "give shares between 0 and 1")
    ordered = _floating(maps).flatten(1).sort(1).values  # (N, HW)
    place = torch.tensor(shares, dtype=torch.float64) * (ordered.shape[1] - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=ordered.shape[1] - 1)
    weight = (place - below).to(ordered)
    values = torch.lerp(ordered[:, below.to(maps.device)], ordered[:, above.to(maps.device)], weight)
    return values.T[:, :, None, None]


def percentile(maps: Tensor, q: float = 80.0) -> Tensor:
    """What lies above the q-th percentile of its own map, and always the maximum. (N, H, W) -> bool (N, H, W).

    The maximum is kept because nothing lies above the percentile where the largest value fills more than 100 - q %.
    """
    if not 0 <= q <= 100:
        raise ClearwingError("q", q, "give a percentile between 0 and 100")
    maps, usable = _usable(maps)
    return ((maps > quantiles(maps, (q / 100,))[0]) | (maps == maps.amax((1, 2), keepdim=True))) & usable


def mean(maps: Tensor) -> Tensor:
    """What lies above the mean of its own map. (N, H, W) -> bool (N, H, W)."""
    maps, usable = _usable(maps)
    return (maps > maps.mean((1, 2), keepdim=True)) & usable


def otsu(maps: Tensor) -> Tensor:
    """What lies above Otsu's threshold of its own map. (N, H, W) -> bool (N, H, W)."""
    maps, usable = _usable(maps)
    return (maps > otsu_threshold(maps)[:, None, None]) & usable


def otsu_threshold(maps: Tensor, bins: int = 256) -> Tensor:
    """The threshold k* that maximises the variance between the two classes, Otsu 1979, eq. 14. (N, H, W) -> (N,).

    The histogram has `bins` bins from the minimum to the maximum of each map, and the threshold is the centre of a bin,
    as in `skimage.filters.threshold_otsu`. A constant map gives its value.
    """
    x = _floating(maps).flatten(1)  # (N, HW)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    steps = torch.arange(bins + 1, device=x.device, dtype=x.dtype) / bins
    edges = low + (high - low) * steps  # (N, bins + 1)
    width = torch.where(high > low, high - low, 1)
    index = ((x - low) / width * bins).long().clamp(0, bins - 1)
    index -= (x < edges.gather(1, index)).long()  # the division rounds: the edges decide, as in numpy.histogram
    index += ((x >= edges.gather(1, index + 1)) & (index < bins - 1)).long()
    counts = x.new_zeros(len(x), bins).scatter_add_(1, index, torch.ones_like(x))

    # in units of bins: the best k is the same, and the sums are halves, exact in float32 up to 8 million
    places = counts * (torch.arange(bins, device=x.device) + 0.5)
    weight, first = counts.cumsum(1), places.cumsum(1)  # w(k), mu(k) of the paper, times HW
    weight_above, first_above = weight[:, -1:] - weight, first[:, -1:] - first
    difference = first[:, :-1] / weight[:, :-1] - first_above[:, :-1] / weight_above[:, :-1]
    between = weight[:, :-1] * weight_above[:, :-1] * difference**2
    best = torch.where(high > low, between.argmax(1, keepdim=True), 0)
    return ((edges.gather(1, best) + edges.gather(1, best + 1)) / 2)[:, 0]


def binarize(maps: Tensor, how: str | float) -> Tensor:
    """Maps to masks by a named threshold: (N, H, W) -> bool (N, H, W).

    `how`: "percentile:80", "otsu", "mean", "max:0.2" (a share of the map's maximum, as Zhou et al. 2016 cut CAMs), or a
    number, which is compared with the raw values. Always strictly above; see `percentile` for its one exception.

    Raises ClearwingError for an unknown name, a number that cannot be read, or maps that are not (N, H, W).
    """
    if isinstance(how, int | float):
        raw, usable = _usable(maps)
        return (raw > how) & usable
    name, _, number = str(how).partition(":")
    if name == "otsu" and not number:
        return otsu(maps)
    if name == "mean" and not number:
        return mean(maps)
    if name == "percentile":
        return percentile(maps, _number(how, number or "80"))
    if name == "max":
        raw, usable = _usable(maps)
        share = _number(how, number or "0.2")
        if not 0 <= share < 1:
            raise ClearwingError("threshold", how, "give a share of the maximum from 0 to below 1")
        return (raw > share * raw.amax((1, 2), keepdim=True)) & usable
    raise ClearwingError("threshold", how, near(str(how), THRESHOLDS))


def _number(how: object, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ClearwingError("threshold", how, "write a number after the colon, as in percentile:80") from None


def _floating(maps: Tensor) -> Tensor:
    if not isinstance(maps, Tensor) or maps.ndim != 3 or not maps.numel():
        shape = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ClearwingError("maps", shape, "give a tensor of maps (N, H, W)")
    return maps if maps.dtype in (torch.float32, torch.float64) else maps.float()


def _usable(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps with those that hold no evidence set to zero, and which do: floating (N, H, W), bool (N, 1, 1)."""
    maps = _floating(maps)
    usable = informative(maps)[:, None, None]
    return torch.where(usable, maps, 0), usable
