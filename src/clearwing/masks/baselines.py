"""What any mask has to beat, made without a network: everything, a Gaussian on the centre, GrabCut from a centre box,
and the picture's edges in the place of a network's maps.

The last baseline, an untrained network, goes through the same pipeline as the trained one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clearwing.masks.refine import PROBABLE_FOREGROUND, SURE_BACKGROUND, grabcut
from clearwing.types import ClearwingError


def everything(images: Tensor) -> Tensor:
    """All foreground: (N, C, H, W) -> bool (N, H, W)."""
    return torch.ones(len(images), *images.shape[-2:], dtype=torch.bool, device=images.device)


def centre_gaussian(images: Tensor, sigma: float = 0.25) -> Tensor:
    """A Gaussian on the centre, its standard deviation `sigma` of each side: (N, C, H, W) -> float32 (N, H, W)."""
    height, width = images.shape[-2:]
    y = torch.linspace(-0.5, 0.5, height + 1, device=images.device)[:-1] + 0.5 / height  # centres of the pixels
    x = torch.linspace(-0.5, 0.5, width + 1, device=images.device)[:-1] + 0.5 / width
    bump = torch.exp(-(y[:, None] ** 2 + x**2) / (2 * sigma**2))
    return bump.expand(len(images), height, width)


def edge_map(images: Tensor) -> Tensor:
    """The magnitude of the Sobel gradient, the largest over the channels: (N, C, H, W) -> (N, H, W).

    What a method of explanation shows that draws edges whatever the network knows (Adebayo et al. 2018, section 6).
    """
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    padded = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(padded, torch.stack([across, across.T])[:, None])  # (N C, 2, H, W)
    return both.norm(dim=1).view(images.shape).amax(1)


def centre_box(images: Tensor, share: float = 0.7, *, iterations: int = 5) -> tuple[Tensor, Tensor]:
    """GrabCut from a box in the centre, `share` of each side, in pictures (N, C, H, W) in [0, 1].

    Returns what `refine.grabcut` does, masks bool (N, H, W) and fell_back bool (N,); the fallback is the box.
    """
    if not 0 < share < 1:
        raise ClearwingError("share", share, "give a share of the side between 0 and 1")
    height, width = images.shape[-2:]
    h, w = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - h) // 2, (width - w) // 2
    codes = torch.full((len(images), height, width), SURE_BACKGROUND, dtype=torch.uint8)
    codes[:, top : top + h, left : left + w] = PROBABLE_FOREGROUND
    masks, fell_back = grabcut(images, codes, iterations=iterations)
    return masks.to(images.device), fell_back.to(images.device)
