"""Cost a picture and memory of `clearwing segment` for small and large sets, by both pipelines, in one run.

    python benchmarks/many.py RUN [--refine 1000 10000] [--decoder 1000 10000 100000] [--threads 1]

RUN is a trained run with a decoder. The pictures are the demo's (192 px, JPEG), repeated: a folder of links to 500
files. Every set is segmented by a process of its own, with a PNG for every picture, no masks to score; the time is that
of the whole call, from listing the folder to `segmentation.json`, imports left out. Peak memory is that of the process,
less its peak after the imports and the first 32 pictures. The last column is the cost a picture as a ratio to the first
row of the same pipeline: flat is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import environment
from PIL import Image
from stream import peak

from clearwing.config import SegmentConfig
from clearwing.data import synthetic
from clearwing.jobs.segment import segment

DRAWN, FIRST = 500, 32


def write(folder: Path, count: int) -> None:
    """A folder of `count` names for `DRAWN` pictures, in the classes' folders."""
    images, labels, _ = synthetic.draw_split("train", DRAWN, size=192)
    originals = []
    for i, image in enumerate(images):
        path = folder / "originals" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=90)
        originals.append(path)
    for name in synthetic.CLASS_NAMES:
        (folder / "pictures" / name).mkdir(parents=True)
    for i in range(count):
        name = synthetic.CLASS_NAMES[int(labels[i % DRAWN])]
        os.link(originals[i % DRAWN], folder / "pictures" / name / f"{i:06d}.jpg")


def one_set(run: str, folder: str, pipeline: str, threads: int) -> dict[str, float]:
    """Seconds of the whole call, and MiB at the most above those of a first small one."""
    torch.set_num_threads(threads)

    def call(out: Path, limit: int | None) -> int:
        config = SegmentConfig(
            run=run,
            data=f"{folder}/pictures",
            out=str(out),
            pipeline=pipeline,
            split="all",
            limit=limit,
            device="cpu",
            json=True,
        )
        return int(segment(config)["json"]["n"])

    call(Path(folder, f"{pipeline}-first"), FIRST)
    before, began = peak(), time.perf_counter()
    count = call(Path(folder, pipeline), None)
    return {"pictures": count, "seconds": time.perf_counter() - began, "MiB": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--refine", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--decoder", type=int, nargs="*", default=[1000, 10000, 100000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "PIPELINE"), help="one set in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_set(args.run, *args.one, args.threads)))
        return
    torch.set_num_threads(args.threads)
    environment()
    print("\n| pipeline | pictures | ms a picture | pictures/s | peak memory, MiB | cost, to the first |")
    print("|---|---|---|---|---|---|")
    firsts: dict[str, float] = {}
    for pipeline, sizes in (("refine", args.refine), ("decoder", args.decoder)):
        for count in sizes:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), count)
                command = [sys.executable, __file__, args.run, "--one", folder, pipeline]
                command += ["--threads", str(args.threads)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            cost = found["seconds"] / found["pictures"]
            first = firsts.setdefault(pipeline, cost)
            print(
                f"| {pipeline} | {found['pictures']:,.0f} | {cost * 1000:.1f} | {1 / cost:,.0f} | {found['MiB']:,.0f} "
                f"| {cost / first:.2f} |",
                flush=True,
            )
    if len(firsts) == 2:
        print(f"\nthe decoder is {firsts['refine'] / firsts['decoder']:.1f} times faster a picture than refine")


if __name__ == "__main__":
    main()
