"""From a batch of pictures to masks: by a recipe on a network's maps, a decoder on its features, or no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import METHODS, explain
from clearwing.attribution.trace import record
from clearwing.data.preprocess import restore
from clearwing.masks import baselines
from clearwing.masks.pipeline import RECIPES, Recipe, Segmentation, cut_likely, fuse, segment_with
from clearwing.masks.refine import clean, dilate
from clearwing.masks.threshold import binarize, informative
from clearwing.models.decoder import Segmenter
from clearwing.types import Batch, ClearwingError, Explanation, near


@dataclass(frozen=True)
class Masked:
    """What a masker makes of a batch."""

    masks: Tensor  # (N, H, W): uint8 0 and 1, or floating, the foreground's probability
    fell_back: Tensor | None = None  # bool (N,)
    empty: Tensor | None = None  # bool (N,): no evidence
    logits: Tensor | None = None  # (N, K)
    maps: Tensor | None = None  # (N, h, w), what was thresholded


SURE = (0.95, 0.2)
"""Probabilities of a decoder that are sure foreground and sure background where its masks are cut. Chosen on drawn
pictures' masks (benchmarks/RESULTS.md)."""

Masker = Callable[[Batch, Batch], Masked]
"""Pictures as the network takes them, and as fine as they are refined, to masks at the size of either."""


@dataclass(frozen=True)
class Prepared:
    """How a call of `segment` makes masks."""

    masker: Masker
    rivals: dict[str, Masker]
    side: int  # of the pictures that are refined
    threshold: dict[str, Any]
    calibration: int = 0  # masks that were used to choose
    cut: float = 0.5  # of probabilities


@dataclass
class NetworkMasker:
    """Masks by a recipe from where a network looks."""

    model: nn.Module
    recipe: Recipe
    layers: list[str]
    how: dict[str, Any] = field(default_factory=dict)

    def __call__(self, batch: Batch, fine: Batch) -> Masked:
        found = explained(self.model, self.recipe, batch, self.layers)
        made: Segmentation = segment_with(self.recipe, found, fine)
        self.how = made.how
        logits = next(iter(found.values())).logits
        maps = fuse([one.maps[:, 0] for one in found.values()], self.recipe.weights)
        return Masked(made.masks, made.fell_back, made.empty, logits, maps)


@dataclass
class DecoderMasker:
    """Masks by a decoder, in one forward pass; and, if they are to be refined, cut along the pictures' edges."""

    segmenter: Segmenter
    autocast: Callable[[], Any]
    cut: float = 0.5  # the probability from which on a place is foreground
    refine: bool = False

    @torch.inference_mode()
    def shares(self, batch: Batch, fine: Batch) -> tuple[Tensor, Tensor]:
        """The foreground's probability (N, H, W), of the size of the fine pictures, and the logits (N, K)."""
        with self.autocast():
            logits, masks = self.segmenter(batch.images, fine.images)
        return masks.float().sigmoid(), logits.float()

    def __call__(self, batch: Batch, fine: Batch) -> Masked:
        shares, logits = self.shares(batch, fine)
        empty = ~informative(shares)
        if self.refine:
            masks, fell_back = cut_likely(shares, fine.images, SURE)
            return Masked(masks.float(), fell_back, empty, logits, shares)  # floating: smooth outlines when restored
        found = shares >= self.cut
        whole = clean(found, shares, share=RECIPES["refine"].keep, fill=True)  # no small pieces, no holes
        made = torch.where(found == whole, shares, whole.float())
        return Masked(made, empty=empty, logits=logits, maps=shares)


def whole(made: Masked, batch: Batch, fine: Batch, cut: float = 0.5) -> list[Tensor]:
    """Masks in the pictures' own pixels, uint8 (height, width); probabilities are cut there, so that outlines are
    smooth."""
    masks = made.masks if made.masks.is_floating_point() else made.masks.byte()
    full = restored(masks, batch, fine)
    return [(one >= cut).byte() if one.is_floating_point() else one for one in full]


def restored(values: Tensor, batch: Batch, fine: Batch) -> list[Tensor]:
    """Values (N, h, w) at the size of either batch, in the pictures' own pixels, on the CPU."""
    like = fine if values.shape[1:] == fine.images.shape[2:] else batch
    return restore(values.cpu(), like.geometry)


def explained(
    model: nn.Module, recipe: Recipe, images: Tensor | Batch, layers: Sequence[str]
) -> dict[str, Explanation]:
    """The maps that a recipe asks for, shallow to deep."""
    options: dict[str, Any] = {"target": recipe.target, "average": recipe.average}
    return explain(model, images, [recipe.method], layers=list(layers) or None, **options)


def stages(model: nn.Module, images: Tensor, most: int) -> list[str]:
    """The last layers at the `most` smallest resolutions above one pixel, shallow to deep; fewer where there are not
    so many."""
    found: list[str] = []
    larger_than: int | None = None
    for _ in range(most):
        try:
            layer = find_layer(model, images[:1], larger_than=larger_than)
        except ClearwingError:
            if not found:
                raise
            break
        found.insert(0, layer)
        larger_than = max(record(model, images[:1], [layer], inputs=False).features[layer].shape[2:])
    return found


def fitted(recipe: Recipe, model: nn.Module, images: Tensor) -> tuple[Recipe, list[str]]:
    """A recipe and the layers it works at in this network, with as many weights as there are layers."""
    if not METHODS[recipe.method].needs_layer:
        return recipe, []
    layers = stages(model, images, recipe.layers)
    return replace(recipe, layers=len(layers), weights=recipe.weights[-len(layers) :]), layers


def free_masks(model: nn.Module, images: Tensor | Batch, pipeline: str = "refine") -> Tensor:
    """Foreground masks of pictures from a classifier alone: uint8 (N, H, W), 0 and 1, at the size of the images.

    model: any network in evaluation mode that maps (N, C, H, W) in [0, 1] to logits (N, K), or a `Segmenter`.
    images: (N, C, H, W) in [0, 1] at the network's size, or their Batch.
    pipeline: a name of RECIPES; a Segmenter has its own.

    `segment` works on maps of your own, `segment_with` tells more, `clearwing segment` does whole folders.

    >>> masks = free_masks(model, images)

    Raises ClearwingError for what `explain` and `segment_with` refuse, and for an unknown pipeline.
    """
    pictures = images.images if isinstance(images, Batch) else images
    if isinstance(model, Segmenter):
        training, batch = model.training, Batch(pictures)
        try:
            return (DecoderMasker(model.eval(), nullcontext)(batch, batch).masks >= 0.5).byte()
        finally:
            model.train(training)
    if pipeline not in RECIPES:
        raise ClearwingError("pipeline", pipeline, near(str(pipeline), list(RECIPES)))
    recipe, layers = fitted(RECIPES[pipeline], model, pictures)
    return segment_with(recipe, explained(model, recipe, images, layers), pictures).masks


def rivals(untrained: nn.Module | None, recipe: Recipe, layers: list[str]) -> dict[str, Masker]:
    """What the masks must beat, by name: two rules and a cut without a network, the same recipe on the untrained
    network and on an edge map."""

    def gaussian(batch: Batch, fine: Batch) -> Masked:
        bump = baselines.centre_gaussian(fine.images)
        return Masked(dilate(binarize(bump, "percentile:80"), 5), maps=bump)

    def edges(batch: Batch, fine: Batch) -> Masked:
        one = replace(recipe, weights=(1.0,))
        found = baselines.edge_map(batch.images)
        return Masked(segment_with(one, found, fine).masks, maps=found)

    found: dict[str, Masker] = {
        "everything": lambda batch, fine: Masked(baselines.everything(fine.images)),
        "centre-gaussian": gaussian,
        "centre-box-grabcut": lambda batch, fine: Masked(baselines.centre_box(fine.images)[0]),
        "edge-map": edges,
    }
    if untrained is not None:
        found["untrained-network"] = NetworkMasker(untrained, recipe, layers)
    return found
