"""Loading and a training step beside the usual ways, in one run: ratios hold, seconds are this machine's.

    python benchmarks/pipeline.py [--pictures 512] [--rounds 5]

Pictures are drawn (no data set is needed) and written as JPEG files. Each pair alternates, after a warm-up; printed are
medians.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision import datasets, transforms

import clearwing as cw
from clearwing.data import synthetic
from clearwing.jobs.train import processor_name
from clearwing.train.fit import has_bfloat16

SIZE, BATCH = 128, 32


def alternate(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            gc.collect()  # what the way before left in cycles is not this one's
            began = time.perf_counter()
            way()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, pictures: int, seconds: dict[str, float]) -> None:
    """One table; the ratio is to the first row, the usual way."""
    usual = next(iter(seconds.values()))
    print(f"\n{title}\n| way | pictures/s | ratio |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {pictures / value:,.0f} | {usual / value:.2f} |")


def loading(folder: Path, rounds: int) -> dict[str, float]:
    """One epoch of random resized crops and flips to 128 px; ours after its one decoding, which is a row of its own."""
    crops = [transforms.RandomResizedCrop(SIZE, (0.35, 1.0)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    peer = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder), transforms.Compose(crops)), BATCH, shuffle=True, num_workers=2
    )
    samples = cw.open_data(folder, val_fraction=0).split("train")
    pictures = cw.load_pictures(samples, 160, fit="squash")
    augment, generator = cw.Augment(resized_crop=(0.35, 1.0), size=SIZE, flip=0.5), torch.Generator().manual_seed(0)
    return alternate(
        {
            "ImageFolder + DataLoader, 2 workers": lambda: [images.shape for images, _ in peer],
            "clearwing, decoding once": lambda: cw.load_pictures(samples, 160, fit="squash"),
            "clearwing, every epoch after that": lambda: [
                batch.images.shape for batch in pictures.batches(BATCH, augment=augment, generator=generator)
            ],
        },
        rounds,
    )


def training(rounds: int) -> dict[str, float]:
    """One step of resnet14 at 128 px, batch 32."""
    images, labels = torch.rand(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))

    def stepper(layout: torch.memory_format, bfloat16: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = cw.build("resnet14", 10).to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
        batch = images.contiguous(memory_format=layout)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = nn.functional.cross_entropy(model(batch).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    ways = {"plain loop": stepper(torch.contiguous_format, False)}
    ways["channels_last"] = stepper(torch.channels_last, False)
    if has_bfloat16("cpu"):
        ways["channels_last, bfloat16 (the default here)"] = stepper(torch.channels_last, True)
    return alternate(ways, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"clearwing {cw.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{processor_name()}, {threads} threads; medians of {args.rounds} rounds, alternating, after one warm-up")
    with tempfile.TemporaryDirectory() as name:
        images, labels, _ = synthetic.draw_split("train", args.pictures, size=192)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = Path(name) / str(label) / f"{i}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path, quality=90)
        show("One epoch of random resized crops", args.pictures, loading(Path(name), args.rounds))
    show("A training step, resnet14, 128 px, batch 32", BATCH, training(args.rounds))


if __name__ == "__main__":
    main()
