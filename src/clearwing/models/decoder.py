"""Decoder: a classifier's own features to mask logits; and Segmenter, both in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clearwing.types import ClearwingError

CONTEXT = 2
"""Levels that the decoder adds below the classifier's coarsest, each of half the size: what a small network's last
stage sees of a picture is often less than the object."""


class Decoder(nn.Module):
    """Features of several sizes, fine to coarse, to one mask logit a place of the finest: (N, h, w).

    A feature pyramid (Lin et al. 2017, section 3): every level is brought to `width` channels by a 1x1 convolution;
    from the coarsest on, the sum so far is upsampled and added to the next finer level. As in U-Net, a 3x3
    convolution follows each sum. Below the coarsest, `CONTEXT` levels of stride-2 convolutions see the whole picture.

    channels: of the features, fine to coarse.
    width: channels inside.

    >>> decoder = Decoder((32, 64, 128))
    >>> decoder([torch.zeros(5, 32, 64, 64), torch.zeros(5, 64, 32, 32), torch.zeros(5, 128, 16, 16)]).shape
    torch.Size([5, 64, 64])

    Raises ClearwingError for settings out of range.
    """

    def __init__(self, channels: Sequence[int], width: int = 32) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ClearwingError("channels", tuple(channels), "give the channels of at least one layer")
        if width < 1:
            raise ClearwingError("width", width, "give a number of at least 1")
        self.channels, self.width = tuple(channels), width
        self.laterals = nn.ModuleList(_unit(count, width, 1) for count in channels)
        self.below = nn.ModuleList(_unit(width, width, 3, stride=2) for _ in range(CONTEXT))
        self.merges = nn.ModuleList(_unit(width, width, 3) for _ in range(len(channels) + CONTEXT - 1))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        levels = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for below in self.below:
            levels.append(below(levels[-1]))
        x = levels.pop()
        for merge in self.merges:
            finer = levels.pop()
            x = merge(finer + F.interpolate(x, finer.shape[2:], mode="bilinear", align_corners=False))
        return self.head(x)[:, 0]


class Segmenter(nn.Module):
    """A classifier and a decoder on its features: one pass gives logits (N, K) and mask logits (N, H, W).

    layers: the modules of the classifier whose outputs (N, C, h, w) the decoder takes, fine to coarse.
    The mask is where the second is above 0; it has the size of the pictures. The classifier is not trained:
    it stays in evaluation mode, its parameters take no gradient, and it says what it would say alone.

    >>> segmenter = Segmenter(model, Decoder((32, 64, 128)), ["layer1", "layer2", "layer3"])
    >>> logits, masks = segmenter(images)

    Raises ClearwingError for a layer that the classifier does not have.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, layers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.decoder, self.layers = model, decoder, tuple(layers)
        inner = dict(model.named_modules())
        names = [name if name in inner else f"backbone.{name}" for name in self.layers]
        for layer, name in zip(self.layers, names, strict=True):
            if name not in inner:
                raise ClearwingError("layers", layer, "the classifier has no such module")
        if len(self.layers) != len(decoder.channels):
            raise ClearwingError("layers", self.layers, f"the decoder takes {len(decoder.channels)}")
        self._modules_of_layers = [inner[name] for name in names]
        self.model.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with _outputs_of(self._modules_of_layers) as features:
            logits = self.model(images)
        masks = self.decoder([features[module] for module in self._modules_of_layers])
        if masks.shape[1:] != images.shape[2:]:
            masks = F.interpolate(masks[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        return logits, masks


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What the modules return inside the block. A copy is passed on: an in-place ReLU behind would overwrite it."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        found[module] = output
        return output.clone()

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _unit(channels: int, width: int, side: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, side, stride, side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
