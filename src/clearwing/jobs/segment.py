"""The job `segment`: masks of a split in the pictures' own size, scored beside baselines where true masks are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import METHODS, explain
from clearwing.attribution.trace import record
from clearwing.config import SegmentConfig
from clearwing.data.loader import Pictures
from clearwing.data.preprocess import read_mask, restore
from clearwing.data.sources import ALL, Dataset, open_data
from clearwing.jobs import inputs
from clearwing.jobs.progress import Progress
from clearwing.masks import baselines
from clearwing.masks.pipeline import RECIPES, Recipe, Segmentation, segment_with
from clearwing.masks.refine import dilate
from clearwing.masks.threshold import binarize
from clearwing.measure.overlap import bootstrap_interval, iou
from clearwing.run import Run, free_folder, plain, write_json
from clearwing.settings import class_list, comma_list
from clearwing.show.draw import save_png
from clearwing.types import Batch, ClearwingError, near

Masker = Callable[[Batch, Batch], Tensor]
"""Pictures as the network takes them, and as fine as they are refined, to masks (N, H, W) at the finer size."""

OPTIONS = ("method", "layers", "threshold", "refine")
"""What a command may replace of its recipe."""


def segment(config: SegmentConfig) -> dict[str, Any]:
    """Segment a split; returns what the command prints."""
    recipe = chosen_recipe(config)
    loaded = inputs.open_model(config.run, size=config.size, fit=config.fit)
    dataset = open_samples(config, loaded.run)
    samples = inputs.split_of(dataset, config.split)
    if config.masks is not None and not any(sample.mask is not None for sample in samples):
        raise ClearwingError(
            "--masks", config.masks, f"holds no mask of the {len(samples)} pictures; mirror their folders"
        )
    device = inputs.pick_device(config.device)
    model = loaded.model.to(device)
    with Progress(config.json) as progress:
        pictures = inputs.load_for(loaded, samples, config.limit, progress)
        fine = pictures
        if recipe.detail > 1:
            # Refinement works on the colours and edges of the picture, so it is given more of them than the network.
            finer = replace(loaded, size=loaded.size * recipe.detail)
            fine = inputs.load_for(finer, samples, config.limit, progress)
        files = inputs.result_paths(pictures.keys, ".png")
        inputs.keep_sources(config.out, files.values(), inputs.split_of(dataset, ALL))
        out = free_folder(config.out, config.overwrite)
        skipped = inputs.told_skipped(pictures, progress)
        layers = comma_list(config.layers) or deepest_stages(model, pictures, recipe.layers, device)
        truths, unscored = read_truths(pictures, progress)
        segmenter = NetworkMasker(model, recipe, layers)
        rivals = {}
        if config.baselines and any(truth is not None for truth in truths):
            rivals = baseline_maskers(loaded.run, recipe, layers, device, config.seed)
        scores = run_maskers(pictures, fine, truths, segmenter, rivals, out, files, device, config.batch_size, progress)
    threshold = {"how": recipe.threshold, "value": threshold_value(recipe), "layers": layers, "recipe": segmenter.how}
    counts = {"fell_back": segmenter.fell_back, "no_evidence": segmenter.empty}
    result = summarise(scores, config.seed) | {
        "data": inputs.full_name(config.data),
        "split": inputs.split_name(dataset, config.split),
        "recipe": config.recipe + (" (changed)" if changed(config, recipe) else ""),
        "options": {name: getattr(config, name) for name in OPTIONS if getattr(config, name) is not None},
        "n": len(pictures),
        "files": {key: str(path) for key, path in files.items()},
        "threshold": threshold,
        "masks_used_for_calibration": False,
        "unscored": unscored,
        "skipped": len(skipped),
        "skipped_pictures": skipped,
        "notes": list(dataset.notes),
        **counts,
    }
    if loaded.run is not None:
        result["weights_sha256"] = inputs.weights_hash(loaded.run)
        result["notes"] += inputs.split_notes(dataset, config.split, loaded.run, config.data)
    write_json(out / "segmentation.json", result)
    return {"json": plain(result), "text": told(result, out)}


def chosen_recipe(config: SegmentConfig) -> Recipe:
    """The named recipe with what the command replaces of it."""
    recipe = RECIPES[config.recipe]
    if config.method is not None:
        if config.method not in METHODS:
            raise ClearwingError("--method", config.method, near(config.method, list(METHODS)))
        one_layer = 1 if METHODS[config.method].needs_layer else 0
        recipe = replace(recipe, method=config.method, layers=one_layer, weights=(1.0,))
    if config.layers is not None:
        if not METHODS[recipe.method].needs_layer:
            raise ClearwingError("--layers", config.layers, f"{recipe.method} works at the input; leave them out")
        named = comma_list(config.layers)
        if len(named) != len(recipe.weights):
            recipe = replace(recipe, layers=len(named), weights=(1.0,) * len(named))
    if config.threshold is not None and config.threshold != "auto":
        binarize(torch.rand(1, 4, 4), config.threshold)  # a threshold that is not known raises before work starts
        recipe = replace(recipe, threshold=config.threshold)
    if config.refine is not None:
        pool = 5 if config.refine == "maxpool" else 1
        recipe = replace(recipe, refine="grabcut" if config.refine == "grabcut" else "none", pool=pool)
    return recipe


def changed(config: SegmentConfig, recipe: Recipe) -> bool:
    """Whether the command replaced anything of the named recipe."""
    return recipe != RECIPES[config.recipe] or config.layers is not None


def open_samples(config: SegmentConfig, run: Run | None) -> Dataset:
    """The pictures; labels are not needed, so that they may be of classes the network does not know."""
    if run is None:
        classes = class_list(config.classes)
        return open_data(config.data, classes=classes, pattern=config.pattern, masks=config.masks)
    return inputs.open_like_run(run, config.data, config.classes, config.pattern, config.masks)


def deepest_stages(model: nn.Module, pictures: Pictures, count: int, device: torch.device) -> list[str]:
    """The last layers at the `count` smallest resolutions above one pixel, shallow to deep."""
    found: list[str] = []
    one = next(iter(pictures.subset(1).batches(1, device=device))).images
    larger_than: int | None = None
    for _ in range(count):
        layer = find_layer(model, one, larger_than=larger_than)
        found.insert(0, layer)
        larger_than = max(record(model, one, [layer], inputs=False).features[layer].shape[2:])
    return found


@dataclass
class NetworkMasker:
    """Masks by a recipe from what a network looks at; counts where it fell back or found no evidence."""

    model: nn.Module
    recipe: Recipe
    layers: list[str]
    fell_back: int = 0
    empty: int = 0
    how: dict[str, Any] = field(default_factory=dict)
    logits: Tensor | None = None  # (N, K) of the last batch

    def __call__(self, batch: Batch, fine: Batch) -> Tensor:
        found = explain(self.model, batch, [self.recipe.method], layers=self.layers or None, target=self.recipe.target)
        made: Segmentation = segment_with(self.recipe, found, fine)
        self.fell_back += int(made.fell_back.sum())
        self.empty += int(made.empty.sum())
        self.how, self.logits = made.how, next(iter(found.values())).logits
        return made.masks


def baseline_maskers(
    run: Run | None, recipe: Recipe, layers: list[str], device: torch.device, seed: int
) -> dict[str, Masker]:
    """What the masks must beat, by name; the classic recipe's and the pipeline's own untrained network among them."""

    def gaussian(batch: Batch, fine: Batch) -> Tensor:
        return dilate(binarize(baselines.centre_gaussian(fine.images), "percentile:80"), 5)

    found: dict[str, Masker] = {
        "everything": lambda batch, fine: baselines.everything(fine.images),
        "centre-gaussian": gaussian,
        "centre-box-grabcut": lambda batch, fine: baselines.centre_box(fine.images)[0],
    }
    if run is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained = run.build_model()
        untrained.load_state_dict({"mean": run.model.mean, "std": run.model.std}, strict=False)
        untrained.to(device).to(memory_format=torch.channels_last)
        found["untrained-network"] = NetworkMasker(untrained, recipe, layers)
    return found


def read_truths(pictures: Pictures, progress: Progress) -> tuple[list[Tensor | None], list[list[str]]]:
    """The true masks that fit their pictures, None for the others; the others that should have one, with the reason."""
    truths: list[Tensor | None] = []
    unscored: list[list[str]] = []
    expected = any(sample.mask is not None for sample in pictures.samples)
    for sample, place in zip(pictures.samples, pictures.geometry, strict=True):
        truth, reason = None, ""
        if sample.mask is None:
            reason = "no mask for this picture"
        else:
            try:
                truth = read_mask(sample.mask)
            except ClearwingError as error:
                reason = error.mend
            if truth is not None and truth.shape != (place.height, place.width):
                size = f"{truth.shape[0]}x{truth.shape[1]}"
                reason = f"mask of {size}, picture of {place.height}x{place.width}; give a mask of the picture's size"
                truth = None
        if truth is None and expected:
            unscored.append([sample.key, reason])
            progress.say(f"not scored {sample.key}: {reason}")
        truths.append(truth)
    return truths, unscored


def run_maskers(
    pictures: Pictures,
    fine: Pictures,
    truths: Sequence[Tensor | None],
    segmenter: NetworkMasker,
    rivals: dict[str, Masker],
    out: Path,
    files: dict[str, Path],
    device: torch.device,
    batch_size: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Write the masks of all pictures; IoU by masker and picture, where there is a truth."""
    maskers: dict[str, Masker] = {"masks": segmenter, **rivals}
    scores: dict[str, dict[str, float]] = {name: {} for name in maskers}
    told, done = progress.task("segmenting"), 0
    both = (part.batches(batch_size, device=device) for part in (pictures, fine))
    for batch, finer in zip(*both, strict=True):
        truth = truths[done : done + len(batch)]
        for name, masker in maskers.items():
            full = restore(masker(batch, finer).to("cpu", torch.uint8), finer.geometry)
            if name == "masks":
                for key, mask in zip(batch.keys, full, strict=True):
                    save_png((mask * 255).numpy(), out / files[key])
            known = {i: one for i, one in enumerate(truth) if one is not None}
            if known:
                values = iou([full[i] for i in known], list(known.values()))
                scores[name] |= {batch.keys[i]: float(v) for i, v in zip(known, values, strict=True)}
        done += len(batch)
        told(done, len(pictures))
    return scores


def summarise(scores: dict[str, dict[str, float]], seed: int) -> dict[str, Any]:
    """Means, bootstrap intervals, and paired differences to every baseline."""
    own = torch.tensor(list(scores["masks"].values()), dtype=torch.float64)
    result: dict[str, Any] = {"mean_iou": None, "ci95": None, "per_image": scores["masks"], "scored": len(own)}
    result |= {"baselines": {}, "baseline_ci95": {}, "differences": {}, "baseline_per_image": {}}
    if len(own) == 0:
        return result

    def interval(values: Tensor) -> list[float] | None:  # one picture says nothing of how others vary
        return list(bootstrap_interval(values, seed=seed)) if len(values) > 1 else None

    result |= {"mean_iou": float(own.mean()), "ci95": interval(own)}
    for name, values in scores.items():
        if name == "masks":
            continue
        other = torch.tensor(list(values.values()), dtype=torch.float64)
        result["baselines"][name] = float(other.mean())
        result["baseline_ci95"][name] = interval(other)
        result["differences"][name] = {"mean": float((own - other).mean()), "ci95": interval(own - other)}
        result["baseline_per_image"][name] = values
    return result


def threshold_value(recipe: Recipe) -> float | None:
    """The number in a threshold such as percentile:80, where it has one."""
    if not isinstance(recipe.threshold, str):
        return float(recipe.threshold)
    number = recipe.threshold.partition(":")[2]
    return float(number) if number else None


def told_iou(result: dict[str, Any]) -> str:
    """The headline, where masks were scored."""
    interval = "" if result["ci95"] is None else "95 % interval {:.3f} to {:.3f}, ".format(*result["ci95"])
    return f"mean IoU {result['mean_iou']:.3f} ({interval}n = {result['scored']})"


def told(result: dict[str, Any], out: Path) -> str:
    """The result in a few lines."""
    lines = [
        f"{result['n']} masks, {result['fell_back']} fell back, {result['no_evidence']} without evidence, "
        f"skipped {result['skipped']}"
    ]
    if result["mean_iou"] is not None:
        lines.append(told_iou(result))
        for name, value in result["baselines"].items():
            difference = result["differences"][name]
            line = f"  {name:<20}{value:.3f}   difference {difference['mean']:+.3f}"
            if difference["ci95"] is not None:
                line += " ({:+.3f} to {:+.3f})".format(*difference["ci95"])
            lines.append(line)
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, f"written: {out}"])
