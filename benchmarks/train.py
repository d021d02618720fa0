"""An epoch of training beside the plain loop, loading and augmentation included, in one run.

    python benchmarks/train.py [DATA] [--pictures 1536] [--rounds 3] [--model resnet18] [--batch 128] [--compile]

DATA is a CIFAR-like data set (cifar10, or Parquet); by default pictures are drawn. Both sides see the same decoded
pictures, shifted by up to 4 pixels and mirrored, and take the same number of steps of SGD with momentum. The plain
loop is kuangliu's: DataLoader with two workers, float32, the layout that pictures come in; it has a process of its own.
Ways alternate; printed are medians after one warm-up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import alternate, environment, in_its_own_process, show
from plain import KUANGLIU, loader, plain_epochs

import clearwing as cw
from clearwing.data.loader import epoch_order
from clearwing.train.devices import has_bfloat16, make_fabric
from clearwing.train.ema import EMA
from clearwing.train.fit import classification
from clearwing.train.optim import optimizer
from clearwing.train.schedule import Steps, schedule


def pictures_of(data: str | None, count: int, size: int = 32) -> cw.Pictures:
    """So many training pictures at the size of CIFAR."""
    dataset = cw.open_data(data or "demo", val_fraction=0)
    samples = list(dataset.split("train"))
    while len(samples) < count:  # the drawn set is small; repeated pictures cost the same
        samples += samples[: count - len(samples)]
    return cw.load_pictures(samples[:count], size, fit="squash")


def our_epoch(
    pictures: cw.Pictures,
    model: str,
    batch: int,
    device: str,
    precision: str,
    compiled: bool = False,
    ema: bool = False,
) -> Callable[[], Any]:
    """One epoch of `fit` with the defaults of `clearwing train` for CIFAR."""
    torch.manual_seed(0)
    fabric = make_fabric(device, precision)
    net = cw.build(model, 10).to(fabric.device, memory_format=torch.channels_last)
    sgd = optimizer(net, "sgd", 0.1)
    augment = cw.Augment(crop_padding=4, padding_mode="zero", flip=0.5)
    average = EMA(net, 0.99) if ema else None
    compiler = torch.compile if compiled else None
    epoch = 0

    def batches(_: int, start: int) -> Any:
        order = epoch_order(len(pictures), 0, epoch)
        return pictures.batches(batch, device=fabric.device, order=order, augment=augment, epoch=epoch, ahead=1)

    def run() -> list[dict[str, Any]]:
        nonlocal epoch
        epoch += 1
        state = cw.fit(
            net,
            batches,
            classification(),
            optimizer=sgd,
            schedule=schedule("constant"),
            plan=Steps(-(-len(pictures) // batch)),
            fabric=fabric,
            ema=average,
            compiled=compiler,
        )
        return state.rows

    return run


def plain_epoch(data: str | None, count: int, model: str, device: str) -> Callable[[], Any]:
    """One epoch of the plain loop; its workers live on between epochs."""
    torch.manual_seed(0)
    pictures = pictures_of(data, count)
    net = cw.build(model, 10).backbone.to(device)
    batches = loader(pictures, KUANGLIU, train=True)
    return lambda: list(plain_epochs(net, batches, KUANGLIU, 1, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--pictures", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also compiled, which takes a minute first")
    args = parser.parse_args()
    environment(args.rounds)
    pictures = pictures_of(args.data, args.pictures)
    ours = {"float32": our_epoch(pictures, args.model, args.batch, args.device, "float32")}
    if has_bfloat16(args.device):
        ours["bfloat16 (the default here)"] = our_epoch(pictures, args.model, args.batch, args.device, "bfloat16")
        ours["bfloat16, EMA"] = our_epoch(pictures, args.model, args.batch, args.device, "bfloat16", ema=True)
        if args.compile:
            fast = our_epoch(pictures, args.model, args.batch, args.device, "bfloat16", compiled=True)
            ours["bfloat16, compiled"] = fast
    ways = {"plain loop": in_its_own_process(plain_epoch, args.data, args.pictures, args.model, args.device)}
    ways |= {f"clearwing, {name}": way for name, way in ours.items()}
    seconds = alternate(ways, args.rounds)
    show(f"An epoch of {args.model}, {args.pictures} pictures of 32 px, batch {args.batch}", args.pictures, seconds)
    waited = ours[list(ours)[-1]]()[-1]["waited"]
    print(f"\nof the last way's epoch, {waited:.1%} was spent waiting for data")


if __name__ == "__main__":
    main()
