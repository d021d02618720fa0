"""Recipes at equal epochs: accuracy of the last weights over seeds, and the time they took, in one run.

    python benchmarks/cifar.py DATA [--limit 5000] [--model resnet8] [--widths 16 32 64] [--batch 64] [--seeds 5]
    python benchmarks/cifar.py cifar10 --model resnet18 --compile           # on a GPU: the whole set

Ours is `--recipe cifar-resnet18-20` (with another network, batch or size where asked for); beside it the tutorials'
recipe and kuangliu's cut to the same number of epochs, in their plain loops (benchmarks/plain.py). All are scored once,
with the weights of the last step, on the pictures of the split `test`. On a GPU the model flops utilisation is printed:
three times the forward pass's multiply-adds, times two, over the device's dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment
from plain import KUANGLIU, TUTORIAL, PlainRecipe, accuracy, loader, plain_epochs

import clearwing as cw
from clearwing.config import TrainConfig
from clearwing.jobs.inputs import limited
from clearwing.jobs.train import train
from clearwing.models.resnet import summary
from clearwing.settings import from_recipe
from clearwing.train.devices import make_fabric
from clearwing.train.predict import predict_logits

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations a second, from the makers' data sheets."""


def ours(args: argparse.Namespace, seed: int, pictures: cw.Pictures, folder: Path) -> dict[str, float]:
    """One run of the recipe through the job that the command line calls."""
    settings = from_recipe("cifar-resnet18-20") | {"epochs": args.epochs, "model": args.model, "seed": seed}
    if args.batch:
        settings["batch_size"] = args.batch
    if args.widths:
        settings["widths"] = tuple(args.widths)
    began = time.perf_counter()
    config = TrainConfig(
        data=args.data,
        out=str(folder / f"ours-{seed}"),
        limit=args.limit,
        val="test",
        device=args.device,
        compile=args.compile,
        tensorboard=False,
        json=True,
        save_every="1h",
        **settings,
    )
    result = train(config)["json"]
    wall, rows = time.perf_counter() - began, cw.Run.load(config.out).metrics
    fabric = make_fabric(args.device, "float32")
    model = cw.Run.load(config.out).model.to(fabric.device)
    logits, labels = predict_logits(model, pictures, fabric)
    mirrored, _ = predict_logits(model, pictures, fabric, flip=True)
    return {
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "flip": (mirrored.argmax(1) == labels).double().mean().item(),
        "watched": result["val_accuracy"],
        "wall": wall,
        # the first epoch pays for warming up and compiling
        "epochs": sum(row["seconds"] for row in rows[1:]) * len(rows) / max(len(rows) - 1, 1),
        "speed": statistics.median(row["images_per_s"] for row in rows[1:] or rows),
    }


def plain(args: argparse.Namespace, seed: int, sets: tuple[cw.Pictures, cw.Pictures], recipe: PlainRecipe) -> dict:
    """One run of a plain loop."""
    torch.manual_seed(seed)
    more: dict[str, Any] = {"widths": tuple(args.widths)} if args.widths else {}
    net = cw.build(args.model, 10, **more).backbone.to(args.device)
    batches, test = loader(sets[0], recipe, True, args.workers), loader(sets[1], recipe, False, args.workers)
    began = time.perf_counter()
    seconds = list(plain_epochs(net, batches, recipe, args.epochs, args.device))
    wall = time.perf_counter() - began
    later = sum(seconds[1:]) * len(seconds) / max(len(seconds) - 1, 1)  # as for ours: the first one warms up
    right = accuracy(net, test, args.device)
    speed = len(sets[0]) / statistics.median(seconds[1:] or seconds)
    return {"accuracy": right, "wall": wall, "epochs": later, "speed": speed}


def row(name: str, runs: list[dict[str, float]], utilisation: str) -> str:
    def told(key: str, form: str) -> str:
        values = [run[key] for run in runs if key in run]
        if not values:
            return ""
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{format(statistics.mean(values), form)} ± {format(spread, form)}"

    cells = [name, told("accuracy", ".2%"), told("flip", ".2%"), told("epochs", ".1f"), told("wall", ".1f")]
    cells.append(told("speed", ",.0f"))
    return "| " + " | ".join([*cells, utilisation]) + " |"


def utilisation(args: argparse.Namespace, model: torch.nn.Module, speed: float) -> str:
    if not args.device.startswith("cuda"):
        return ""
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK.items() if key in name), None)
    operations = 6 * summary(model, 32).multiply_adds * speed
    return f"{operations / peak:.1%} of {name}" if peak else f"{operations / 1e12:.1f} TFLOP/s on {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, help="so many pictures to train on and to test on")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--widths", type=int, nargs=3)
    parser.add_argument("--batch", type=int, help="our batch, where it is not the recipe's")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipes", default="ours,tutorial,kuangliu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    environment()
    dataset = cw.open_data(args.data, val_fraction=0)
    sets = tuple(cw.load_pictures(limited(dataset.split(s), args.limit), 32, fit="squash") for s in ("train", "test"))
    print(f"{len(sets[0])} pictures to train on, {len(sets[1])} to test on, {args.epochs} epochs, {args.seeds} seeds")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.recipes.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name, runs in found.items():
                if name == "ours":
                    runs.append(ours(args, seed, sets[1], Path(folder)))
                else:
                    runs.append(plain(args, seed, sets, {"tutorial": TUTORIAL, "kuangliu": KUANGLIU}[name]))
                print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()), flush=True)
    more: dict[str, Any] = {"widths": tuple(args.widths)} if args.widths else {}
    model = cw.build(args.model, 10, **more)
    heads = ["recipe", "accuracy", "with its mirror image", "seconds of training", "seconds in all", "pictures/s"]
    print("\n| " + " | ".join([*heads, "utilisation"]) + " |\n" + "|---" * 7 + "|")
    for name, runs in found.items():
        print(row(name, runs, utilisation(args, model, statistics.mean(run["speed"] for run in runs))))


if __name__ == "__main__":
    main()
