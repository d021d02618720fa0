"""Maps and pictures in, masks out, a batch at a time: the `segment` door, and the recipes by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clearwing.masks.refine import blur, check_images, clean, dilate, grabcut, seeds
from clearwing.masks.threshold import binarize, informative
from clearwing.types import Batch, ClearwingError, Explanation, near

REFINERS = ("grabcut", "none")

Maps = Explanation | Tensor
"""An Explanation, or maps (N, H, W) from anywhere."""


@dataclass(frozen=True)
class Recipe:
    """All that turns a network and a picture into a mask; `RECIPES` holds every number that is a default.

    The first four fields say which maps to ask for, and who runs the network reads them; the others are what
    `segment_with` does, in their order.
    """

    method: str  # of the maps, a name of METHODS
    target: str = "pred"
    layers: int = 0  # the so many deepest stages that differ in resolution, shallow to deep; 0: a method at the input
    weights: tuple[float, ...] = (1.0,)  # of the layers' maps in their sum, each divided by its own maximum
    blur: float = 0.0  # standard deviation of a Gaussian, as a share of the shorter side
    threshold: str | float = "percentile:80"  # see `binarize`
    pool: int = 1  # side of the max-pool over the thresholded map, odd; 1: none
    refine: str = "none"  # or "grabcut", which starts from the thresholded map and the next two
    sure_foreground: float = 1.0  # above this quantile of the map the foreground is fixed
    sure_background: float = 0.0  # below this one the background is
    iterations: int = 5
    keep: float = 0.0  # drop pieces that hold less than this share of the best supported piece's map mass; see `clean`
    fill: bool = False  # fill the holes
    detail: int = 1  # side of the pictures that are refined, in sides of the network's input


RECIPES: dict[str, Recipe] = {
    # Chosen on the drawn data set's training masks; its colour models and edges gain most from the finer pictures.
    "default": Recipe(
        method="layer-cam",
        layers=2,
        weights=(1.0, 0.3),
        blur=0.04,
        threshold="otsu",
        refine="grabcut",
        sure_foreground=0.95,
        sure_background=0.4,
        iterations=3,
        keep=0.2,
        fill=True,
        detail=2,
    ),
    # the absolute gradient of the predicted class, the largest channel
    "classic": Recipe(method="saliency", threshold="percentile:80", pool=5),
}


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
            each is divided by its own maximum; two are summed with the default recipe's weights, more with equal ones.
        images: the pictures explained, (N, C, H, W) in [0, 1], or their Batch; finer ones make finer masks.
        threshold: "auto" (the default recipe's), or what `binarize` takes: "percentile:80", "otsu", "mean", ...
        refine: "grabcut", or None for the thresholded map itself.
        class_index: which of the M asked classes of an Explanation.

    A map without evidence gives an empty mask. `segment_with` also tells where GrabCut fell back.

    Raises ClearwingError for unknown names, sizes that do not agree, and pictures outside [0, 1].

    >>> masks = segment(explain(model, images, methods="layer-cam", layers="layer2"), images)
    """
    recipe = RECIPES["default"]
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
    if pictures.ndim == 4 and pictures.shape[2] > maps.shape[1] and pictures.shape[3] > maps.shape[2]:
        maps = F.interpolate(maps[:, None], pictures.shape[2:], mode="bilinear")[:, 0]
    check_images(pictures, maps.shape)

    empty = ~informative(maps)
    maps = blur(torch.where(empty[:, None, None], 0, maps), recipe.blur * min(maps.shape[1:]))
    masks = dilate(binarize(maps, recipe.threshold), recipe.pool)
    fell_back = torch.zeros_like(empty)
    if recipe.refine == "grabcut":
        sure = {"sure_foreground": recipe.sure_foreground, "sure_background": recipe.sure_background}
        masks, fell_back = grabcut(pictures, seeds(maps, masks, **sure), iterations=recipe.iterations)
    if recipe.keep > 0 or recipe.fill:
        masks = clean(masks, maps, share=recipe.keep, fill=recipe.fill)
    how = {**asdict(recipe), "maps": [_name(item) for item in given]}
    return Segmentation(masks.byte(), fell_back, empty, how)


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
