"""From a map or a rough mask to the object's own outline: blur, dilate, seeds, GrabCut, clean-up."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clearwing.masks.threshold import informative, quantiles
from clearwing.types import ClearwingError

SURE_BACKGROUND, SURE_FOREGROUND, PROBABLE_BACKGROUND, PROBABLE_FOREGROUND = (
    cv2.GC_BGD,
    cv2.GC_FGD,
    cv2.GC_PR_BGD,
    cv2.GC_PR_FGD,
)
"""The codes of a seed map (uint8), as cv2.grabCut has them. An odd code is foreground."""

FEWEST_SEEDS = 5
"""GrabCut fits five Gaussians to either side; with fewer pixels than that there is nothing to fit."""


def dilate(masks: Tensor, size: int = 5) -> Tensor:
    """A max-pool of `size` x `size` with stride 1: foreground grows by size // 2 pixels. bool (N, H, W) -> the same."""
    _check_masks(masks)
    if size < 1 or size % 2 == 0:
        raise ClearwingError("size", size, "give an odd number of pixels")
    return F.max_pool2d(masks[:, None].float(), size, stride=1, padding=size // 2)[:, 0] > 0


def blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a standard deviation of `sigma` pixels; borders repeat. floating (N, H, W) -> the same.

    The kernel ends at four sigma, as in `scipy.ndimage.gaussian_filter(mode="nearest")`.
    """
    if maps.ndim != 3 or not maps.is_floating_point():
        raise ClearwingError("maps", f"{maps.dtype} {tuple(maps.shape)}", "give floating maps (N, H, W)")
    if sigma <= 0:
        return maps
    radius = int(4 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None, None]  # (1, 1, 1, 2 radius + 1)
    padded = F.pad(maps[:, None], [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.mT)[:, 0]


def seeds(maps: Tensor, foreground: Tensor, *, sure_foreground: float, sure_background: float) -> Tensor:
    """Where GrabCut starts, from the ranks of each map alone: (N, H, W) -> uint8 codes (N, H, W).

    `foreground` (bool, a thresholded map) is probable foreground, and sure where the map lies above its quantile
    `sure_foreground`; the rest is probable background, and sure where the map lies below its quantile
    `sure_background`. Both comparisons are strict, so ties (a rectified map is zero in many places) are never sure.
    A map without evidence is background throughout.

    >>> codes = seeds(maps, percentile(maps, 85), sure_foreground=0.97, sure_background=0.4)
    """
    if not 0 <= sure_background <= sure_foreground <= 1:
        value = f"sure_foreground={sure_foreground}, sure_background={sure_background}"
        raise ClearwingError("seeds", value, "give shares from 0 to 1, the background's not above the foreground's")
    _check_masks(foreground, maps.shape)
    usable = informative(maps)[:, None, None]
    maps = torch.where(usable, maps, 0)
    high, low = quantiles(maps, (sure_foreground, sure_background))
    codes = torch.where(maps < low, SURE_BACKGROUND, PROBABLE_BACKGROUND)
    codes = torch.where(foreground, torch.where(maps > high, SURE_FOREGROUND, PROBABLE_FOREGROUND), codes)
    return torch.where(usable, codes, SURE_BACKGROUND).byte()


def likely_seeds(probability: Tensor, *, sure_foreground: float = 0.99, sure_background: float = 0.2) -> Tensor:
    """Where GrabCut starts, from the foreground's probability: (N, H, W) in [0, 1] -> uint8 codes (N, H, W).

    Probable foreground above 0.5, sure above `sure_foreground`; the rest is probable background, sure below
    `sure_background`. Unlike `seeds`, nothing need be sure.

    >>> codes = likely_seeds(segmenter(images)[1].sigmoid())
    """
    if not 0 <= sure_background <= 0.5 <= sure_foreground <= 1:
        value = f"sure_foreground={sure_foreground}, sure_background={sure_background}"
        raise ClearwingError("seeds", value, "give the background 0 to 0.5, the foreground 0.5 to 1")
    background = torch.where(probability < sure_background, SURE_BACKGROUND, PROBABLE_BACKGROUND)
    foreground = torch.where(probability > sure_foreground, SURE_FOREGROUND, PROBABLE_FOREGROUND)
    return torch.where(probability > 0.5, foreground, background).byte()


def grabcut(
    images: Tensor,
    codes: Tensor,
    *,
    iterations: int = 1,
    colours: int = 64,
    most: float = 0.95,
    workers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """GrabCut from seeds, Rother, Kolmogorov and Blake 2004: the masks, and where it gave none.

    Args:
        images: (N, C, H, W) in [0, 1], one or three channels.
        codes: uint8 (N, H, W), from `seeds` or `likely_seeds`.
        iterations: rounds of fitting the colours and cutting the graph.
        colours: longer side of the copy of each picture that the colours are first guessed on, by k-means; every round
            then fits them to all pixels. The guess on all pixels took longer than a cut, and was no better.
        most: a foreground of a larger share than this is a failure.
        workers: threads (cv2 works outside the interpreter's lock); None: one a core.

    Returns:
        masks bool (N, H, W), fell_back bool (N,). A picture falls back to the foreground of its seeds where either side
        has fewer than `FEWEST_SEEDS` pixels to start from or the result is empty or larger than `most`.

    A picture's random numbers start at the same seed whatever its batch, so a batch equals one by one.
    """
    check_images(images, codes.shape)
    if codes.dtype != torch.uint8 or codes.max() > PROBABLE_FOREGROUND:
        raise ClearwingError("codes", f"{codes.dtype} up to {codes.max()}", "give the codes that seeds makes")
    pictures, starts = _uint8(images), codes.cpu().numpy()

    def one(i: int) -> tuple[np.ndarray, bool]:
        foreground = (starts[i] & 1).astype(bool)
        if not _enough(foreground):
            return foreground, True
        cut = starts[i].copy()
        cv2.grabCut(pictures[i], cut, _NO_BOX, *_guess(pictures[i], cut, colours), iterations, cv2.GC_EVAL)
        cut = (cut & 1).astype(bool)
        return (cut, False) if 0 < cut.mean() <= most else (foreground, True)

    return _gather(one, len(images), codes.device, workers)


_NO_BOX = (0, 0, 0, 0)


def _guess(picture: np.ndarray, codes: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's colour models of background and foreground, guessed on a copy whose longer side is at most `side`."""
    scale = min(1.0, side / max(codes.shape))
    size = max(1, round(codes.shape[1] * scale)), max(1, round(codes.shape[0] * scale))
    small = np.asarray(cv2.resize(codes, size, interpolation=cv2.INTER_NEAREST), np.uint8)
    if _enough((small & 1).astype(bool)):
        picture, codes = cv2.resize(picture, size, interpolation=cv2.INTER_AREA), small
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # of this thread only; k-means draws its first centres from it
    cv2.grabCut(picture, codes.copy(), _NO_BOX, *models, 0, cv2.GC_INIT_WITH_MASK)
    return models


def _enough(foreground: np.ndarray) -> bool:
    """Whether both sides have the pixels that a model needs."""
    return bool(FEWEST_SEEDS <= foreground.sum() <= foreground.size - FEWEST_SEEDS)


def clean(masks: Tensor, maps: Tensor, *, share: float = 0.2, fill: bool = True, workers: int | None = None) -> Tensor:
    """Drop the pieces that the map does not support, and fill the holes. bool (N, H, W) -> the same.

    Of the connected pieces (8 neighbours), those stay whose map values (negative ones count as 0) sum to at least
    `share` of the largest such sum; 0 keeps all, 1 the best supported alone. A hole is background that does not reach
    the border (4 neighbours).
    """
    _check_masks(masks, maps.shape)
    if not 0 <= share <= 1:
        raise ClearwingError("share", share, "give a share from 0 to 1")
    given, mass = masks.cpu().numpy(), maps.clamp(min=0).cpu().double().numpy()

    def one(i: int) -> tuple[np.ndarray, bool]:
        mask = given[i]
        count, pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        if count > 2:
            support = np.bincount(pieces.ravel(), mass[i].ravel(), minlength=count)
            support[0] = 0
            keep = support >= share * support.max()
            keep[0] = False
            mask = keep[pieces]
        if fill and mask.any():
            outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
            _, regions = cv2.connectedComponents(outside, connectivity=4)
            mask = (regions != regions[0, 0])[1:-1, 1:-1]
        return mask, False

    return _gather(one, len(masks), masks.device, workers)[0]


def _gather(one, n: int, device: torch.device, workers: int | None) -> tuple[Tensor, Tensor]:
    """Call `one(i)` for every picture in threads: stacked masks bool (N, H, W) and flags bool (N,)."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        masks, flags = zip(*pool.map(one, range(n)), strict=True)
    return torch.from_numpy(np.stack(masks)).to(device), torch.tensor(flags, device=device)


def _uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [0, 1] -> contiguous uint8 (N, H, W, 3).

    RGB stays RGB: neither the full covariances nor the Euclidean distances of GrabCut know the order of channels.
    """
    pixels = (images.detach().float() * 255).round().clamp(0, 255).byte()
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check_masks(masks: Tensor, shape: torch.Size | None = None) -> None:
    if masks.ndim != 3 or masks.dtype != torch.bool or not masks.numel():
        raise ClearwingError("masks", f"{masks.dtype} {tuple(masks.shape)}", "give bool masks (N, H, W)")
    if shape is not None and masks.shape != shape:
        raise ClearwingError("masks", tuple(masks.shape), f"give as many of the same size as the maps, {tuple(shape)}")


def check_images(images: Tensor, shape: torch.Size | None = None) -> None:
    """Refuse what is not pictures (N, C, H, W) in [0, 1], or does not fit maps of `shape` (N, H, W)."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point() or not images.numel():
        value = f"{images.dtype} {tuple(images.shape)}"
        raise ClearwingError("images", value, "give floating pictures (N, C, H, W) in [0, 1], one or three channels")
    low, high = images.aminmax()
    if not (low >= -0.01 and high <= 1.01):
        raise ClearwingError("images", f"values {low:.3g} to {high:.3g}", "give pictures in [0, 1], not normalised")
    if shape is not None and (len(images), *images.shape[-2:]) != tuple(shape):
        raise ClearwingError("images", tuple(images.shape), f"give as many and as large as the maps, {tuple(shape)}")
