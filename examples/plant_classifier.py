"""The plant assignment: fine-tune an ImageNet ResNet-18 on pictures named after what they show.

    python examples/plant_classifier.py DATA

DATA is a flat folder of `{class}_{id}.jpg`; 70 % of each class train, 15 % are watched (val), 15 % are only tested, by
a seeded draw. Splits that DATA brings (train/, val/, test/) are taken as they are. RUN gets `plant_classifier.pth`: the
last weights as `model_state_dict`, with `class_names`, `train_acc`, `val_acc`, `test_acc` (of those weights, on the
pictures as they are) and `epoch`. `torch.load(..., weights_only=True)` and `clearwing.adopt` read it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import clearwing as cw
from clearwing.config import MODELS, EvaluateConfig, TrainConfig
from clearwing.jobs.evaluate import evaluate
from clearwing.jobs.train import train
from clearwing.types import atomic_path


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    config = TrainConfig(
        data=args.data,
        out=args.out,
        model=args.model,
        weights=None if args.weights == "none" else args.weights,
        size=args.size,
        epochs=args.epochs,
        val_fraction=0.15,
        test_fraction=0.15,
        seed=args.seed,
        device=args.device,
        overwrite=args.overwrite,
    )
    try:
        trained = train(config)
        print(trained["text"])
        if trained["exit_code"]:
            return trained["exit_code"]
        run, accuracy = cw.Run.load(args.out), {}
        for split in ("train", "val", "test"):
            scored = evaluate(EvaluateConfig(run=args.out, data=args.data, split=split, device=args.device))
            print(scored["text"].splitlines()[0])
            accuracy[f"{split}_acc"] = scored["json"]["accuracy"]
        checkpoint = {"model_state_dict": run.model.state_dict(), "class_names": list(run.class_names)}
        with atomic_path(run.file("plant_classifier.pth")) as temporary:
            torch.save(checkpoint | accuracy | {"epoch": trained["json"]["epochs"]}, temporary)
    except cw.ClearwingError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"checkpoint: {run.file('plant_classifier.pth')}")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder of {class}_{id}.jpg")
    parser.add_argument("--out", metavar="RUN", default="runs/plants", help="folder to write; default: runs/plants")
    parser.add_argument("--weights", default="imagenet", help="imagenet, none, or a weights file; default: imagenet")
    parser.add_argument("--model", default="resnet18", choices=MODELS, help="default: resnet18")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input in pixels; default: 224")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the pictures; default: 30")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training; default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that RUN holds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
