"""The CIFAR-10 assignment: ResNet-18, 20 epochs of RandomCrop(32, padding=4) and Cutout 16x16, and where it errs.

    python examples/cifar10_resnet18.py [DATA]

DATA is cifar10 (downloaded once) or a Parquet folder such as cifar10_jpeg. Prints the accuracy of each class on the
test pictures. RUN/pictures gets the curves, the per-class accuracy, the confusion matrix and ten misclassified
pictures with the Grad-CAM of both classes, on the deepest layer whose map is larger than 7x7 (layer3); RUN/report.html
shows all of it. While training, a fifth of train is watched, stratified and seeded; `--val test` trains on all of
train and watches the test pictures, as the assignment does, and the report says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from clearwing import ClearwingError
from clearwing.config import MODELS, EvaluateConfig, ReportConfig, TrainConfig
from clearwing.jobs.evaluate import evaluate
from clearwing.jobs.report import report
from clearwing.jobs.train import train


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    shared = {"data": args.data, "limit": args.limit, "device": args.device}
    config = TrainConfig(
        **shared,
        out=args.out,
        model=args.model,
        size=32,
        epochs=args.epochs,
        crop="padded",
        padding=4,
        cutout=16,
        flip="none",  # the assignment has the crop and the cutout alone
        jitter=0,
        val=args.val,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    try:
        trained = train(config)
        print(trained["text"])
        if trained["exit_code"]:
            return trained["exit_code"]
        scored = evaluate(EvaluateConfig(run=args.out, split="test", **shared))
        for name, row in scored["json"]["per_class"].items():
            share = "no picture" if row["accuracy"] is None else f"{row['accuracy']:6.1%}"
            print(f"  {name:<12}{share}  {row['correct']} of {row['n']}")
        print(scored["text"])
        print(report(ReportConfig(run=args.out, split="test", most=10, larger_than=7, **shared))["text"])
    except ClearwingError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", nargs="?", default="cifar10", help="default: cifar10")
    parser.add_argument("--out", metavar="RUN", default="runs/cifar10", help="folder to write; default: runs/cifar10")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the pictures; default: 20")
    parser.add_argument("--val", choices=("val", "test"), default="val", help="split to watch; default: val")
    parser.add_argument("--limit", type=int, help="use only N pictures of each split")
    parser.add_argument("--model", default="resnet18", choices=MODELS, help="default: resnet18")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that RUN holds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
