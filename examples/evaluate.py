"""The butterfly-and-moth assignment, evaluation: a class and a mask for every picture.

    python examples/evaluate.py CKPT/resnet_model.pth IMAGES

IMAGES is a flat folder without labels, or one whose class folders or file names hold them. Writes `seg_maps/*.png`
(0 and 255, in each picture's own size) and `submission.csv` (image_name,label), and prints the accuracy where the
labels are known. The class names are those of `class_names.json` beside the weights.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import clearwing as cw
from clearwing.config import RECIPES
from clearwing.data.sources import read_classes
from clearwing.jobs import inputs
from clearwing.jobs.evaluate import scores
from clearwing.jobs.maskers import NetworkMasker, fitted
from clearwing.jobs.progress import Progress
from clearwing.run import free_folder
from clearwing.show.draw import save_png

SIZE = 128
"""Side of the input in pixels where nothing says it: the default of train.py."""


def evaluate(args: argparse.Namespace, progress: Progress) -> str:
    """Write the masks and the table; what is to be printed."""
    folder = args.weights.parent
    size = args.size or SIZE
    if args.size is None and (folder / "config.json").is_file():  # the run that train.py left beside the weights
        size = cw.Run.load(folder).config["model"]["input_size"]
    model = cw.load_model(args.weights, class_names=read_classes(folder / "class_names.json"))
    names = model.class_names
    dataset = cw.open_data([args.images] if args.unlabelled else args.images, val_fraction=0).relabelled(names)
    table = args.out / "submission.csv"
    if table.exists() and not args.overwrite:
        raise cw.ClearwingError("--out", table, "exists; use --overwrite or another folder")
    maps = free_folder(args.out / "seg_maps", args.overwrite)
    samples, channels = inputs.split_of(dataset, "all"), model.in_channels or 3
    recipe, device = cw.RECIPES[args.pipeline], inputs.pick_device(args.device)
    pictures, fine = (
        cw.load_pictures(samples, side, fit="squash", channels=channels, progress=progress.task("reading pictures"))
        for side in (size, recipe.side(size))
    )
    skipped = inputs.told_skipped(pictures, progress)

    model.to(device)
    masker = NetworkMasker(model, *fitted(recipe, model, next(pictures.batches(1, device=device)).images))
    files, logits = inputs.result_paths(pictures.keys, ".png"), []
    for batch, finer in zip(pictures.batches(32, device=device), fine.batches(32, device=device), strict=True):
        made = masker(batch, finer)
        logits.append(made.logits.cpu())
        for key, mask in zip(batch.keys, cw.restore(made.masks.cpu(), finer.geometry), strict=True):
            save_png((mask * 255).numpy(), maps / files[key])
    predicted = torch.cat(logits)
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = zip(pictures.keys, (names[k] for k in predicted.argmax(1).tolist()), strict=True)
        csv.writer(file, lineterminator="\n").writerows([("image_name", "label"), *rows])
    lines = [f"{len(pictures)} pictures, skipped {len(skipped)}; written: {maps} and {table}"]
    if pictures.labels is not None:
        score = scores(predicted, pictures.labels, names)
        low, high = score["ci95"]
        lines.append(f"accuracy {score['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}, n = {score['n']})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="CKPT/resnet_model.pth", type=Path, help="what train.py wrote")
    parser.add_argument("images", metavar="IMAGES", help="folder of pictures")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write; default: the current one")
    parser.add_argument("--pipeline", default="classic", choices=RECIPES, help="way to a mask; default: classic")
    parser.add_argument("--size", type=int, help=f"side of the input; default: as trained, else {SIZE}")
    parser.add_argument("--unlabelled", action="store_true", help="read no labels from folders or file names")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    try:
        with Progress() as progress:
            print(evaluate(args, progress))
    except cw.ClearwingError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
