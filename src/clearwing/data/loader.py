"""Decode every picture once into a uint8 cache, then build batches from it on the device."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clearwing.data.augment import Draw, seed_of, unit
from clearwing.data.preprocess import QuietPillow, fit_geometry, fit_picture, read_picture, square
from clearwing.data.sources import Sample, cache_home
from clearwing.types import Batch, ClearwingError, Geometry

MEMORY = 2 * 2**30
"""A cache of more bytes than this is a memory-mapped file; one of fewer may stay on the GPU."""
TASK = 32
"""Pictures that one thread takes at a time."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Decoded pictures of one size, ready to be batched. `load_pictures` makes them.

    `images` is uint8 (N, C, H, W), laid out channels last; past a stated size it is a file mapped into memory, which
    lives as long as the tensor.
    """

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor | None  # (N,) int64; None where a picture has no label
    samples: tuple[Sample, ...]  # N
    geometry: tuple[Geometry, ...]  # N
    skipped: tuple[tuple[str, str], ...] = ()  # (key, reason) of the pictures that could not be read
    _resident: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sample.key for sample in self.samples)

    def subset(self, which: int | Sequence[int] | Tensor) -> Pictures:
        """The pictures at these positions, or so many of them, evenly spread (all classes stay, in sorted data)."""
        index = spread(len(self), which) if isinstance(which, int) else [int(i) for i in which]
        at = torch.tensor(index, dtype=torch.int64)
        return Pictures(
            self._pixels[at].permute(0, 3, 1, 2),
            None if self.labels is None else self.labels[at],
            tuple(self.samples[i] for i in index),
            tuple(self.geometry[i] for i in index),
            self.skipped,
        )

    def batches(
        self,
        batch_size: int,
        *,
        device: Any = "cpu",
        order: Tensor | None = None,
        augment: Callable[[Tensor, Draw], Tensor] | None = None,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        ahead: int = 0,
    ) -> Iterator[Batch]:
        """One pass over the pictures: float32 images in [0, 1] on the device, channels last.

        `order` holds positions of pictures (see `epoch_order`), None is all as they lie; batch b is its slice
        b * batch_size : (b + 1) * batch_size. `augment` is called as `augment(images (n, C, H, W) uint8, draw)`; what
        is drawn depends on `seed`, `epoch` and b alone, so `start` can skip the first batches. An augmented batch has
        no geometry, for there is no way back.

        `part` is (rank, world): each of so many processes takes its equal share of each batch, and what is left over
        in the last batch is left out. `ahead` batches are made beforehand in a thread. On CUDA a small set stays on
        the device after the first pass.

        Example: `for batch in pictures.batches(128, order=epoch_order(len(pictures), seed, epoch), ahead=2): ...`
        """
        check_batches(batch_size, start, part, ahead)
        rank, world = part
        order = torch.arange(len(self)) if order is None else order.cpu()
        if len(order) and not 0 <= int(order.min()) <= int(order.max()) < len(self):
            found = f"{int(order.min())} to {int(order.max())}"
            raise ClearwingError("order", found, f"the positions of {len(self)} pictures are 0 to {len(self) - 1}")
        place = torch.device(device)

        def make() -> Iterator[Batch]:
            whole = order.split(batch_size) if len(order) else ()
            for b, index in enumerate(whole[start:], start):
                share = len(index) // world
                if share == 0 or (drop_last and len(index) < batch_size):
                    return
                generator = torch.Generator(place).manual_seed(seed_of(seed, epoch, b))
                own = index[rank * share : (rank + 1) * share]
                yield self._batch(Draw(generator, len(index), rank * share, own, epoch, seed), place, augment)

        return made_ahead(make(), ahead, place)

    def _batch(self, draw: Draw, device: torch.device, augment: Callable[[Tensor, Draw], Tensor] | None) -> Batch:
        pixels = self._on(device)
        if pixels.is_cuda:
            picked = pixels.index_select(0, draw.index.to(pixels.device, non_blocking=True))  # (n, H, W, C) uint8
        else:  # torch would wake all its threads for a copy that one does as fast, and wait for them
            picked = torch.from_numpy(pixels.numpy().take(draw.index.numpy(), 0))
        labels = None if self.labels is None else self.labels[draw.index]
        positions = draw.index.tolist()
        keys, geometry = tuple(self.samples[i].key for i in positions), tuple(self.geometry[i] for i in positions)
        return make_batch(picked, labels, keys, geometry, draw, device, augment)

    @property
    def _pixels(self) -> Tensor:  # (N, H, W, C), as it lies in memory
        return self.images.permute(0, 2, 3, 1)

    def _on(self, device: torch.device) -> Tensor:
        """The pixels on the device where they fit there easily, otherwise where they are."""
        if device.type != "cuda" or self.images.nbytes > MEMORY:
            return self._pixels
        if device not in self._resident:
            if self.images.nbytes * 4 > torch.cuda.mem_get_info(device)[0]:
                return self._pixels
            self._resident[device] = self._pixels.to(device)
        return self._resident[device]

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, in [0, 1]; exact, by counting the 256 values."""
        C = self.images.shape[1]
        counts = torch.zeros(C, 256, dtype=torch.int64)
        for part in self._pixels.split(256):
            flat = part.reshape(-1, C)
            counts += torch.stack([torch.bincount(flat[:, c], minlength=256) for c in range(C)])
        share = counts.double() / counts.sum(1, keepdim=True)
        value = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ value
        variance = (share * (value - mean[:, None]) ** 2).sum(1)
        return tuple(mean.tolist()), tuple(variance.sqrt().tolist())

    def class_counts(self, num_classes: int) -> Tensor:
        """Pictures of each class, (num_classes,) int64."""
        if self.labels is None:
            raise ClearwingError("labels", None, "these pictures have no labels")
        return torch.bincount(self.labels, minlength=num_classes)


def check_batches(batch_size: int, start: int, part: tuple[int, int], ahead: int) -> None:
    """Refuse what `batches` cannot do."""
    rank, world = part
    if not 0 <= rank < world:
        raise ClearwingError("part", part, "give (rank, world) with 0 <= rank < world")
    if batch_size < 1 or batch_size % world:
        mend = "give at least 1" if world == 1 else f"give {world}, the number of processes, or a multiple of it"
        raise ClearwingError("batch_size", batch_size, mend)
    for argument, value in (("start", start), ("ahead", ahead)):
        if value < 0:
            raise ClearwingError(argument, value, "give 0 or more batches")


def make_batch(
    pixels: Tensor,
    labels: Tensor | None,
    keys: tuple[str, ...],
    geometry: tuple[Geometry, ...],
    draw: Draw,
    device: torch.device,
    augment: Callable[[Tensor, Draw], Tensor] | None,
) -> Batch:
    """uint8 pictures (n, H, W, C) as a Batch on the device; augmented, or with their geometry."""
    if pixels.device.type != device.type:
        pixels = (pixels.pin_memory() if device.type == "cuda" else pixels).to(device, non_blocking=True)
    images = pixels.permute(0, 3, 1, 2)
    if augment is not None:
        images, geometry = augment(images, draw), ()
    labels = None if labels is None else labels.to(device, non_blocking=True)
    return Batch(unit(images).contiguous(memory_format=torch.channels_last), labels, keys, geometry)


def made_ahead(items: Iterator[T], count: int, device: torch.device | None = None) -> Iterator[T]:
    """The items in their order, `count` of them made beforehand in a thread that works for this device; 0 for none.

    What is raised in the thread is raised here in its turn. Leaving the iterator ends the thread once it is done with
    the item in hand.
    """
    if count == 0:
        yield from items
        return
    setup = None
    if device is not None and device.type == "cuda":  # a thread begins on the first device, another process's perhaps
        index = torch.cuda.current_device() if device.index is None else device.index
        setup = partial(torch.cuda.set_device, index)
    thread = ThreadPoolExecutor(1, "clearwing-ahead", setup)
    end = object()
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        # not waited for: a garbage collection in that very thread may be what closes this generator
        thread.shutdown(wait=False, cancel_futures=True)


def epoch_order(n: int, seed: int, epoch: int, *, labels: Tensor | None = None, balanced: bool = False) -> Tensor:
    """The positions (n,) of one epoch, drawn from seed and epoch alone.

    A permutation; or, `balanced` by labels (n,), as many of each class that occurs, to one picture: a class gives all
    its pictures before it gives one again, and where it has too many, some are left out of this epoch.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    if not balanced:
        return torch.randperm(n, generator=generator)
    if labels is None or len(labels) != n:
        raise ClearwingError("labels", None if labels is None else f"{len(labels)} of them", f"balancing needs {n}")
    sizes = labels.unique(return_counts=True)[1]
    classes = labels.argsort(stable=True).split(sizes.tolist())  # the positions of each
    one_more = set(torch.randperm(len(classes), generator=generator)[: n % max(len(classes), 1)].tolist())
    drawn = []
    for k, own in enumerate(classes):
        wanted = n // len(classes) + (k in one_more)
        rounds = [torch.randperm(len(own), generator=generator) for _ in range(-(-wanted // len(own)))]
        drawn.append(own[torch.cat(rounds)[:wanted]])
    return torch.cat(drawn)[torch.randperm(n, generator=generator)]


def spread(length: int, count: int) -> list[int]:
    """`count` positions spread evenly over `length`, or all: what `--limit` takes, so that sorted classes all stay."""
    if count < 1:
        raise ClearwingError("limit", count, "give at least 1 picture")
    count = min(count, length)
    return [i * length // count for i in range(count)]


def load_pictures(
    samples: Sequence[Sample],
    size: int | Sequence[int],
    *,
    fit: str = "crop",
    channels: int = 3,
    memory: int = MEMORY,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    empty: bool = False,
) -> Pictures:
    """Decode the samples once to uint8 pictures of one size (a side or (H, W)), with threads.

    `fit` says how a picture meets the size: squash, crop or pad (`fit_picture`). A cache of more than `memory` bytes is
    a nameless file in `cache_dir` (by default the cache folder of Clearwing), gone with the process. `progress` is
    called with the number done and the total. A picture that cannot be read is passed over and listed in `skipped`.

    Raises ClearwingError where there is no sample, where none can be read (unless `empty`, for one part of many), or
    where the disk is too small.
    """
    common: dict[str, Any] = {"memory": memory, "cache_dir": cache_dir, "workers": workers, "progress": progress}
    return load_sizes(samples, [size], fit=fit, channels=channels, empty=empty, **common)[0]


def load_sizes(
    samples: Sequence[Sample],
    sizes: Sequence[int | Sequence[int]],
    *,
    fit: str = "crop",
    channels: int = 3,
    memory: int = MEMORY,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    empty: bool = False,
) -> tuple[Pictures, ...]:
    """The same pictures in several sizes, each of them decoded once; otherwise as `load_pictures`. Equal sizes are the
    same Pictures."""
    if not samples:
        raise ClearwingError("samples", "[]", "there is no picture to load")
    if channels not in (1, 3):
        raise ClearwingError("channels", channels, "choose 1 (grey) or 3 (RGB)")
    for size in sizes:
        fit_geometry(1, 1, size, fit)  # a wrong setting is no fault of the pictures
    shapes = list(dict.fromkeys(square(size) for size in sizes))
    pixels = {shape: _cache((len(samples), *shape, channels), memory, cache_dir) for shape in shapes}
    geometry: dict[tuple[int, int], list[Geometry | None]] = {shape: [None] * len(samples) for shape in shapes}
    skipped: dict[int, str] = {}

    def decode(start: int) -> int:
        part = range(start, min(start + TASK, len(samples)))
        for i in part:
            try:
                picture = read_picture(samples[i].source, channels)
            except ClearwingError as error:
                skipped[i] = error.mend
                continue
            for shape in shapes:
                fitted, geometry[shape][i] = fit_picture(picture, shape, fit)
                pixels[shape][i] = fitted.permute(1, 2, 0)
        return len(part)

    starts = range(0, len(samples), TASK)
    workers = min(workers or cores(), len(starts))
    with QuietPillow(), ThreadPoolExecutor(max(1, workers)) as pool:
        done = 0
        try:
            for count in pool.map(decode, starts) if workers > 1 else map(decode, starts):
                done += count
                if progress is not None:
                    progress(done, len(samples))
        finally:  # Ctrl-C must not wait for the pictures that are still to come
            pool.shutdown(cancel_futures=True)
    if len(skipped) == len(samples) and not empty:
        raise ClearwingError("pictures", samples[0].key, f"none of {len(samples)} can be read: {skipped[0]}")
    found = {shape: _kept(samples, pixels[shape], geometry[shape], skipped) for shape in shapes}
    return tuple(found[square(size)] for size in sizes)


def _kept(
    samples: Sequence[Sample], pixels: Tensor, geometry: Sequence[Geometry | None], skipped: dict[int, str]
) -> Pictures:
    """Those that could be read, of pixels (N, H, W, C), whose gaps are closed in place: they may be larger than the
    memory."""
    kept = [i for i in range(len(samples)) if i not in skipped]
    for place, i in enumerate(kept[min(skipped) :] if skipped else (), start=min(skipped, default=0)):
        pixels[place] = pixels[i]
    labels = [samples[i].label for i in kept]
    known = [label for label in labels if label is not None]
    return Pictures(
        pixels[: len(kept)].permute(0, 3, 1, 2),
        torch.tensor(known, dtype=torch.int64) if len(known) == len(labels) else None,
        tuple(samples[i] for i in kept),
        tuple(place for place in geometry if place is not None),
        tuple((samples[i].key, skipped[i]) for i in sorted(skipped)),
    )


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache(shape: tuple[int, int, int, int], memory: int, cache_dir: str | Path | None) -> Tensor:
    """An empty uint8 (N, H, W, C) in memory or, past `memory` bytes, in a file that has no name any more."""
    needed = math.prod(shape)
    if needed <= memory:
        return torch.empty(shape, dtype=torch.uint8)
    folder = cache_home() if cache_dir is None else Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ClearwingError(
            "cache_dir",
            folder,
            f"{needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} free: name another or a smaller size",
        )
    with tempfile.TemporaryFile(dir=folder, prefix="clearwing-") as file:
        return torch.from_numpy(np.memmap(file, np.uint8, mode="w+", shape=shape))
