"""What the processes of a group tell each other: sums, agreements, and that one of them is gone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from clearwing.train.processes import LOST, RESUME
from clearwing.types import ClearwingError

_LOST_WORDS = re.compile(r"gloo|NCCL|TCPStore|DistStore|[Cc]onnection (closed|reset|refused)|process group|barrier")


@contextlib.contextmanager
def one_fails_all_stop(fabric: Fabric) -> Iterator[None]:
    """Turn what a collective raises when another process is gone into one clear ClearwingError, with exit code 1.

    gloo raises as soon as the connection ends; NCCL may wait, and is ended by the process that watches
    (`in_processes`, torchrun, srun). A block that ends well leaves the group: no collective after it.
    """
    with others_may_end(fabric):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def others_may_end(fabric: Fabric) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed has no type of its own for this
        if fabric.world_size == 1 or not _LOST_WORDS.search(str(error)):
            raise
        what = str(error).splitlines()[0][:200]
        who = f"rank {fabric.global_rank} lost the others ({what})"
        raise ClearwingError(LOST, who, RESUME, exit_code=1) from error


def agreement(fabric: Fabric) -> Callable[[Sequence[float]], list[float]]:
    """A function of numbers that gives, in all processes, the largest that any of them put in at each place.

    So a flag is up for all where it is up for one, and clocks that differ decide the same. It is exact for float64
    and waits for no GPU.
    """
    return lambda numbers: _reduced(fabric, numbers, torch.distributed.ReduceOp.MAX)


def summed(fabric: Fabric, *scalars: Tensor | float) -> list[float]:
    """The sum over all processes of each scalar, in float64, in all of them."""
    return _reduced(fabric, scalars, torch.distributed.ReduceOp.SUM)


def _reduced(fabric: Fabric, scalars: Sequence[Tensor | float], how: Any) -> list[float]:
    numbers = torch.tensor([float(scalar) for scalar in scalars], dtype=torch.float64)
    if fabric.world_size > 1:
        torch.distributed.all_reduce(numbers, how)
    return numbers.tolist()


def everyone(fabric: Fabric, value: Any) -> list[Any]:
    """What each process has, in order of rank, in all processes; anything that can be pickled."""
    found: list[Any] = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(found, value)
    return found


def share(n: int, rank: int, world: int) -> range:
    """The contiguous part of `n` things that is one process's; the parts are equal to one thing, in order of rank.

    >>> [list(share(5, rank, 2)) for rank in (0, 1)]
    [[0, 1], [2, 3, 4]]
    """
    return range(n * rank // world, n * (rank + 1) // world)


def gathered(fabric: Fabric, rows: Tensor, n: int) -> Tensor:  # (len(share), ...) -> (n, ...)
    """The rows of all `n` things, in order and each once, in all processes; each gives those of its `share`."""
    rank, world = fabric.global_rank, fabric.world_size
    parts = [len(share(n, rank, world)) for rank in range(world)]
    if len(rows) != parts[rank]:
        raise ClearwingError("rows", len(rows), f"the share of rank {rank} of {world} is {parts[rank]} of {n}")
    if world == 1:
        return rows
    padded = rows.new_zeros(max(parts), *rows.shape[1:])  # a collective takes tensors of one shape
    padded[: len(rows)] = rows
    every = [torch.empty_like(padded) for _ in parts]
    torch.distributed.all_gather(every, padded)
    return torch.cat([part[:count] for part, count in zip(every, parts, strict=True)])


def whole_logits(fabric: Fabric, logits: Tensor, n: int, classes: int) -> Tensor:  # (len(share), K) -> (n, K)
    """The logits of all `n` pictures in order, in all processes, from each one's `share`; one without may give none."""
    return gathered(fabric, logits if len(logits) else logits.new_zeros(0, classes), n)
