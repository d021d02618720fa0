"""How a call of `segment` makes masks: the recipe of its pipeline, with what the command replaces of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from clearwing.attribution.methods import METHODS
from clearwing.config import SegmentConfig
from clearwing.masks.pipeline import RECIPES, Recipe
from clearwing.masks.threshold import binarize
from clearwing.settings import comma_list
from clearwing.types import ClearwingError, near

OPTIONS = ("method", "layers", "threshold", "refine")
"""What a command may replace of its recipe."""


def chosen_recipe(config: SegmentConfig) -> Recipe:
    """The recipe of the pipeline with what the command replaces of it; the decoder's teachers follow `refine`."""
    if config.pipeline == "decoder":
        for name in ("method", "layers", "threshold"):
            if getattr(config, name) is not None:
                raise ClearwingError(f"--{name}", getattr(config, name), "the decoder has none; take --pipeline refine")
        if config.refine == "maxpool":
            raise ClearwingError("--refine", config.refine, "the decoder takes grabcut or none")
        if config.refine == "grabcut" and config.calibrate:
            mend = "--calibrate chooses the decoder's threshold, which GrabCut has none of; leave one of them out"
            raise ClearwingError("--refine", config.refine, mend)
        return RECIPES["refine"]
    recipe = RECIPES[config.pipeline]
    if config.method is not None:
        if config.method not in METHODS:
            raise ClearwingError("--method", config.method, near(config.method, list(METHODS)))
        if METHODS[config.method].needs_layer != METHODS[recipe.method].needs_layer:
            one_layer = 1 if METHODS[config.method].needs_layer else 0
            recipe = replace(recipe, layers=one_layer, weights=(1.0,))
        recipe = replace(recipe, method=config.method)
    if config.layers is not None:
        if not METHODS[recipe.method].needs_layer:
            raise ClearwingError("--layers", config.layers, f"{recipe.method} works at the input; leave them out")
        named = comma_list(config.layers)
        if len(named) != len(recipe.weights):
            recipe = replace(recipe, layers=len(named), weights=(1.0,) * len(named))
    if config.threshold is not None and config.threshold != "auto":
        try:  # a threshold that is not known raises before work starts
            binarize(torch.rand(1, 4, 4), config.threshold)
        except ClearwingError as error:
            raise ClearwingError("--threshold", config.threshold, error.mend) from error
        recipe = replace(recipe, threshold=config.threshold)
    if config.refine is not None:
        pool = 5 if config.refine == "maxpool" else 1
        recipe = replace(recipe, refine="grabcut" if config.refine == "grabcut" else "none", pool=pool)
    return recipe


def changed(config: SegmentConfig) -> bool:
    """Whether the command replaced anything of the named recipe."""
    if config.pipeline == "decoder":
        return config.refine == "grabcut"
    return chosen_recipe(config) != RECIPES[config.pipeline] or config.layers is not None


def threshold_value(recipe: Recipe) -> float | None:
    """The number in a threshold such as percentile:80, where it has one."""
    if not isinstance(recipe.threshold, str):
        return float(recipe.threshold)
    number = recipe.threshold.partition(":")[2]
    return float(number) if number else None
