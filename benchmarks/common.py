"""What the benchmarks share: where they ran, ways in turn, and a table of them."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import clearwing as cw
from clearwing.jobs.environment import processor_name


def environment(rounds: int | None = None) -> None:
    """Print versions and processor, and how the figures below came to be where they are medians of rounds."""
    print(f"clearwing {cw.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    where = f"{processor_name()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        where += f"; {torch.cuda.get_device_name()}"
    print(where if rounds is None else f"{where}; medians of {rounds} rounds, alternating, after one warm-up")


def alternate(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            gc.collect()  # what the way before left in cycles is not this one's
            began = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_its_own_process(make: Callable[..., Callable[[], object]], *args: object) -> Callable[[], object]:
    """The way that `make(*args)` gives in a new process, so that nothing that clearwing sets in this one helps it."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=_serve, args=(there, make, args)).start()
    there.close()
    atexit.register(here.close)  # which ends it

    def way() -> None:
        here.send("run")
        here.recv()

    return way


def _serve(pipe: Any, make: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> None:
    way = make(*args)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        way()
        pipe.send("done")


def show(title: str, pictures: int, seconds: dict[str, float]) -> None:
    """One table; the ratio is to the first row, the usual way."""
    usual = next(iter(seconds.values()))
    print(f"\n{title}\n\n| way | pictures/s | ratio |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {pictures / value:,.0f} | {usual / value:.2f} |")
