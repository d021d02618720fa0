"""Choosing how masks are made on some drawn masks: a mode of its own, whose pictures are not scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clearwing.attribution.methods import METHODS, explain
from clearwing.config import SegmentConfig
from clearwing.data.loader import load_pictures
from clearwing.data.preprocess import read_mask, restore
from clearwing.data.sources import Sample
from clearwing.jobs import inputs
from clearwing.jobs.maskers import DecoderMasker, stages
from clearwing.jobs.progress import Progress
from clearwing.masks.pipeline import Recipe, segment_with
from clearwing.measure.curves import threshold_curve
from clearwing.measure.overlap import iou
from clearwing.train.devices import make_fabric
from clearwing.types import ClearwingError


def held_out(config: SegmentConfig, samples: Sequence[Sample]) -> set[str]:
    """The keys of the pictures whose masks calibrate: `--calibrate` of those with a mask, drawn by the seed."""
    if not config.calibrate:
        return set()
    known = [sample.key for sample in samples if sample.mask is not None]
    if not 1 <= config.calibrate < len(known):
        mend = f"give 1 to {len(known) - 1}: of the {len(known)} pictures with a mask, some must be left to score"
        raise ClearwingError("--calibrate", config.calibrate, mend if len(known) > 1 else "there are no masks to use")
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(config.seed))[: config.calibrate]
    return {known[i] for i in drawn.tolist()}


def calibrated(
    config: SegmentConfig,
    recipe: Recipe,
    layers: Sequence[str],
    loaded: inputs.Loaded,
    samples: Sequence[Sample],
    device: torch.device,
    progress: Progress,
) -> tuple[Recipe, list[str], float, dict[str, Any]]:
    """The recipe and its layers (or the decoder's threshold) with the best mean IoU on the masks that are held out for
    it, and what was tried."""
    keys = held_out(config, samples)
    chosen = [sample for sample in samples if sample.key in keys]
    common: dict[str, Any] = {"fit": loaded.fit, "channels": loaded.channels}
    pictures = load_pictures(chosen, loaded.size, **common)
    fine = load_pictures(pictures.samples, recipe.side(loaded.size), **common)
    truths = [read_mask(sample.mask) for sample in pictures.samples]  # type: ignore[arg-type]
    batch, finer = (next(p.batches(len(pictures), device=device)) for p in (pictures, fine))
    about: dict[str, Any] = {"masks": len(pictures)}
    if config.pipeline == "decoder" and loaded.run is not None:
        masker = DecoderMasker(loaded.run.load_segmenter().to(device), make_fabric(config.device).autocast)
        shares, _ = masker.shares(batch)  # before small pieces and holes are mended, which goes by the threshold
        curve = threshold_curve(restore(shares.cpu(), batch.geometry), truths, bins=100)
        best, cut = curve.peak
        return recipe, list(layers), cut, about | {"mean_iou": best, "tried": 100}
    tried: list[tuple[float, Recipe, list[str]]] = []
    told, options = progress.task("calibrating"), list(candidates(recipe))
    found: dict[tuple[str, int], Any] = {}
    for number, one in enumerate(options):
        if METHODS[one.method].needs_layer:
            at = list(layers) if config.layers else stages(loaded.model, batch.images, one.layers)
            weights = recipe.weights if config.layers else one.weights[-len(at) :]
            one = replace(one, layers=len(at), weights=weights)
        else:
            at = []
        if (one.method, len(at)) not in found:
            maps = explain(loaded.model, batch, [one.method], at or None, target=one.target, average=one.average)
            found[one.method, len(at)] = maps
        masks = segment_with(one, found[one.method, len(at)], finer).masks
        tried.append((mean_iou(masks, finer.geometry, truths), one, at))
        told(number + 1, len(options))
    value, best_recipe, at = max(tried, key=lambda item: item[0])
    return best_recipe, at, 0.5, about | {"mean_iou": value, "tried": len(tried)}


def candidates(recipe: Recipe) -> Iterator[Recipe]:
    """The neighbours of a recipe that calibration tries, itself first."""
    yield recipe
    if recipe.refine != "grabcut":
        for q in range(50, 100, 5):
            yield replace(recipe, threshold=f"percentile:{q}")
        return
    for method in ("layer-cam", "hires-cam", "grad-cam"):
        for count, weights in ((2, (1.0, 0.3)), (3, (1.0, 1.0, 0.5))):
            for blur in (0.02, 0.04):
                for threshold in ("otsu", "percentile:75", "percentile:85"):
                    yield replace(recipe, method=method, layers=count, weights=weights, blur=blur, threshold=threshold)


def mean_iou(masks: Tensor, geometry: Any, truths: Sequence[Tensor]) -> float:
    return float(iou(restore(masks.cpu(), geometry), list(truths)).mean())
