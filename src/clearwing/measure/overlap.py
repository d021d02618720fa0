"""How well masks cover the truth, picture by picture, and how sure the mean is: IoU, Dice, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clearwing.types import FOREGROUND, IGNORE, ClearwingError

Masks = Tensor | Sequence[Any]
"""(N, H, W), one (H, W), or a list of N (H, W) of any sizes; tensors or arrays."""


def iou(masks: Masks, truth: Masks) -> Tensor:
    """Intersection over union of each picture: float32 (N,), in [0, 1].

    `masks` hold 0 and 1 (any dtype), `truth` 0, 1 and perhaps 255: pixels to ignore, which count nowhere. Where both
    are empty the IoU is 1: nothing was asked for and nothing was claimed.

    Raises ClearwingError where sizes differ, or values are others; a PNG's 0 and 255 go through `read_mask` first.

    >>> iou(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[1, 0, 0, 255]]]))
    tensor([0.5000])
    """
    both, claimed, true = _counts(masks, truth)
    return _share(both, claimed + true - both)


def dice(masks: Masks, truth: Masks) -> Tensor:
    """Dice coefficient, twice the intersection over the sum of both areas, (N,); conventions as in `iou`."""
    both, claimed, true = _counts(masks, truth)
    return _share(2 * both, claimed + true)


def bootstrap_interval(
    values: Tensor | Sequence[float], level: float = 0.95, n: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,), Efron 1979: (low, high).

    `n` times N values are drawn with replacement. One value alone gives an interval of no width.
    """
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
        raise ClearwingError("values", f"{tuple(values.shape)}", "give at least one finite number, as (N,)")
    if not 0 < level < 1:
        raise ClearwingError("level", level, "give a level between 0 and 1, such as 0.95")
    if n < 1:
        raise ClearwingError("n", n, "draw at least once")
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, 4_000_000 // len(values))  # bounds the memory to some 64 MB
    means = torch.cat(
        [
            values[torch.randint(len(values), (min(rows, n - start), len(values)), generator=generator)].mean(1)
            for start in range(0, n, rows)
        ]
    ).sort()[0]
    tail = (1 - level) / 2 * (n - 1)
    return float(means[int(tail)]), float(means[n - 1 - int(tail)])


def paired_interval(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    level: float = 0.95,
    n: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the mean of a - b, two scores (N,) of the same pictures; a beats b where low > 0."""
    a, b = torch.as_tensor(a, dtype=torch.float64).cpu(), torch.as_tensor(b, dtype=torch.float64).cpu()
    if a.shape != b.shape:
        raise ClearwingError("b", tuple(b.shape), f"give as many scores as a has, {tuple(a.shape)}")
    return bootstrap_interval(a - b, level, n, seed)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0)


def _counts(masks: Masks, truth: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels in both, in `masks`, in `truth`, those to ignore left out: three int64 (N,)."""
    given, wanted = _stacks(masks, "masks"), _stacks(truth, "truth")
    n, n_truth = sum(len(part) for part in given), sum(len(part) for part in wanted)
    if n != n_truth:
        raise ClearwingError("masks", f"{n} masks for {n_truth} truths", "give one mask for every truth")
    if len(given) != len(wanted):  # one side stacked, the other a list
        given, wanted = ([part[i : i + 1] for part in side for i in range(len(part))] for side in (given, wanted))
    counts = []
    for mask, true in zip(given, wanted, strict=True):
        if mask.shape != true.shape:
            sizes = " and ".join("x".join(map(str, part.shape[1:])) for part in (mask, true))
            raise ClearwingError("masks", f"mask and truth of sizes {sizes}", "bring both to one size; see restore")
        true = true.to(mask.device)
        seen = true != IGNORE
        mask, true = (mask == FOREGROUND) & seen, true == FOREGROUND
        counts.append(torch.stack([(mask & true).sum((1, 2)), mask.sum((1, 2)), true.sum((1, 2))]))
    both, claimed, true = torch.cat(counts, 1)
    return both, claimed, true


def _stacks(masks: Masks, argument: str) -> list[Tensor]:
    """One stack (N, H, W), or a list of N stacks (1, H, W), their values checked."""
    if isinstance(masks, Tensor) or hasattr(masks, "__array__"):
        stack = torch.as_tensor(masks)
        stacks = [stack[None] if stack.ndim == 2 else stack]
    else:
        stacks = [torch.as_tensor(mask)[None] for mask in masks]
    if not stacks:
        raise ClearwingError(argument, "[]", "give at least one mask")
    for part in stacks:
        if part.ndim != 3 or not part.numel():
            raise ClearwingError(argument, tuple(part.shape), "give masks (N, H, W), or a list of (H, W)")
    _check_values(stacks, argument)
    return stacks


def _check_values(stacks: list[Tensor], argument: str) -> None:
    allowed = (0, FOREGROUND) if argument == "masks" else (0, FOREGROUND, IGNORE)
    for part in stacks:
        if part.dtype == torch.bool:
            continue
        wrong = torch.ones_like(part, dtype=torch.bool)
        for value in allowed:
            wrong &= part != value
        if wrong.any():
            found = part[wrong][0].item()
            if found == IGNORE:
                mend = "a mask is bool or 0 and 1; read_mask reads a PNG's 0 and 255"
            else:
                mend = f"give {', '.join(map(str, allowed))} or bool; threshold a map first (see segment)"
            raise ClearwingError(argument, f"holds {found}", mend)
    pictures = [picture for part in stacks for picture in part]
    if (
        argument == "truth"
        and len(pictures) > 1
        and all(p.dtype != torch.bool and (p == IGNORE).any() and not (p == FOREGROUND).any() for p in pictures)
    ):
        mend = "255 means ignore, so every truth here is empty; read_mask reads a PNG's 0 and 255"
        raise ClearwingError(argument, "holds 0 and 255 alone", mend)
