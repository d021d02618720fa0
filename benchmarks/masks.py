"""Free masks side by side: refinements, layers, methods, baselines; and the decoder beside one taught by drawn masks.

    python benchmarks/masks.py RUN DATA [--split val] [--limit N]
    python benchmarks/masks.py RUN DATA --twin [--steps 600]
    python benchmarks/masks.py RUN DATA --speed [--limit 16]

RUN is a trained run, DATA has true masks for the split. Printed is the mean IoU in the pictures' own pixels with a 95 %
bootstrap interval, the share of pictures below 0.3, the paired difference to the first row with its interval, and the
time a picture takes beyond the explanation, on one core. No row is chosen here: the defaults were chosen by this script
on runs on drawn pictures; on photographs it only reports.

--twin: the ceiling. The decoder is taught by the drawn masks of one half of the split and scored on the other, and the
other way round; beside it stands the same decoder taught by as many pictures with masks from the network: by the very
same ones, and by training pictures.

--speed: one batch through the classifier alone, through classifier and decoder, and through either pipeline to masks of
the size that pictures are refined at; nothing is read or written. RUN must have a decoder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from common import alternate, environment, show
from skimage.segmentation import random_walker, slic
from torch import Tensor

import clearwing as cw
from clearwing.data.preprocess import restore
from clearwing.jobs import decoder, inputs
from clearwing.jobs.maskers import DecoderMasker, Masker, NetworkMasker, explained, fitted, restored, rivals, whole
from clearwing.jobs.progress import Progress
from clearwing.jobs.segment import untrained
from clearwing.jobs.timeline import fit_mask
from clearwing.masks.pipeline import RECIPES, Recipe, fuse, resized, segment_with
from clearwing.masks.refine import SURE_BACKGROUND, SURE_FOREGROUND, blur, clean, seeds
from clearwing.masks.threshold import binarize
from clearwing.measure.overlap import bootstrap_interval, iou, paired_interval
from clearwing.models.decoder import Segmenter
from clearwing.train.devices import make_fabric
from clearwing.train.masks import with_masks
from clearwing.types import IGNORE, Batch

REFINE = RECIPES["refine"]
NEIGHBOURS: dict[str, Recipe] = {
    "refine": REFINE,
    "the maps alone": replace(REFINE, refine="none", keep=0.0, fill=False),
    "3 layers": replace(REFINE, layers=3, weights=(1.0, 1.0, 0.5)),
    "HiResCAM": replace(REFINE, method="hires-cam"),
    "Grad-CAM": replace(REFINE, method="grad-cam"),
    "Grad-CAM, last layer": replace(REFINE, method="grad-cam", layers=1, weights=(1.0,)),
    "guided backprop": replace(REFINE, method="guided-backprop", layers=0, weights=(1.0,)),
    "no flip": replace(REFINE, average=()),
    "three scales": replace(REFINE, average=("flip", 0.75, 1.25)),
    "blur 0.01": replace(REFINE, blur=0.01),
    "blur 0.02": replace(REFINE, blur=0.02),
    "percentile 80": replace(REFINE, threshold="percentile:80"),
    "mean": replace(REFINE, threshold="mean"),
    "at the network's size": replace(REFINE, finest=0),
    "three rounds": replace(REFINE, iterations=3),
    "all pieces": replace(REFINE, keep=0.0),
    "classic": RECIPES["classic"],
}

ROUNDS = 7

Refiner = Callable[[np.ndarray, Tensor, Tensor], np.ndarray]
"""A picture (H, W, 3) in [0, 1], its map (H, W), its seeds as `refine.seeds` codes (H, W), to a mask (H, W)."""


def guided_filter(
    picture: np.ndarray, heat: Tensor, codes: Tensor, radius: int = 8, epsilon: float = 1e-3
) -> np.ndarray:
    """He et al. 2013, with the grey picture as guide, on the thresholded map."""
    guide, mask = picture.mean(2).astype(np.float32), (codes.numpy() & 1).astype(np.float32)

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, (2 * radius + 1, 2 * radius + 1))

    a = (mean(guide * mask) - mean(guide) * mean(mask)) / (mean(guide * guide) - mean(guide) ** 2 + epsilon)
    b = mean(mask) - a * mean(guide)
    return mean(a) * guide + mean(b) > 0.5


def walker(picture: np.ndarray, heat: Tensor, codes: Tensor) -> np.ndarray:
    """Grady 2006, from the sure seeds."""
    labels = np.zeros(codes.shape, np.int32)
    labels[codes.numpy() == SURE_FOREGROUND], labels[codes.numpy() == SURE_BACKGROUND] = 1, 2
    if not (labels == 1).any() or not (labels == 2).any():
        return (codes.numpy() & 1).astype(bool)
    return random_walker(picture, labels, beta=300, mode="cg_j", tol=1e-3, channel_axis=2) == 1


def superpixels(picture: np.ndarray, heat: Tensor, codes: Tensor, count: int = 200) -> np.ndarray:
    """SLIC (Achanta et al. 2012): a piece is foreground where most of it is."""
    pieces = slic(picture, count, compactness=10, start_label=0)
    share = np.bincount(pieces.ravel(), (codes.numpy() & 1).ravel()) / np.bincount(pieces.ravel())
    return share[pieces] > 0.5


REFINERS: dict[str, Refiner] = {
    "guided filter": guided_filter,
    "random walker": walker,
    "superpixels": superpixels,
}


@dataclass
class RefinerMasker:
    """The default recipe with another refinement in the place of GrabCut."""

    model: Any
    recipe: Recipe
    layers: list[str]
    refiner: Refiner

    def masks(self, found: Any, fine: Batch) -> Tensor:
        maps = fuse([one.maps[:, 0] for one in found.values()], self.recipe.weights)
        full = (fine.images.shape[2], fine.images.shape[3])
        maps = blur(resized(maps, full), self.recipe.blur * min(full))
        sure = {"sure_foreground": self.recipe.sure_foreground, "sure_background": self.recipe.sure_background}
        codes = seeds(maps, binarize(maps, self.recipe.threshold), **sure)
        pictures = fine.images.permute(0, 2, 3, 1).numpy()
        made = [self.refiner(*one) for one in zip(pictures, maps, codes, strict=True)]
        return clean(torch.from_numpy(np.stack(made)), maps, share=self.recipe.keep, fill=True).byte()


def batches(loaded: inputs.Loaded, samples: Any, side: int, size: int = 32) -> Iterator[tuple[Batch, Batch]]:
    pictures = cw.load_pictures(samples, loaded.size, fit=loaded.fit, channels=loaded.channels)
    fine = cw.load_pictures(samples, side, fit=loaded.fit, channels=loaded.channels)
    yield from zip(pictures.batches(size), fine.batches(size), strict=True)


def row(name: str, scores: Tensor, first: Tensor | None, milliseconds: float | None) -> None:
    low, high = bootstrap_interval(scores)
    line = f"| {name} | {scores.mean():.3f} ({low:.3f} to {high:.3f}) | {(scores < 0.3).double().mean():.1%} |"
    if first is None or first is scores:
        line += " |"
    else:
        low, high = paired_interval(first, scores)
        line += f" {(first - scores).mean():+.3f} ({low:+.3f} to {high:+.3f}) |"
    print(line + (f" {milliseconds:.0f} |" if milliseconds is not None else " |"), flush=True)


def table(loaded: inputs.Loaded, samples: Any, truths: list[Tensor]) -> None:
    """Every way to masks, scored on the same pictures."""
    run, model = loaded.run, loaded.model
    pairs = list(batches(loaded, samples, REFINE.side(loaded.size)))
    one = pairs[0][0].images
    print("| way | mean IoU (95 %) | below 0.3 | refine gains (95 %) | ms a picture |\n|---|---|---|---|---|")
    first: Tensor | None = None

    def scored(name: str, make: Callable[[Batch, Batch], tuple[Tensor, float]]) -> Tensor:
        full, spent = [], 0.0
        for batch, fine in pairs:
            masks, seconds = make(batch, fine)
            spent += seconds
            full += restored(masks.byte(), batch, fine)
        scores = iou(full, truths)
        row(name, scores, first, 1000 * spent / len(truths))
        return scores

    def timed(recipe: Recipe, layers: list[str], refiner: Refiner | None = None) -> Any:
        def make(batch: Batch, fine: Batch) -> tuple[Tensor, float]:
            found = explained(model, recipe, batch, layers)
            began = time.perf_counter()
            pictures = fine if recipe.side(loaded.size) > loaded.size else batch
            if refiner is None:
                masks = segment_with(recipe, found, pictures).masks
            else:
                masks = RefinerMasker(model, recipe, layers, refiner).masks(found, pictures)
            return masks, time.perf_counter() - began

        return make

    for name, recipe in NEIGHBOURS.items():
        found = scored(name, timed(*fitted(recipe, model, one)))
        first = found if first is None else first
    for name, refiner in REFINERS.items():
        scored(name, timed(*fitted(REFINE, model, one), refiner))

    def plainly(masker: Masker) -> Any:
        def make(batch: Batch, fine: Batch) -> tuple[Tensor, float]:
            began = time.perf_counter()
            return masker(batch, fine).masks, time.perf_counter() - began

        return make

    recipe, layers = fitted(REFINE, model, one)
    for name, masker in rivals(untrained(run, 0, torch.device("cpu")), recipe, layers).items():
        if not isinstance(masker, NetworkMasker) or run is not None:
            scored(f"baseline: {name}", plainly(masker))


def twin(loaded: inputs.Loaded, samples: Any, truths: list[Tensor], steps: int) -> None:
    """The decoder taught by drawn masks, crosswise on halves of the split, beside those taught by free masks of the
    same halves, and of as many training pictures: the same rounds of the same number of steps, the drawn masks being
    the same in all."""
    fabric, course, model = make_fabric("cpu"), replace(decoder.Course(), steps=steps), loaded.model
    common: dict[str, Any] = {"fit": loaded.fit, "channels": loaded.channels}
    pictures, fine = (cw.load_pictures(samples, side, **common) for side in (loaded.size, REFINE.side(loaded.size)))
    drawn = torch.stack([fit_mask(t, place) for t, place in zip(truths, pictures.geometry, strict=True)])
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    halves = [half.sort()[0].tolist() for half in order.chunk(2)]
    train = inputs.limited(inputs.open_like_run(loaded.run, None).split("train"), len(halves[0]))
    free = cw.load_pictures(train, loaded.size, **common)
    finer = cw.load_pictures(train, REFINE.side(loaded.size), **common)
    ways = ("drawn", "same", "free")
    scores = {f"{way}{cut}": torch.zeros(len(samples)) for way in ways for cut in ("", ", cut")}

    def score(made: Segmenter, way: str, which: list[int]) -> None:
        for some in torch.tensor(which).split(32):
            batch, finer = (next(p.subset(some.tolist()).batches(len(some))) for p in (pictures, fine))
            true, cut = [truths[i] for i in some], DecoderMasker(made, nullcontext, refine=True)
            with torch.inference_mode():
                full = restore(made(batch.images, finer.images)[1].float().sigmoid(), finer.geometry)
            scores[way][some] = iou([one > 0.5 for one in full], true).float()
            scores[f"{way}, cut"][some] = iou(whole(cut(batch, finer), batch, finer), true).float()

    with Progress(True) as progress:
        for half, test in zip(halves, reversed(halves), strict=True):
            teacher = with_masks(pictures.subset(half), (drawn[half] == 1).float(), (drawn[half] != IGNORE).float())
            made = decoder.new_decoder(model, pictures, fabric.device, course.width)
            for count in range(course.rounds):
                made = decoder.trained_decoder(made, teacher, fabric, course, progress, seed=count + 1)
            score(made, "drawn", test)
            *_, (made, _) = decoder.taught(model, pictures.subset(half), fine.subset(half), fabric, course, progress)
            score(made, "same", test)
        *_, (made, _) = decoder.taught(model, free, finer, fabric, course, progress)
        score(made, "free", list(range(len(samples))))
    print("| taught by | mean IoU (95 %) | below 0.3 | drawn gains (95 %) | |\n|---|---|---|---|---|")
    for cut, told in (("", ""), (", cut", "; its masks cut (--refine grabcut)")):
        drawn_ones = scores[f"drawn{cut}"]
        row(f"{len(halves[0])} drawn masks, crosswise{told}", drawn_ones, None, None)
        row(f"free masks of the same pictures, crosswise{told}", scores[f"same{cut}"], drawn_ones, None)
        row(f"{len(train)} free masks of training pictures{told}", scores[f"free{cut}"], drawn_ones, None)
    for cut in ("", ", cut"):
        reached = [f"{scores[way + cut].mean() / scores['drawn' + cut].mean():.1%}" for way in ("same", "free")]
        print(f"\nfree masks{cut} reach {' and '.join(reached)} of drawn ones")


def speed(loaded: inputs.Loaded, samples: Any) -> None:
    """What a picture costs on the way to a mask, all ways in turn."""
    model, precise = loaded.model, make_fabric("cpu").autocast
    [(batch, fine)] = batches(loaded, samples, REFINE.side(loaded.size), len(samples))
    segmenter = loaded.run.load_segmenter()
    recipe, layers = fitted(REFINE, model, batch.images)
    refine, quick = NetworkMasker(model, recipe, layers), DecoderMasker(segmenter, precise)
    cut = replace(quick, refine=True)

    def passed(module: torch.nn.Module, *images: Tensor) -> Callable[[], object]:
        def way() -> None:
            with torch.inference_mode(), precise():
                module(*images)

        return way

    ways: dict[str, Callable[[], object]] = {
        "classifier": passed(model, batch.images),
        "classifier and decoder": passed(segmenter, batch.images, fine.images),
        "--pipeline decoder": lambda: quick(batch, fine),
        "--pipeline decoder --refine grabcut": lambda: cut(batch, fine),
        "--pipeline refine: its explanation": lambda: explained(model, recipe, batch, layers),
        "--pipeline refine": lambda: refine(batch, fine),
    }
    seconds = alternate(ways, ROUNDS)
    show(
        f"To a mask, {len(batch)} pictures of {loaded.size} px, refined at {fine.images.shape[2]} px",
        len(batch),
        seconds,
    )
    print("\nms a picture: " + ", ".join(f"{1000 * value / len(batch):.1f}" for value in seconds.values()))
    print(
        f"the decoder's pass is {seconds['classifier and decoder'] / seconds['classifier']:.2f} times the classifier's"
    )
    for way in ("--pipeline decoder", "--pipeline decoder --refine grabcut"):
        print(f"{way} is {seconds['--pipeline refine'] / seconds[way]:.1f} times as quick as refine")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--steps", type=int, default=decoder.Course().steps)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    loaded = inputs.open_model(args.run)
    dataset = inputs.open_like_run(cw.Run.load(args.run), args.data)
    samples = inputs.limited(inputs.split_of(dataset, args.split), args.limit)
    samples = tuple(sample for sample in samples if sample.mask is not None)
    truths = [cw.read_mask(sample.mask) for sample in samples]
    environment(ROUNDS if args.speed else None)
    print(f"{args.run} on {dataset.name}, {args.split}, {len(samples)} pictures with a mask\n")
    if args.speed:
        speed(loaded, samples[: args.limit or 16])
    elif args.twin:
        twin(loaded, samples, truths, args.steps)
    else:
        table(loaded, samples, truths)


if __name__ == "__main__":
    main()
