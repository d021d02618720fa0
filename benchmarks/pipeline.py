"""A training step beside the plain loop's, in one run: ratios hold, seconds are this machine's.

    python benchmarks/pipeline.py [--rounds 5]

Ways alternate, after a warm-up; printed are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import alternate, environment, show
from torch import nn

import clearwing as cw
from clearwing.train.devices import has_bfloat16

SIZE, BATCH = 128, 32


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
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    environment(args.rounds)
    show("A training step, resnet14, 128 px, batch 32", BATCH, training(args.rounds))


if __name__ == "__main__":
    main()
