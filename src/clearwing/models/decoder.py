"""Decoder: a classifier's own features to mask logits; and Segmenter, both in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clearwing.models.evidence import with_evidence
from clearwing.models.guided import guided_filter
from clearwing.types import ClearwingError

WIDEST = 8
"""The most channels of a level of the decoder, as a multiple of those of its finest."""


class Decoder(nn.Module):
    """Features of several sizes, fine to coarse, to one mask logit a place of the finest: (N, h, w).

    The second half of a U-Net (Ronneberger et al. 2015) on a classifier's features, joined by sums as in a feature
    pyramid (Lin et al. 2017, section 3): every level is brought to its width by a 1x1 convolution; from the coarsest
    on, the sum so far is narrowed, upsampled and added to the next finer level, and a 3x3 convolution follows. A
    level has twice the width of the next finer one, up to `WIDEST` times `width`: where a picture is small, channels
    cost little. Below the coarsest features, `context` levels of stride-2 convolutions see the whole picture: what a
    small network's last stage sees of it is often less than the object.

    channels: of the features, fine to coarse.
    width: channels inside, of the finest level.
    context: levels that the decoder adds below the coarsest features, each of half the size.

    >>> decoder = Decoder((32, 64, 128))
    >>> decoder([torch.zeros(5, 32, 64, 64), torch.zeros(5, 64, 32, 32), torch.zeros(5, 128, 16, 16)]).shape
    torch.Size([5, 64, 64])

    Raises ClearwingError for settings out of range.
    """

    def __init__(self, channels: Sequence[int], width: int = 16, context: int = 2) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ClearwingError("channels", tuple(channels), "give the channels of at least one layer")
        if width < 1:
            raise ClearwingError("width", width, "give a number of at least 1")
        if context < 0:
            raise ClearwingError("context", context, "give a number of levels, 0 for none")
        self.channels, self.width, self.context = tuple(channels), width, context
        widths = [width * min(2**level, WIDEST) for level in range(len(channels) + context)]
        self.laterals = nn.ModuleList(_unit(count, own, 1) for count, own in zip(channels, widths, strict=False))
        steps = list(pairwise(widths))  # (finer, coarser), fine to coarse
        self.below = nn.ModuleList(_unit(*step, 3, stride=2) for step in steps[len(channels) - 1 :])
        self.narrow = nn.ModuleList(nn.Conv2d(coarser, finer, 1, bias=False) for finer, coarser in steps)
        self.merges = nn.ModuleList(_unit(finer, finer, 3) for finer, _ in steps)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:
        """Mask logits (N, h, w) of the finest features, or (N, *size) in another size."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for below in self.below:
            levels.append(below(levels[-1]))
        x = levels.pop()
        for finer, narrow, merge in zip(reversed(levels), reversed(self.narrow), reversed(self.merges), strict=True):
            x = merge(finer + F.interpolate(narrow(x), finer.shape[2:], mode="bilinear", align_corners=False))
        logits = self.head(x)
        if size is not None and logits.shape[2:] != torch.Size(size):
            logits = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
        return logits[:, 0]


class Segmenter(nn.Module):
    """A classifier and a decoder on its features: one pass gives logits (N, K) and mask logits (N, H, W).

    layers: the modules of the classifier whose outputs (N, C, h, w) the decoder takes, fine to coarse.
    head: the linear module that takes the mean of the last layer to the logits, if there is one; with it, the decoder
        takes channels more, in which the features say where the predicted class is (`with_evidence`): two of the last
        layer, one of each other.
    The mask is where the second is not below 0; it has the size of the pictures, whose edges it follows: the decoder's
    probability goes through `guided_filter`. Where the same pictures are given in a finer size as well, (N, C, H', W'),
    it follows the edges of those and has their size. The classifier is not trained: it stays in evaluation mode, its
    parameters take no gradient, and it says what it would say alone.

    >>> segmenter = Segmenter(model, Decoder((33, 65, 130)), ["layer1", "layer2", "layer3"], head="fc")
    >>> logits, masks = segmenter(images)
    >>> logits, masks = segmenter(images, fine)

    Raises ClearwingError for a layer or head that the classifier does not have or the decoder does not fit, and for
    fine pictures that are others.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, layers: Sequence[str], head: str | None = None) -> None:
        super().__init__()
        self.model, self.decoder, self.layers, self.head = model, decoder, tuple(layers), head
        if len(self.layers) != len(decoder.channels):
            raise ClearwingError("layers", self.layers, f"the decoder takes {len(decoder.channels)}")
        self._modules_of_layers = [model.get_submodule(_inside(model, name, "layers")) for name in self.layers]
        self._name_of_head = None if head is None else _inside(model, head, "head")
        if head is not None and self._weight().shape[1] != decoder.channels[-1] - 2:
            taken = f"the decoder takes the mean of {decoder.channels[-1] - 2} channels from it, and two maps"
            raise ClearwingError("head", f"{head}, of {self._weight().shape[1]} channels", taken)
        self.model.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        self.model.eval()
        return self

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The classifier's logits (N, K), and what the decoder takes, fine to coarse."""
        with _outputs_of(self._modules_of_layers) as found:
            logits = self.model(images)
        features = [found[module] for module in self._modules_of_layers]
        if self.head is not None:
            features = with_evidence(features, self._weight()[logits.argmax(1)])
        return logits, features

    def _weight(self) -> Tensor:
        """Of the classifier's head, (K, C), as it is now; of one logit z that was made two, of (-z/2, z/2)."""
        module = self.model.get_submodule(str(self._name_of_head))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2 or weight[0].numel() != weight.shape[1]:
            raise ClearwingError("head", self.head, "give a linear module, or a 1x1 convolution")
        weight = weight.flatten(1)
        return torch.cat((-weight, weight)) / 2 if len(weight) == 1 else weight

    def forward(self, images: Tensor, fine: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if fine is not None and fine.shape[:2] != images.shape[:2]:
            raise ClearwingError("fine", tuple(fine.shape), f"give the same pictures as {tuple(images.shape)}, larger")
        logits, features = self.features(images)
        probability = self.decoder(features, images.shape[2:]).sigmoid()
        return logits, guided_filter(probability, images, fine=fine).logit(eps=1e-4)


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


def _inside(model: nn.Module, name: str, argument: str) -> str:
    """The full name of the module of this name, or of this name in the backbone."""
    inner = dict(model.named_modules())
    for known in (name, f"backbone.{name}"):
        if known in inner:
            return known
    raise ClearwingError(argument, name, "the classifier has no such module")


def _unit(channels: int, width: int, side: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, side, stride, side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
