"""The butterfly-and-moth assignment, training: a residual network on a folder of pictures, within an hour.

    python examples/train.py DATA CKPT

DATA holds a folder a class, or train/ and val/ with a folder a class in each. CKPT gets `resnet_model.pth` (a plain
state dict; mean and std of the pictures are in it) and `class_names.json`, which evaluate.py reads, beside what
`clearwing train` writes: `clearwing report CKPT` shows the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import clearwing as cw
from clearwing.config import MODELS, TrainConfig
from clearwing.jobs.train import train
from clearwing.run import write_json
from clearwing.types import atomic_path


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    config = TrainConfig(
        data=args.data,
        out=args.ckpt,
        model=args.model,
        size=args.size,
        epochs=args.epochs,
        time_budget=None if args.epochs is not None else args.time_budget,
        plan="first-epoch",
        seed=args.seed,
        device=args.device,
        overwrite=args.overwrite,
    )
    try:
        result = train(config)
        run = cw.Run.load(args.ckpt)
        write_json(run.file("class_names.json"), run.class_names)
        with atomic_path(run.file("resnet_model.pth")) as temporary:
            torch.save(run.model.state_dict(), temporary)
    except cw.ClearwingError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{result['text']}\nweights: {run.file('resnet_model.pth')}")
    return result["exit_code"]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder of pictures")
    parser.add_argument("ckpt", metavar="CKPT", help="folder to write")
    parser.add_argument("--model", default="resnet14", choices=MODELS, help="default: resnet14")
    parser.add_argument("--size", type=int, default=128, help="side of the network's input in pixels; default: 128")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the pictures, instead of a time budget")
    length.add_argument(
        "--time-budget",
        default="1h",
        help="time the first epoch, then plan 80 %% of the epochs that fit, such as 20m; default: 1h",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that CKPT holds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
