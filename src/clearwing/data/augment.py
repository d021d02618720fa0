"""Augmentation of whole batches: every decision is drawn per picture, no loop runs over pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clearwing.data.preprocess import resample
from clearwing.types import ClearwingError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
PADDINGS = ("reflect", "zero")


def _uniform(count: int, low: float, high: float, generator: Generator, like: Tensor) -> Tensor:
    """(count,) draws from [low, high) on the generator's device, brought to that of the pictures."""
    draw = torch.rand(count, generator=generator, device=generator.device) * (high - low) + low
    return draw.to(like.device, like.dtype, non_blocking=True)


def _whole(count: int, below: int, generator: Generator, like: Tensor) -> Tensor:
    """(count,) whole numbers from 0 to below - 1."""
    draw = torch.randint(below, (count,), generator=generator, device=generator.device)
    return draw.to(like.device, non_blocking=True)


def random_crop(images: Tensor, generator: Generator, padding: int, mode: str = "reflect") -> Tensor:
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
    generator: Generator,
    size: int | Sequence[int],
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
) -> Tensor:
    """A box of random area (a share of the picture's) and aspect of each picture, resized to `size`, antialiased.

    Area and log aspect are uniform; a side longer than the picture is cut to it, where torchvision draws again. `flip`
    is the probability of mirroring, which costs nothing here.
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
    mirrored = _uniform(N, 0, 1, generator, images) < flip if flip else None
    return resample(images, torch.stack([top, left, height, width], 1), size, mirrored)


def random_flip(images: Tensor, generator: Generator, probability: float = 0.5, vertical: bool = False) -> Tensor:
    """Mirror each picture left to right (or top to bottom) with this probability."""
    mirrored = _uniform(len(images), 0, 1, generator, images) < probability
    return torch.where(mirrored[:, None, None, None], images.flip(2 if vertical else 3), images)


def random_rotation(images: Tensor, generator: Generator, degrees: float) -> Tensor:
    """Turn each picture about its centre by up to `degrees` either way; corners are filled by reflection."""
    N, _, H, W = images.shape
    angle = _uniform(N, -math.radians(degrees), math.radians(degrees), generator, images)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # affine_grid counts both sides from -1 to 1, so the off-diagonal terms carry the aspect
    turn = torch.stack([cos, -sin * (H / W), zero, sin * (W / H), cos, zero], 1).view(N, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def cutout(images: Tensor, generator: Generator, side: int, fill: Sequence[float] | None = None) -> Tensor:
    """Cover a square of `side` pixels of each picture; its centre lies anywhere, so part of it may lie outside.

    DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout"; there the fill is
    0 after normalisation, which is the data set's mean: give it as `fill`, one value a channel in [0, 1]. None takes
    the mean of the batch.
    """
    N, C, H, W = images.shape
    if fill is not None and len(fill) not in (1, C):
        raise ClearwingError("fill", tuple(fill), f"give one value for each of {C} channels")
    rows = torch.arange(H, device=images.device) - _whole(N, H, generator, images)[:, None] + side // 2
    columns = torch.arange(W, device=images.device) - _whole(N, W, generator, images)[:, None] + side // 2
    covered = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]  # (N, H, W)
    if fill is None:
        colour = images.mean((0, 2, 3), keepdim=True)
    else:
        colour = torch.tensor(fill, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
    return torch.where(covered[:, None], colour, images)


def colour_jitter(
    images: Tensor,
    generator: Generator,
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
        weights = images.new_tensor(LUMA)
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
    """The settings of a training augmentation, called as `augment(images (N, C, H, W), generator)`.

    Order: resized crop or shifted crop, mirror, rotation, colour, cutout. What is left at its default is not run.
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
    vertical_flip: float = 0.0
    """Probability of mirroring top to bottom."""
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
    """Colour of the square, the mean of the data set; None takes the mean of the batch."""

    @staticmethod
    def none() -> Augment:
        """No augmentation."""
        return Augment()

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        if self.resized_crop is not None:
            size = images.shape[2:] if self.size is None else (self.size, self.size)
            images = random_resized_crop(images, generator, size, self.resized_crop, self.ratio, self.flip)
        elif self.size is not None and tuple(images.shape[2:]) != (self.size, self.size):
            # without a resized crop the whole picture is brought to the network's size
            whole = images.new_tensor([0, 0, images.shape[2], images.shape[3]]).expand(len(images), 4)
            images = resample(images, whole, self.size)
        if self.crop_padding:
            images = random_crop(images, generator, self.crop_padding, self.padding_mode)
        if self.flip and self.resized_crop is None:
            images = random_flip(images, generator, self.flip)
        if self.vertical_flip:
            images = random_flip(images, generator, self.vertical_flip, vertical=True)
        if self.rotation:
            images = random_rotation(images, generator, self.rotation)
        if self.brightness or self.contrast or self.saturation or self.hue:
            images = colour_jitter(images, generator, self.brightness, self.contrast, self.saturation, self.hue)
        if self.cutout:
            images = cutout(images, generator, self.cutout, self.fill)
        return images
