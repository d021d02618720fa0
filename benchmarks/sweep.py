"""The curve of IoU against the threshold, by histogram and by a loop over thresholds, in one run.

    python benchmarks/sweep.py [--maps 1000] [--size 256] [--rounds 3]

Maps are smooth noise, scaled to [0, 1], as a CAM is after upsampling; truths are other smooth noise, cut. All ways give
the IoU of every picture at every threshold, from float32 maps and bool truths that lie in memory. The loop compares and
counts, and takes a few maps through all thresholds before the next few, so that they stay in the cache. Printed too is
how far the curves lie apart: by a pixel, where a score is a threshold but for rounding.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import alternate, environment, show
from torch import Tensor

from clearwing.measure.curves import max_box_accuracy, threshold_curve
from clearwing.measure.overlap import box_of

STEPS, FINE, FEW = 100, 1000, 16


def noise(count: int, size: int, cells: int) -> Tensor:
    """Smooth maps (N, H, W), each from 0 to 1."""
    maps = F.interpolate(torch.rand(count, 1, cells, cells), (size, size), mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


def loop(maps: Tensor, truth: Tensor) -> Tensor:
    """The IoU of each picture at each of the thresholds 0, 1/100, ..., 1: (N, 101)."""
    rows = []
    for few, true in zip(maps.split(FEW), truth.split(FEW), strict=True):
        masks = (few >= k / STEPS for k in range(STEPS + 1))
        ious = [(mask & true).sum((1, 2)) / (mask | true).sum((1, 2)) for mask in masks]
        rows.append(torch.stack(ious, 1))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    environment(args.rounds)
    torch.manual_seed(0)
    maps, truth = noise(args.maps, args.size, 8), noise(args.maps, args.size, 5) > 0.6
    ways = {
        f"a loop over {STEPS + 1} thresholds": lambda: loop(maps, truth),
        f"threshold_curve, {STEPS + 1} thresholds": lambda: threshold_curve(maps, truth, bins=STEPS).iou,
        f"threshold_curve, {FINE + 1:,} thresholds": lambda: threshold_curve(maps, truth, bins=FINE).iou,
        "the same, raw maps": lambda: threshold_curve(maps, truth, bins=FINE, normalise=True).iou,
    }
    seconds = alternate(ways, args.rounds)
    show(f"IoU at every threshold, {args.maps:,} maps of {args.size} px", args.maps, seconds)
    print("\nseconds: " + ", ".join(f"{value:.2f}" for value in seconds.values()))
    apart = (loop(maps, truth) - threshold_curve(maps, truth, bins=STEPS).iou).abs().max()
    print(f"largest difference of an IoU: {float(apart):.1e}")

    few = min(args.maps, 200)
    boxes = box_of(truth[:few])
    way = {"max_box_accuracy, 100 thresholds": lambda: max_box_accuracy(maps[:few], boxes)}
    show(f"MaxBoxAcc and MaxBoxAccV2, {few} maps of {args.size} px", few, alternate(way, args.rounds))


if __name__ == "__main__":
    main()
