"""Maps and pictures in, masks out, a batch at a time: the `segment` door, and the recipes by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clearwing.masks.refine import blur, check_images, clean, dilate, grabcut, likely_seeds, seeds
from clearwing.masks.threshold import binarize, informative
from clearwing.types import Batch, ClearwingError, Explanation, near

REFINERS = ("grabcut", "none")

Maps = Explanation | Tensor
"""An Explanation, or maps (N, H, W) from anywhere."""


@dataclass(frozen=True)
class Recipe:
    """All that turns a network and a picture into a mask; `RECIPES` holds every number that is a default.

    The first five fields say which maps to ask for, and who runs the network reads them; the others are what
    `segment_with` does, in their order.
    """

    method: str  # of the maps, a name of METHODS
    target: str = "pred"
    layers: int = 0  # the so many deepest stages that differ in resolution, shallow to deep; 0: a method at the input
    average: tuple[str | float, ...] = ()  # views that the raw maps are averaged over, see `explain`
    weights: tuple[float, ...] = (1.0,)  # of the layers' maps in their sum, each divided by its own maximum
    blur: float = 0.0  # standard deviation of a Gaussian, as a share of the shorter side
    threshold: str | float = "percentile:80"  # see `binarize`
    pool: int = 1  # side of the max-pool over the thresholded map, odd; 1: none
    refine: str = "none"  # or "grabcut", which starts from the thresholded map and the next two
    sure_foreground: float = 1.0  # above this quantile of the map the foreground is fixed
    sure_background: float = 0.0  # below this one the background is
    iterations: int = 1
    keep: float = 0.0  # drop pieces that hold less than this share of the best supported piece's map mass; see `clean`
    fill: bool = False  # fill the holes
    finest: int = 0  # pictures are refined at twice the side of the network's input, up to this one; 0: at its own

    def side(self, size: int) -> int:
        """The side of the pictures to refine for a network of this input size."""
        return max(size, min(2 * size, self.finest))


RECIPES: dict[str, Recipe] = {
    # The numbers were chosen on drawn pictures' masks, rounds and size by the time they take; benchmarks/RESULTS.md
    # tells what else was seen, benchmarks/masks.py shows the neighbours of each number.
    "refine": Recipe(
        method="layer-cam",
        layers=2,
        average=("flip",),
        weights=(1.0, 0.3),
        blur=0.04,
        threshold="otsu",
        refine="grabcut",
        sure_foreground=0.95,
        sure_background=0.4,
        iterations=1,
        keep=0.2,
        fill=True,
        finest=224,  # as large as a picture is refined in 60 ms on one core
    ),
    # the absolute gradient of the predicted class, the largest channel
    "classic": Recipe(method="saliency", threshold="percentile:80", pool=5),
}

_REFINE = RECIPES["refine"]
VOTERS: tuple[Recipe, ...] = (
    _REFINE,
    replace(_REFINE, layers=3, weights=(1.0, 1.0, 0.3), blur=0.02),
    replace(_REFINE, method="hires-cam"),
    replace(_REFINE, weights=(1.0, 1.0), threshold="percentile:80", sure_foreground=0.97),
)
"""What teaches the decoder: `refine` and neighbours that differ from it in layers, method and threshold, so that where
they agree is worth more. They were written down, not searched for."""


@dataclass(frozen=True)
class Segmentation:
    """Masks, and what became of each picture on the way."""

    masks: Tensor  # uint8 (N, H, W), 0 and 1
    fell_back: Tensor  # bool (N,): the refinement gave no usable mask, the thresholded map stands in
    empty: Tensor  # bool (N,): the map held no evidence (zero, constant, not finite), so the mask is empty
    how: dict[str, Any]  # the recipe's fields, and "maps": the method and layer of what was given

    def __len__(self) -> int:
        return int(self.masks.shape[0])


def segment(
    explanation: Maps | Sequence[Maps] | Mapping[str, Maps],
    images: Tensor | Batch,
    threshold: str | float = "auto",
    refine: str | None = "grabcut",
    *,
    class_index: int = 0,
) -> Tensor:
    """Masks of what the maps point at: uint8 (N, H, W), 0 background and 1 foreground.

    Args:
        explanation: one Explanation (or maps (N, H, W)), or several to be joined, from the shallow layer to the deep:
            each is divided by its own maximum; two are summed with the weights of the recipe `refine`, others with
            equal ones.
        images: the pictures explained, (N, C, H, W) in [0, 1], or their Batch; finer ones make finer masks.
        threshold: "auto" (Otsu's), or what `binarize` takes: "percentile:80", "otsu", "mean", ...
        refine: "grabcut", or None for the thresholded map itself.
        class_index: which of the M asked classes of an Explanation.

    A map without evidence gives an empty mask. `segment_with` also tells where GrabCut fell back.

    Raises ClearwingError for unknown names, sizes that do not agree, and pictures outside [0, 1].

    >>> masks = segment(explain(model, images, methods="layer-cam", layers="layer2"), images)
    """
    recipe = RECIPES["refine"]
    given = _listed(explanation)
    if len(given) != len(recipe.weights):
        recipe = replace(recipe, weights=(1.0,) * len(given))
    if threshold != "auto":
        recipe = replace(recipe, threshold=threshold)
    return segment_with(replace(recipe, refine=refine or "none"), given, images, class_index=class_index).masks


def segment_with(
    recipe: Recipe | str,
    explanation: Maps | Sequence[Maps] | Mapping[str, Maps],
    images: Tensor | Batch,
    *,
    class_index: int = 0,
) -> Segmentation:
    """What a recipe (or the name of one) makes of maps and their pictures; arguments and errors as in `segment`.

    The maps are the caller's: `recipe.method`, `recipe.target` and `recipe.layers` say which to ask for. There must be
    as many as `recipe.weights`.
    """
    if not isinstance(recipe, Recipe):
        if recipe not in RECIPES:
            raise ClearwingError("recipe", recipe, near(str(recipe), list(RECIPES)))
        recipe = RECIPES[recipe]
    if recipe.refine not in REFINERS:
        raise ClearwingError("refine", recipe.refine, near(str(recipe.refine), REFINERS))
    given = _listed(explanation)
    pictures = images.images if isinstance(images, Batch) else images
    maps = fuse([_maps(item, class_index) for item in given], recipe.weights)
    check_images(pictures)
    size, full = tuple(maps.shape[1:]), (pictures.shape[2], pictures.shape[3])
    if len(maps) != len(pictures) or (size != full and (size[0] > full[0] or size[1] > full[1])):
        mend = f"give as many as the maps, {tuple(maps.shape)}, at least as large"
        raise ClearwingError("images", tuple(pictures.shape), mend)
    empty = ~informative(maps)
    maps = torch.where(empty[:, None, None], 0, maps)
    maps = resized(maps, full)
    maps = blur(maps, recipe.blur * min(full))
    masks = dilate(binarize(maps, recipe.threshold), recipe.pool)
    fell_back = torch.zeros_like(empty)
    if recipe.refine == "grabcut":
        sure = {"sure_foreground": recipe.sure_foreground, "sure_background": recipe.sure_background}
        masks, fell_back = grabcut(pictures, seeds(maps, masks, **sure), iterations=recipe.iterations)
    if recipe.keep > 0 or recipe.fill:
        masks = clean(masks, maps, share=recipe.keep, fill=recipe.fill)
    how = {**asdict(recipe), "maps": [_name(item) for item in given]}
    return Segmentation(masks.byte(), fell_back, empty, how)


def cut_likely(probability: Tensor, images: Tensor, sure: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Masks bool (N, H, W) of the foreground's probability, (N, H, W) in [0, 1], cut along the edges of the pictures,
    (N, C, H, W), by GrabCut as `refine` does it: without small pieces and holes. And where it fell back, bool (N,).

    sure: the probabilities from which on the foreground, and up to which the background, is fixed.
    """
    refine, (foreground, background) = RECIPES["refine"], sure
    codes = likely_seeds(probability, sure_foreground=foreground, sure_background=background)
    masks, fell_back = grabcut(images, codes, iterations=refine.iterations)
    return clean(masks, probability, share=refine.keep, fill=refine.fill), fell_back


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) at another size, bilinear, antialiased where they shrink."""
    if tuple(maps.shape[1:]) == size:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", antialias=size[0] < maps.shape[1])[:, 0]


def vote(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Several masks (N, H, W) of the same pictures: the share of them that says foreground, float32 (N, H, W), and how
    well they agree, (N,): the mean over all pairs of their intersection over union, 1 where both are empty.
    """
    if len(masks) < 2 or len({mask.shape for mask in masks}) > 1:
        raise ClearwingError("masks", [tuple(mask.shape) for mask in masks], "give two or more of the same size")
    given = torch.stack([mask.bool() for mask in masks]).float()  # (V, N, H, W)
    flat = given.flatten(2).transpose(0, 1)  # (N, V, HW)
    both, area = flat @ flat.mT, flat.sum(2)
    union = area[:, :, None] + area[:, None] - both
    pairs = torch.where(union > 0, both / union.clamp(min=1), 1.0)
    first, second = torch.triu_indices(len(masks), len(masks), 1)
    return given.mean(0), pairs[:, first, second].mean(1)


def fuse(maps: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of maps (N, H, W), each divided by its own maximum, so that no layer's scale counts.

    A map that is nowhere positive adds nothing. One map alone is returned as it is.
    """
    if len(maps) != len(weights):
        raise ClearwingError("explanation", f"{len(maps)} maps", f"give {len(weights)}, one for each weight {weights}")
    if len({m.shape for m in maps}) > 1:
        raise ClearwingError("explanation", [tuple(m.shape) for m in maps], "give maps of the same pictures and size")
    if len(maps) == 1:
        return maps[0]
    total = torch.zeros_like(maps[0])
    for m, weight in zip(maps, weights, strict=True):
        top = m.amax((1, 2), keepdim=True)
        total += m * torch.where(top > 0, weight / top, 0)
    return total


def _listed(explanation: Maps | Sequence[Maps] | Mapping[str, Maps]) -> list[Maps]:
    if isinstance(explanation, Explanation | Tensor):
        return [explanation]
    items = list(explanation.values() if isinstance(explanation, Mapping) else explanation)
    if not items or not all(isinstance(item, Explanation | Tensor) for item in items):
        kinds = [type(item).__name__ for item in items]
        raise ClearwingError("explanation", kinds, "give one or more Explanations, or maps (N, H, W)")
    return items


def _maps(item: Maps, class_index: int) -> Tensor:
    """The maps (N, H, W) of one asked class."""
    if isinstance(item, Tensor):
        maps = item
    elif -item.maps.shape[1] <= class_index < item.maps.shape[1]:
        maps = item.maps[:, class_index]
    else:
        raise ClearwingError("class_index", class_index, f"the explanation holds {item.maps.shape[1]} classes")
    if maps.ndim != 3 or not maps.numel():
        raise ClearwingError("explanation", tuple(maps.shape), "give maps (N, H, W)")
    return maps.detach().float()


def _name(item: Maps) -> str:
    if isinstance(item, Tensor):
        return "maps"
    return item.method if item.layer is None else f"{item.method}@{item.layer}"
