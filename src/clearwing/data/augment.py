"""Augmentation of whole batches: every decision is drawn per picture, no loop runs over pictures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clearwing.data.resample import resample
from clearwing.types import ClearwingError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
PADDINGS = ("reflect", "zero")
AUTOS = ("trivial", "rand")


@dataclass(frozen=True, eq=False)
class Draw:
    """What is drawn for one batch, taken wherever a Generator is: it draws for the whole batch and keeps its own part,
    so that a picture gets the same augmentation however many processes share the batch.
    """

    generator: Generator
    total: int  # pictures of the whole batch, over all processes
    first: int  # place of this process's first picture in it
    index: Tensor  # (n,) int64, the positions of its n pictures in the data set
    epoch: int
    seed: int = 0


def seed_of(*numbers: int) -> int:
    """A seed of 56 bits from these numbers (a seed, an epoch, a batch ...) by SHA-256; neighbours share nothing."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def unit(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1]; floating ones as they are."""
    return images if images.is_floating_point() else images.to(torch.float32).div_(255)


def _part(count: int, generator: Generator | Draw) -> tuple[Generator, int, slice]:  # how many to draw, which to keep
    if isinstance(generator, Draw):
        return generator.generator, generator.total, slice(generator.first, generator.first + count)
    return generator, count, slice(None)


@lru_cache(maxsize=64)
def _kept(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A constant on the device, made once: every copy to an accelerator would wait for it."""
    return torch.tensor(values, device=device, dtype=dtype)


def _uniform(count: int, low: float, high: float, generator: Generator | Draw, like: Tensor) -> Tensor:
    """(count,) draws from [low, high) on the generator's device, brought to that of the pictures."""
    source, total, own = _part(count, generator)
    drawn = torch.rand(total, generator=source, device=source.device)[own] * (high - low) + low
    return drawn.to(like.device, like.dtype if like.is_floating_point() else torch.float32, non_blocking=True)


def _whole(count: int, below: int, generator: Generator | Draw, like: Tensor) -> Tensor:
    """(count,) whole numbers from 0 to below - 1."""
    source, total, own = _part(count, generator)
    drawn = torch.randint(below, (total,), generator=source, device=source.device)[own]
    return drawn.to(like.device, non_blocking=True)


def random_crop(images: Tensor, generator: Generator | Draw, padding: int, mode: str = "reflect") -> Tensor:
    """Shift each picture (N, C, H, W) by up to `padding` pixels; what comes in is mirrored (`reflect`) or `zero`."""
    if mode not in PADDINGS:
        raise ClearwingError("padding_mode", mode, f"choose one of {', '.join(PADDINGS)}")
    N, C, H, W = images.shape
    if padding < 0 or (mode == "reflect" and padding >= min(H, W)):
        raise ClearwingError("crop_padding", padding, f"give 0 to {min(H, W) - 1} pixels for pictures of {H}x{W}")
    rows = torch.arange(H, device=images.device) + (_whole(N, 2 * padding + 1, generator, images) - padding)[:, None]
    columns = torch.arange(W, device=images.device) + (_whole(N, 2 * padding + 1, generator, images) - padding)[:, None]
    outside = ((rows < 0) | (rows >= H))[:, :, None] | ((columns < 0) | (columns >= W))[:, None]  # (N, H, W)
    rows, columns = _reflect(rows, H), _reflect(columns, W)
    picture = torch.arange(N, device=images.device)[:, None, None]
    index = (picture * H + rows[:, :, None]) * W + columns[:, None]  # (N, H, W) into the pixels of the batch
    pixels = images.permute(0, 2, 3, 1).reshape(N * H * W, C)
    moved = pixels.index_select(0, index.flatten()).view(N, H, W, C).permute(0, 3, 1, 2)
    return moved.masked_fill(outside[:, None], 0) if mode == "zero" else moved


def _reflect(index: Tensor, length: int) -> Tensor:  # mirrored at the centres of the first and the last pixel
    return (length - 1 - (length - 1 - index.abs()).abs()).clamp(0, length - 1)


def random_resized_crop(
    images: Tensor,
    generator: Generator | Draw,
    size: int | Sequence[int],
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float | Tensor = 0.0,
) -> Tensor:
    """A box of random area (a share of the picture's) and aspect of each picture, resized to `size`, antialiased.

    Area and log aspect are uniform; a side longer than the picture is cut to it, where torchvision draws again. `flip`
    is the probability of mirroring, or says which (N,) are mirrored; that costs nothing here. Pictures in uint8 come
    out as float32 in [0, 1].
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ClearwingError("scale", scale, "give two shares of the area, 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ClearwingError("ratio", ratio, "give two aspects (width / height), 0 < low <= high")
    N, _, H, W = images.shape
    area = _uniform(N, *scale, generator, images) * (H * W)
    aspect = _uniform(N, math.log(ratio[0]), math.log(ratio[1]), generator, images).exp()
    height = (area / aspect).sqrt().round().clamp(1, H)
    width = (area * aspect).sqrt().round().clamp(1, W)
    top = (_uniform(N, 0, 1, generator, images) * (H - height + 1)).floor()
    left = (_uniform(N, 0, 1, generator, images) * (W - width + 1)).floor()
    mirrored = _chosen(N, flip, generator, images) if isinstance(flip, Tensor) or flip else None
    return resample(images, torch.stack([top, left, height, width], 1), size, mirrored)


def random_flip(
    images: Tensor, generator: Generator | Draw, probability: float | Tensor = 0.5, vertical: bool = False
) -> Tensor:
    """Mirror each picture left to right (or top to bottom) with this probability, or those that (N,) bool names."""
    mirrored = _chosen(len(images), probability, generator, images)
    return torch.where(mirrored[:, None, None, None], images.flip(2 if vertical else 3), images)


def _chosen(count: int, probability: float | Tensor, generator: Generator | Draw, like: Tensor) -> Tensor:  # (count,)
    if isinstance(probability, Tensor):
        return probability.to(like.device, non_blocking=True)
    return _uniform(count, 0, 1, generator, like) < probability


def alternating(draw: Generator | Draw) -> Tensor:
    """Which pictures (n,) are mirrored in this epoch: a fixed half of the set in even epochs, the others in odd ones.

    Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3.6: two successive epochs show each picture
    from both sides, where chance would show a quarter of them mirrored twice and a quarter never.
    """
    if not isinstance(draw, Draw):
        raise ClearwingError(
            "alternate_flip", True, "it needs the places and the epoch of a Draw; a Generator has none"
        )
    x = draw.index + seed_of(draw.seed)
    for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # of splitmix64, as signed numbers
        x = (x ^ (x >> 30)) * factor
    return ((x ^ (x >> 31)) + draw.epoch) % 2 == 1


def auto_augment(images: Tensor, generator: Generator | Draw, policy: str) -> Tensor:
    """`trivial`: one drawn operation a picture, of drawn strength (Müller and Hutter 2021, TrivialAugment, wide);
    `rand`: two of them, of strength 9 of 30 (Cubuk et al. 2020, RandAugment). Operations and ranges are torchvision's.

    They are defined on 8 bits, so floating pictures in [0, 1] are rounded to them and come back floating.
    """
    if policy not in AUTOS:
        raise ClearwingError("auto", policy, f"choose one of {', '.join(AUTOS)}")
    from clearwing.data import auto  # here, because torchvision takes its time to import

    N, _, H, W = images.shape
    pixels = (images * 255).round_().clamp_(0, 255).to(torch.uint8) if images.is_floating_point() else images
    reach = torch.tensor(auto.reaches(policy, H, W), device=images.device)
    for _ in range(1 if policy == "trivial" else 2):
        operation = _whole(N, len(auto.OPERATIONS), generator, images)
        strength = _whole(N, 31, generator, images) / 30 if policy == "trivial" else 9 / 30
        sign = _whole(N, 2, generator, images) * 2 - 1
        # the list waits for the device once a batch; without it each picture would have to go through every operation
        pixels = auto.operate(pixels, operation.tolist(), reach[operation] * strength * sign)
    return unit(pixels).to(images.dtype) if images.is_floating_point() else pixels


def random_rotation(images: Tensor, generator: Generator | Draw, degrees: float) -> Tensor:
    """Turn each picture about its centre by up to `degrees` either way; corners are filled by reflection."""
    N, _, H, W = images.shape
    angle = _uniform(N, -math.radians(degrees), math.radians(degrees), generator, images)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # affine_grid counts both sides from -1 to 1, so the off-diagonal terms carry the aspect
    turn = torch.stack([cos, -sin * (H / W), zero, sin * (W / H), cos, zero], 1).view(N, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def cutout(images: Tensor, generator: Generator | Draw, side: int, fill: Sequence[float] | None = None) -> Tensor:
    """Cover a square of `side` pixels of each picture; its centre lies anywhere, so part of it may lie outside.

    DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout"; there the fill is
    0 after normalisation, which is the data set's mean: give it as `fill`, one value a channel in [0, 1]. None takes
    each picture's own mean.
    """
    N, C, H, W = images.shape
    if fill is not None and len(fill) not in (1, C):
        raise ClearwingError("fill", tuple(fill), f"give one value for each of {C} channels")
    rows = torch.arange(H, device=images.device) - _whole(N, H, generator, images)[:, None] + side // 2
    columns = torch.arange(W, device=images.device) - _whole(N, W, generator, images)[:, None] + side // 2
    covered = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]  # (N, H, W)
    if fill is None:
        colour = images.mean((2, 3), keepdim=True)
    else:
        colour = _kept(tuple(fill), images.device, images.dtype).view(1, -1, 1, 1)
    return torch.where(covered[:, None], colour, images)


def colour_jitter(
    images: Tensor,
    generator: Generator | Draw,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Tensor:
    """Change brightness, contrast and saturation by factors from [1 - v, 1 + v] and turn the hue by up to `hue` of a
    full circle, each picture on its own; clamped to [0, 1] at the end.

    All four are affine in the colour, so they are one 3x3 matrix and one offset a picture. The hue turns in the chroma
    plane of YIQ, which keeps the luma (torchvision turns it in HSV). Grey pictures take brightness and contrast alone.
    """
    N, C, H, W = images.shape

    def factor(width: float) -> Tensor:  # (N, 1, 1)
        if not width:
            return images.new_ones(1, 1, 1)
        return _uniform(N, max(0.0, 1 - width), 1 + width, generator, images)[:, None, None]

    bright, contrasted = factor(brightness), factor(contrast)
    pixels = images.reshape(N, C, H * W)
    if C == 3:
        weights = _kept(LUMA, images.device, images.dtype)
        luma = torch.einsum("nc,c->n", pixels.mean(2), weights)[:, None, None]
        grey = weights.expand(3, 3)  # every row gives the luma
        keep = factor(saturation)
        colour = keep * torch.eye(3, device=images.device, dtype=images.dtype) + (1 - keep) * grey
        if hue:
            colour = colour @ _hue_turn(_uniform(N, -hue, hue, generator, images), images)
        changed = torch.matmul(bright * contrasted * colour, pixels)
    else:
        luma = pixels.mean((1, 2))[:, None, None]
        changed = bright * contrasted * pixels
    # saturation and hue keep the luma, so the grey that contrast pulls towards is the original's, brightened
    return (changed + (1 - contrasted) * bright * luma).clamp_(0, 1).view(N, C, H, W)


def _hue_turn(share: Tensor, like: Tensor) -> Tensor:  # (N,) of a full circle -> (N, 3, 3)
    yiq = like.new_tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    angle = share * (2 * math.pi)
    turn = torch.zeros(len(share), 3, 3, device=like.device, dtype=like.dtype)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    return torch.linalg.inv(yiq) @ turn @ yiq


@dataclass(frozen=True)
class Augment:
    """The settings of a training augmentation, called as `augment(images (N, C, H, W), generator or draw)`.

    Pictures in uint8 or in [0, 1] come out in [0, 1]. Order: resized crop or shifted crop, mirror, operations of
    `auto`, rotation, colour, cutout. What is left at its default is not run.
    `dataclasses.asdict` gives what JSON can hold; `Augment(**those)` builds it again.

    Example: `Augment(crop_padding=4, flip=0.5, cutout=16, fill=mean)` is the classic CIFAR recipe.
    """

    resized_crop: tuple[float, float] | None = None
    """Lowest and highest share of the area that a random resized crop takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Lowest and highest aspect (width / height) of that crop."""
    size: int | None = None
    """Side after the resized crop; None keeps the size of the cached pictures."""
    crop_padding: int = 0
    """Shift by up to so many pixels (a random crop of the padded picture)."""
    padding_mode: str = "reflect"
    """What comes in at the border: reflect or zero."""
    flip: float = 0.0
    """Probability of mirroring left to right."""
    alternate_flip: bool = False
    """Instead of `flip`: mirror a fixed half of the pictures in even epochs and the others in odd ones."""
    vertical_flip: float = 0.0
    """Probability of mirroring top to bottom."""
    auto: str | None = None
    """Drawn operations: trivial (TrivialAugment) or rand (RandAugment)."""
    rotation: float = 0.0
    """Turn by up to so many degrees either way."""
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Up to this share of a full circle, at most 0.5."""
    cutout: int = 0
    """Side of the square that is covered."""
    fill: tuple[float, ...] | None = None
    """Colour of the square, the mean of the data set; None takes each picture's own mean."""

    @staticmethod
    def none() -> Augment:
        """No augmentation."""
        return Augment()

    def __call__(self, images: Tensor, generator: Generator | Draw) -> Tensor:
        # In uint8, a quarter of the memory, as far as that goes: shifting and mirroring change no value.
        flip = alternating(generator) if self.alternate_flip else self.flip
        if self.resized_crop is not None:
            size = images.shape[2:] if self.size is None else (self.size, self.size)
            images = random_resized_crop(images, generator, size, self.resized_crop, self.ratio, flip)
        elif self.size is not None and tuple(images.shape[2:]) != (self.size, self.size):
            # without a resized crop the whole picture is brought to the network's size
            whole = torch.tensor([0.0, 0.0, *images.shape[2:]], device=images.device).expand(len(images), 4)
            images = resample(images, whole, self.size)
        if self.crop_padding:
            images = random_crop(images, generator, self.crop_padding, self.padding_mode)
        if self.resized_crop is None and (self.alternate_flip or self.flip):
            images = random_flip(images, generator, flip)
        if self.vertical_flip:
            images = random_flip(images, generator, self.vertical_flip, vertical=True)
        if self.auto is not None:
            images = auto_augment(images, generator, self.auto)
        images = unit(images)
        if self.rotation:
            images = random_rotation(images, generator, self.rotation)
        if self.brightness or self.contrast or self.saturation or self.hue:
            images = colour_jitter(images, generator, self.brightness, self.contrast, self.saturation, self.hue)
        if self.cutout:
            images = cutout(images, generator, self.cutout, self.fill)
        return images
