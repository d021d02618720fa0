"""Memory and speed of a stream of sharded Parquet, for a small and a ten times larger set, in one run.

    python benchmarks/stream.py [--sizes 2000 20000] [--buffer 1000] [--ahead 2]

The demo pictures (192 px, JPEG) are repeated, written as shards, and read for one epoch each in a process of its own:
random resized crops from 112 to 96 px, batch 128. Beside the stream stands the cache in memory, decoding included.
Peak memory is that of the process, less its peak after the imports and one batch of two pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import environment
from PIL import Image

import clearwing as cw
from clearwing.data import synthetic
from clearwing.data.loader import epoch_order
from clearwing.data.shards import write_shards
from clearwing.data.sources import Sample
from clearwing.data.stream import open_stream

CACHED, SIZE, BATCH = 112, 96, 128


def peak() -> float:
    """MiB, the most that this process has had (Linux; `ru_maxrss` would count the parent's too)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def one_epoch(way: str, folder: str, buffer: int, ahead: int) -> dict[str, float]:
    """Pictures per second, and MiB at the most above those of the imports and a first batch."""
    augment = cw.Augment(resized_crop=(0.35, 1.0), size=SIZE, flip=0.5)
    next(open_stream(folder, size=CACHED, buffer=2).batches(2, augment=augment))
    before, began = peak(), time.perf_counter()
    if way == "stream":
        data = open_stream(folder, size=CACHED, buffer=buffer)
        batches = data.batches(BATCH, augment=augment, ahead=ahead)
    else:
        samples = cw.open_data(folder, val_fraction=0).split("train")
        pictures = cw.load_pictures(samples, CACHED, fit="squash")
        batches = pictures.batches(BATCH, order=epoch_order(len(pictures), 0, 0), augment=augment, ahead=ahead)
    count = sum(len(batch) for batch in batches)
    return {"pictures": count, "per second": count / (time.perf_counter() - began), "MiB": peak() - before}


def write(folder: Path, count: int) -> None:
    images, labels, _ = synthetic.draw_split("train", 500, size=192)
    encoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    samples = [Sample(f"{i:06d}.jpg", encoded[i % 500], int(labels[i % 500])) for i in range(count)]
    write_shards(samples, folder, class_names=synthetic.CLASS_NAMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--buffer", type=int, default=1000)
    parser.add_argument("--ahead", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help="one epoch in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_epoch(*args.one, args.buffer, args.ahead)))
        return
    environment()
    print(f"buffer of {args.buffer} pictures, {args.ahead} batches ahead")
    print("\n| way | pictures | on disk, MiB | peak memory, MiB | pictures/s |\n|---|---|---|---|---|")
    for count in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), count)
            disk = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
            for way in ("stream", "cache in memory"):
                command = [sys.executable, __file__, "--one", way, folder]
                command += ["--buffer", str(args.buffer), "--ahead", str(args.ahead)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"| {way} | {count:,} | {disk:,.0f} | {found['MiB']:,.0f} | {found['per second']:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
