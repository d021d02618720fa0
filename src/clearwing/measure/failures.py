"""Why a mask missed its object, one cause a picture, and which right answers were given for a wrong reason."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clearwing.measure.overlap import Masks, counts, share
from clearwing.types import ClearwingError

CAUSES = ("empty map", "wrong class", "off the object", "too big", "too small")
"""What `causes` tells apart, in the order in which they take precedence."""

Flags = Tensor | Sequence[bool]
"""One yes or no a picture, (N,)."""


def causes(
    masks: Masks,
    truth: Masks,
    *,
    right_class: Flags | None = None,
    empty_map: Flags | None = None,
    limit: float = 0.5,
) -> list[str | None]:
    """Why each picture's IoU is below `limit`: one of `CAUSES`, or None where it is not below: (N,).

    Args:
        masks, truth: as for `iou`.
        right_class: whether the network named the picture's class; None: not known, so never the cause.
        empty_map: whether the map held no evidence (any `Status` but OK); None: as if all did.
        limit: the IoU from which on a mask is no failure.

    With P the share of the mask that lies on the object and R the share of the object that the mask covers, the first
    of these that holds:

    1. "empty map": the map held no evidence.
    2. "wrong class": the network named another class.
    3. "off the object": P < 1/2 and R < 1/2.
    4. "too big": P < R, so the mask has more pixels than the object.
    5. "too small": whatever else, so P >= R.

    P of an empty mask is 1 and R of an empty truth is 1: an empty mask is too small, and a mask where no object is too
    big. Pixels to ignore count nowhere.

    Raises ClearwingError as `iou` does, where there are not as many flags as pictures, and for a limit that is no IoU.

    >>> causes(torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 1]]]), torch.tensor([[[1, 0, 0, 0]], [[1, 0, 0, 0]]]))
    ['too big', 'off the object']
    """
    _check_limit(limit)
    both, claimed, true, _ = (count.double() for count in counts(masks, truth))
    failed = share(both, claimed + true - both) < limit
    precision, recall = share(both, claimed), share(both, true)
    never = torch.zeros_like(failed)
    rules = [
        never if empty_map is None else _flags(empty_map, "empty_map", failed),
        never if right_class is None else ~_flags(right_class, "right_class", failed),
        (precision < 0.5) & (recall < 0.5),
        precision < recall,
        ~never,
    ]  # in the order of CAUSES
    first = torch.stack(rules).int().argmax(0)
    return [CAUSES[i] if bad else None for i, bad in zip(first.tolist(), failed.tolist(), strict=True)]


def wrong_reason(iou: Tensor | Sequence[float], right_class: Flags, limit: float = 0.3) -> Tensor:
    """Which pictures are right for the wrong reason: the class is right and the IoU below `limit`. bool (N,).

    >>> wrong_reason([0.1, 0.1, 0.8], [True, False, True])
    tensor([ True, False, False])
    """
    _check_limit(limit)
    iou = torch.as_tensor(iou)
    if iou.ndim != 1 or not bool(((iou >= 0) & (iou <= 1)).all()):
        raise ClearwingError("iou", f"{tuple(iou.shape)}", "give one IoU from 0 to 1 a picture, (N,)")
    return _flags(right_class, "right_class", iou) & (iou < limit)


def _check_limit(limit: float) -> None:
    if not 0 <= limit <= 1:
        raise ClearwingError("limit", limit, "give an IoU from 0 to 1")


def _flags(flags: Flags, argument: str, like: Tensor) -> Tensor:
    flags = torch.as_tensor(flags)
    if flags.dtype != torch.bool or flags.shape != like.shape:
        mend = f"give one bool a picture, {tuple(like.shape)}"
        raise ClearwingError(argument, f"{flags.dtype} {tuple(flags.shape)}", mend)
    return flags.to(like.device)
