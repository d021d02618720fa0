"""Pictures in chunks that fit a memory budget, whose size follows from what the first chunk took."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.attribution.modules import hooked
from clearwing.types import ClearwingError

BUDGET = 2.0**30
"""Bytes that one pass may take on a processor; on a GPU it is half of what is free."""
FIRST = 16
"""Pictures of the first chunk, where more are to come."""
GROWTH = 8
"""How many times as large as the first the others may be."""


def in_chunks(
    model: nn.Module,
    images: Tensor,
    chunk: int | None,
    memory: float | None,
    work: Callable[[slice, int], None],
) -> None:
    """Call work(part, most) for one slice of the images (N, C, H, W) after the other; `most` pictures fit in a pass.

    chunk: pictures in a slice. Without it, `memory` bytes (by default BUDGET) are divided by what one picture took in
    the first slice, as the outputs of the modules tell it: twice those that a graph may keep, and four times the
    largest, for what is under way.
    """
    _check(chunk, memory)
    n = len(images)
    budget = memory or _budget(images.device)
    # Before anything is known: 64 times a picture's own bytes, which a first layer of 64 channels at full size takes.
    size = chunk or max(1, min(FIRST, int(budget / (64 * images[0].numel() * images.element_size()))))
    start = 0
    while start < n:
        part = slice(start, min(start + size, n))
        if chunk is None and start == 0 and part.stop < n:
            sizes = _Sizes()
            leaves = [module for module in model.modules() if not any(True for _ in module.children())]
            with hooked(leaves, sizes.see), hooked([model], sizes.end):
                work(part, size)
            fits = int(budget * part.stop / (2 * sizes.kept + 4 * sizes.largest + 1))
            size = max(1, min(fits, GROWTH * size))  # functions that are no modules were not seen
        else:
            work(part, size)
        start = part.stop


class _Sizes:
    """Bytes of what the modules put out in this thread: all that had a graph in one pass, and the largest."""

    def __init__(self) -> None:
        self.kept, self.largest, self.of_this_pass, self.owner = 0, 0, 0, threading.get_ident()

    def see(self, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and threading.get_ident() == self.owner:
            size = output.numel() * output.element_size()
            self.of_this_pass += size if output.requires_grad else 0
            self.largest = max(self.largest, size)

    def end(self, *_: Any) -> None:  # of the pass: a method that makes many holds the graph of one at a time
        if threading.get_ident() == self.owner:
            self.kept, self.of_this_pass = max(self.kept, self.of_this_pass), 0


def _check(chunk: int | None, memory: float | None) -> None:
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ClearwingError("chunk", chunk, "give how many pictures to run at a time, at least 1")
    number = isinstance(memory, Real) and not isinstance(memory, bool)
    if memory is not None and not (number and isfinite(memory) and memory > 0):
        raise ClearwingError("memory", memory, "give the bytes that a pass may take, such as 2e9")


def _budget(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else BUDGET
