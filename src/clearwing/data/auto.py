"""The operations of TrivialAugment and RandAugment on whole batches, each picture with its own magnitude.

They do what those of torchvision.transforms.v2 do, which take one magnitude a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


def _warped(images: Tensor, rows: Sequence[Sequence[Tensor | float]]) -> Tensor:
    """What shows at (x, y) pixels from the centre is taken from rows @ (x, y, 1), the nearest pixel; black outside."""
    n, _, H, W = images.shape
    theta = images.new_zeros(n, 2, 3, dtype=torch.float32)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            theta[:, i, j] = value
    # affine_grid counts both sides from -1 to 1
    across, down = theta.new_tensor([W, H, 2]), theta.new_tensor([[1 / W], [1 / H]])
    grid = F.affine_grid(theta * across * down, [n, 1, H, W], align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


def _sheared_x(images: Tensor, m: Tensor) -> Tensor:  # about the top left corner
    return _warped(images, [(1, m, m * (images.shape[2] / 2)), (0, 1, 0)])


def _sheared_y(images: Tensor, m: Tensor) -> Tensor:
    return _warped(images, [(1, 0, 0), (m, 1, m * (images.shape[3] / 2))])


def _shifted_x(images: Tensor, m: Tensor) -> Tensor:  # by whole pixels
    return _warped(images, [(1, 0, -m.trunc()), (0, 1, 0)])


def _shifted_y(images: Tensor, m: Tensor) -> Tensor:
    return _warped(images, [(1, 0, 0), (0, 1, -m.trunc())])


def _turned(images: Tensor, m: Tensor) -> Tensor:  # m in degrees
    cos, sin = m.deg2rad().cos(), m.deg2rad().sin()
    return _warped(images, [(cos, -sin, 0), (sin, cos, 0)])


def _enhanced(adjust: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """1 + m times the picture and -m times what is left of it at a factor of 0: black, its grey, its blur ..."""

    def enhance(images: Tensor, m: Tensor) -> Tensor:
        factor = (1 + m)[:, None, None, None]
        return (images * factor).add_(adjust(images, 0.0) * (1 - factor)).clamp_(0, 255).to(torch.uint8)

    return enhance


def _posterized(images: Tensor, m: Tensor) -> Tensor:  # the m lowest bits become 0
    kept = 256 - 2 ** m.abs().round()
    return images & kept.to(torch.uint8)[:, None, None, None]


def _solarized(images: Tensor, m: Tensor) -> Tensor:  # the m highest values are inverted
    threshold = (255 - m.abs()).ceil().to(torch.uint8)[:, None, None, None]
    return images ^ (images >= threshold).to(torch.uint8).mul_(255)  # v ^ 255 is 255 - v


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda images, m: images,
    _sheared_x,
    _sheared_y,
    _shifted_x,
    _shifted_y,
    _turned,
    _enhanced(TF.adjust_brightness),
    _enhanced(TF.adjust_saturation),
    _enhanced(TF.adjust_contrast),
    _enhanced(TF.adjust_sharpness),
    _posterized,
    _solarized,
    lambda images, m: TF.autocontrast(images.contiguous()),
    lambda images, m: TF.equalize(images),
)
"""Each as `operation(images (n, C, H, W) uint8, magnitude (n,), of either sign)`."""


def reaches(policy: str, height: int, width: int) -> list[float]:
    """The largest magnitude of each operation: shears, shifts in pixels, degrees, factors, bits, values."""
    if policy == "trivial":
        return [0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 255, 0, 0]
    share = 150 / 331  # of the side: AutoAugment's 150 pixels of its 331
    return [0, 0.3, 0.3, share * width, share * height, 30, 0.9, 0.9, 0.9, 0.9, 4, 255, 0, 0]


def operate(images: Tensor, operation: Sequence[int], magnitude: Tensor) -> Tensor:
    """Each picture (n, C, H, W) uint8 through its own operation (a place in OPERATIONS) with its magnitude (n,)."""
    pixels = images.permute(0, 2, 3, 1)  # whole pictures are picked from it fast where channels lie last
    done = pixels.clone()
    for one in sorted(set(operation) - {0}):
        at = torch.tensor([i for i, other in enumerate(operation) if other == one]).to(images.device, non_blocking=True)
        changed = OPERATIONS[one](pixels.index_select(0, at).permute(0, 3, 1, 2), magnitude[at])
        done.index_copy_(0, at, changed.permute(0, 2, 3, 1))
    return done.permute(0, 3, 1, 2)
