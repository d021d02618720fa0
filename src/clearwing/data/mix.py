"""Mixing the pictures of a batch in pairs, and their classes with them."""

from __future__ import annotations

from dataclasses import replace

import torch

from clearwing.types import Batch, ClearwingError


def mixed(batch: Batch, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, seed: int) -> Batch:
    """Each picture mixed with its neighbour in the batch; `targets` (N, K) are the shares of the classes.

    `mixup` (Zhang et al. 2018): x = lam x_i + (1 - lam) x_j, with lam drawn from Beta(alpha, alpha) once a batch and
    alpha the value given. `cutmix` (Yun et al. 2019): a box of 1 - lam of the area comes from x_j. With both, one of
    them is drawn for each batch; 0 is without. The first picture's neighbour is the last, so where processes share a
    batch each mixes within its own part. `labels` stay those of x_i.

    Raises ClearwingError where a value is negative or the batch has no labels.

    Example: `mixed(batch, 10, mixup=0.2, seed=0).targets`.
    """
    for argument, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise ClearwingError(argument, alpha, "give the alpha of Beta(alpha, alpha), or 0 for none")
    if not mixup and not cutmix:
        return batch
    if batch.labels is None:
        raise ClearwingError("labels", None, "pictures without labels cannot be mixed")
    from torchvision.transforms import v2  # here, because it takes its time to import

    ways = [
        kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha
    ]
    # torchvision draws from the global generator of the CPU, wherever the pictures are
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        way = ways[int(torch.randint(len(ways), ()))]
        images, targets = way(batch.images, batch.labels)
    images = images.contiguous(memory_format=torch.channels_last)  # as they came; rolled on a GPU they are not
    return replace(batch, images=images, targets=targets)
