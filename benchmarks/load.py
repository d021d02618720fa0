"""Loading with augmentation beside torchvision's way, in one run: ratios hold, seconds are this machine's.

    python benchmarks/load.py [DATA] [--pictures 512] [--rounds 5]

DATA is a folder of class folders of pictures (or has one named `train`); by default pictures are drawn and written as
JPEG files of 256 px. Both sides take a random resized crop, antialiased, and mirror it, 128 px, batches of 32. The
peer's workers live on between epochs; ours decodes once, which is a row of its own. Ways alternate; printed are medians
after one warm-up. At the end, how long a training loop waits for its pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import alternate, environment, show
from PIL import Image
from torchvision import datasets, transforms

import clearwing as cw
from clearwing.data import synthetic
from clearwing.data.loader import epoch_order
from clearwing.train.devices import has_bfloat16, make_fabric
from clearwing.train.fit import classification
from clearwing.train.optim import optimizer
from clearwing.train.schedule import Steps, schedule

SIZE, BATCH, SCALE = 128, 32, (0.35, 1.0)
FULL, DEFAULT = 256, 160  # sides of the pictures in the cache: those of the files, and what training keeps for 128 px
AUGMENT = cw.Augment(resized_crop=SCALE, size=SIZE, flip=0.5)


def draw(folder: Path, count: int) -> None:
    """So many drawn butterflies and moths, in class folders."""
    images, labels, _ = synthetic.draw_split("train", count, size=FULL)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path, quality=90)


def peer_epoch(folder: Path) -> Callable[[], object]:
    """One epoch of torchvision's ImageFolder through a DataLoader of two workers."""
    steps = [transforms.RandomResizedCrop(SIZE, SCALE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    pictures = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    batches = torch.utils.data.DataLoader(pictures, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    return lambda: [images.shape for images, _ in batches]


def our_epoch(pictures: cw.Pictures, device: str = "cpu") -> Callable[[], object]:
    """One epoch of ours."""
    order, on = epoch_order(len(pictures), 0, 0), torch.device(device)
    return lambda: [batch.images.shape for batch in pictures.batches(BATCH, device=on, order=order, augment=AUGMENT)]


def waiting(pictures: cw.Pictures, ahead: int) -> float:
    """The share of an epoch of resnet14, at the defaults of `clearwing train`, that is spent waiting for pictures."""
    torch.manual_seed(0)
    fabric = make_fabric("auto", "auto")
    net = cw.build("resnet14", 10).to(fabric.device, memory_format=torch.channels_last)

    def batches(epoch: int, start: int) -> object:
        order = epoch_order(len(pictures), 0, epoch)
        return pictures.batches(BATCH, device=fabric.device, order=order, augment=AUGMENT, epoch=epoch, ahead=ahead)

    state = cw.fit(
        net,
        batches,
        classification(),
        optimizer=optimizer(net, "sgd", 0.01),
        schedule=schedule("constant"),
        plan=Steps(-(-len(pictures) // BATCH) * 2),
        fabric=fabric,
    )
    return state.rows[-1]["waited"]  # of the second epoch: the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--pictures", type=int, default=512, help="to draw where there is no DATA")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    environment(args.rounds)
    with tempfile.TemporaryDirectory() as drawn:
        folder = Path(drawn) if args.data is None else args.data
        if args.data is None:
            draw(folder, args.pictures)
        folder = folder / "train" if (folder / "train").is_dir() else folder
        samples = cw.open_data(folder, val_fraction=0).split("train")
        full, default = (cw.load_pictures(samples, side, fit="squash") for side in (FULL, DEFAULT))
        ways: dict[str, Callable[[], object]] = {
            "ImageFolder + DataLoader, 2 workers": peer_epoch(folder),
            f"clearwing, decoding once to {FULL} px": lambda: cw.load_pictures(samples, FULL, fit="squash"),
            f"clearwing, an epoch after that, kept at {FULL} px": our_epoch(full),
            f"clearwing, an epoch after that, kept at {DEFAULT} px (the default)": our_epoch(default),
        }
        if torch.cuda.is_available():
            ways[f"clearwing, kept at {FULL} px, augmented on the GPU"] = our_epoch(full, "cuda")
        show(f"An epoch of {len(samples)} pictures", len(samples), alternate(ways, args.rounds))
    precision = "bfloat16" if has_bfloat16() else "float32"
    print(f"\nShare of an epoch that resnet14 waits for its pictures, {SIZE} px, batch {BATCH}, {precision}:")
    for ahead in (0, 1):
        print(f"{ahead} batches ahead: {waiting(full, ahead):.1%}", flush=True)


if __name__ == "__main__":
    main()
