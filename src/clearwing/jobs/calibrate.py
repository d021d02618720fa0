"""Choosing how masks are made on some drawn masks: a mode of its own, whose pictures are not scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.attribution.methods import METHODS
from clearwing.config import SegmentConfig
from clearwing.data.preprocess import restore
from clearwing.data.sources import Sample
from clearwing.jobs import inputs
from clearwing.jobs.maskers import DecoderMasker, explained, stages
from clearwing.jobs.progress import Progress
from clearwing.masks.pipeline import Recipe, segment_with
from clearwing.measure.curves import threshold_curve
from clearwing.measure.overlap import iou, surely_best
from clearwing.train.devices import make_fabric
from clearwing.types import Batch, ClearwingError

SURE = 0.05
"""The p-value up to which a way counts as better than the uncalibrated one; the best of many on few masks may be
chance alone."""


def held_out(config: SegmentConfig, samples: Sequence[Sample]) -> set[str]:
    """The keys of the pictures whose masks calibrate: `--calibrate` of those with a mask, drawn by the seed."""
    if not config.calibrate:
        return set()
    for name in ("method", "threshold"):
        if getattr(config, name) is not None:
            raise ClearwingError(f"--{name}", getattr(config, name), "--calibrate chooses it; leave one of them out")
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
    it, if it is surely better than the uncalibrated one (see `surely_best`), else that one; and what was tried.
    Pictures and masks that cannot be used are told and passed over."""
    keys = held_out(config, samples)
    drawn = tuple(sample for sample in samples if sample.key in keys)
    pictures, fine = inputs.load_with_fine(loaded, drawn, recipe.side(loaded.size), progress)
    unread = inputs.told_skipped(pictures, progress)
    found, unfit = inputs.read_truths(pictures, progress)
    usable = [i for i, truth in enumerate(found) if truth is not None]
    truths = [truth for truth in found if truth is not None]
    if not truths:
        mend = "none of the masks drawn for it fits its picture; mend them, or give a larger number"
        raise ClearwingError("--calibrate", config.calibrate, mend, exit_code=1)
    pictures, fine = pictures.subset(usable), fine.subset(usable)
    about: dict[str, Any] = {"masks": len(truths)}
    if unread or unfit:
        about["unusable"] = unread + unfit

    def blocks() -> Iterator[Batch]:
        return pictures.batches(config.batch_size, device=device)

    if config.pipeline == "decoder" and loaded.run is not None:
        masker = DecoderMasker(loaded.run.load_segmenter().to(device), make_fabric(config.device).autocast)
        pairs = zip(blocks(), fine.batches(config.batch_size, device=device), strict=True)
        cuts, scores = scored_cuts(masker, pairs, truths)
        ways = [(recipe, list(layers), cut) for cut in cuts]
    else:
        named, finer = list(layers) if config.layers else [], next(fine.batches(len(fine)))
        tried, scores = scored_recipes(loaded.model, recipe, named, blocks, finer, truths, progress)
        ways = [(one, at, 0.5) for one, at in tried]
    best, p = surely_best(scores, SURE)
    return *ways[best], about | told_choice(scores, best, p)


def scored_cuts(
    masker: DecoderMasker, pairs: Iterable[tuple[Batch, Batch]], truths: Sequence[Tensor]
) -> tuple[list[float], Tensor]:
    """Thresholds of a decoder's probability, 0.5 first, and the IoU of each picture at each of them, (M, N): before
    small pieces and holes are mended, which goes by the threshold."""
    shares = [share for pair in pairs for share in restore(masker.shares(*pair)[0].cpu(), pair[1].geometry)]
    curve = threshold_curve(shares, truths, bins=100)
    cuts = [0.5, *(cut for cut in curve.thresholds.tolist() if cut != 0.5)]
    return cuts, torch.stack([curve.at(cut) for cut in cuts])


def scored_recipes(
    model: nn.Module,
    recipe: Recipe,
    named: list[str],
    blocks: Callable[[], Iterator[Batch]],
    finer: Batch,
    truths: Sequence[Tensor],
    progress: Progress,
) -> tuple[list[tuple[Recipe, list[str]]], Tensor]:
    """The candidates with their layers (those that are named, if any), and the IoU of each picture with each of them,
    (M, N). Maps that several of them ask for are made once."""
    one_picture = next(blocks()).images[:1]
    tried: list[tuple[Recipe, list[str]]] = []
    scored: list[Tensor] = []
    told, options = progress.task("calibrating"), list(candidates(recipe))
    made: dict[tuple[str, int], list[Tensor]] = {}
    for number, one in enumerate(options):
        if METHODS[one.method].needs_layer:
            at = named or stages(model, one_picture, one.layers)
            weights = recipe.weights if named else one.weights[-len(at) :]
            one = replace(one, layers=len(at), weights=weights)
        else:
            at = []
        if (one.method, len(at)) not in made:
            shown = [explained(model, one, block, at) for block in blocks()]
            made[one.method, len(at)] = [torch.cat([x[name].maps[:, 0].cpu() for x in shown]) for name in shown[0]]
        masks = segment_with(one, made[one.method, len(at)], finer).masks
        tried.append((one, at))
        scored.append(iou(restore(masks.cpu(), finer.geometry), truths))
        told(number + 1, len(options))
    return tried, torch.stack(scored)


def told_choice(scores: Tensor, best: int, p: float) -> dict[str, Any]:
    """What is told of a choice, of ways (M, N) of which the first is the uncalibrated one."""
    means = scores.double().mean(1)
    return {
        "tried": len(scores),
        "mean_iou": float(means[best]),
        "mean_iou_uncalibrated": float(means[0]),
        "changed": best > 0,
        "p_value": p,
    }


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
