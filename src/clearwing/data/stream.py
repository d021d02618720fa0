"""Data sets larger than memory: sharded Parquet, read a row group at a time through a shuffle buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clearwing.data.augment import Draw, seed_of
from clearwing.data.loader import Pictures, check_batches, cores, load_pictures, made_ahead, make_batch, spread
from clearwing.data.preprocess import QuietPillow, fit_geometry, fit_picture, read_picture, square
from clearwing.data.rows import BUFFER, PART
from clearwing.data.shards import Listing, RowGroup, held_out, list_shards, number_labels, shard_files
from clearwing.data.sources import Sample, parquet_splits, read_classes
from clearwing.types import Batch, ClearwingError, Geometry


@dataclass(slots=True)
class _Row:
    """One picture, not decoded; while `source` is None not even read."""

    group: RowGroup
    at: int  # in its group
    source: Path | bytes | None = None
    label: int = -1

    @property
    def number(self) -> int:  # in the split
        return self.group.first + self.at


@dataclass(frozen=True, eq=False)
class Stream:
    """Pictures that are read anew every epoch, in memory that does not grow with their number. `open_stream` makes it.

    It has what training uses of `Pictures`. At any time it holds `buffer` pictures as they lie in the files, not
    decoded, a few rows more, and the batches under way.
    """

    name: str
    split: str
    splits: tuple[str, ...]  # all that the files name
    class_names: tuple[str, ...]
    size: tuple[int, int]  # (H, W)
    fit: str
    channels: int
    buffer: int
    workers: int | None
    holdout: float
    seed: int
    notes: tuple[str, ...]
    _root: Path = field(repr=False)
    _groups: tuple[RowGroup, ...] = field(repr=False)
    _numbers: dict[Any, int] = field(repr=False)  # what the label column holds -> class
    _counts: Tensor = field(repr=False)  # (K,) int64
    _skipped: dict[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return sum(group.rows - group.held for group in self._groups)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(key, reason) of the pictures that this process met and could not read, each once."""
        return tuple(sorted(self._skipped.items()))

    def class_counts(self, num_classes: int) -> Tensor:
        """Pictures of each class, (num_classes,) int64; from the column of labels alone."""
        return F.pad(self._counts, (0, max(0, num_classes - len(self._counts))))

    def mean_std(self, sample: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in [0, 1], over `sample` pictures of up to 64 row groups.

        Which ones depends on the seed alone. Of these pictures it is exact; it is of all where there are no more.
        """
        groups = self._groups
        if sample < len(self) and len(groups) > 64:
            groups = tuple(Random(self.seed).sample(groups, 64))
        return self._load(groups, sample, self.size, held=False).mean_std()

    def some(self, limit: int | None = None, size: int | Sequence[int] | None = None) -> Pictures:
        """Up to `limit` pictures of the stream, evenly spread over it, decoded into memory at `size` (or the stream's).

        Reads every row group that one of them lies in.
        """
        return self._load(self._groups, limit, size or self.size, held=False)

    def held_out(self, limit: int | None = None, size: int | Sequence[int] | None = None) -> Pictures:
        """The same of the pictures that were held out, which the stream never gives: for validation."""
        if not self.holdout:
            raise ClearwingError("holdout", self.holdout, "open the stream with a share to hold out")
        return self._load(self._groups, limit, size or self.size, held=True)

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
        """One pass in an order of its own: float32 images in [0, 1] on the device, as `Pictures.batches` gives them.

        The row groups of all shards come in an order drawn from (seed, epoch), one after another; their rows go through
        the shuffle buffer, and so into batches; every picture comes once. The first `start` batches are neither read
        nor decoded. With `part=(rank, world)` all processes draw the same order and read the same rows; each
        decodes its own share of every batch.

        A picture that cannot be read is listed in `skipped`. The next one of its batch that can be read takes its
        place, so that batches and steps stay what they are, whatever the number of processes.

        Raises ClearwingError where an order is given, and under way where a file cannot be read, or no picture of a
        whole batch can.
        """
        if order is not None:
            raise ClearwingError("order", "given", "a stream draws its own; leave it out")
        check_batches(batch_size, start, part, ahead)
        rank, world = part
        place = torch.device(device)

        def make() -> Iterator[Batch]:
            rows = self._shuffled(seed, epoch, start * batch_size)
            b = start
            with ThreadPoolExecutor(self.workers or cores(), "clearwing-decode") as pool:
                while batch := list(islice(rows, batch_size)):
                    share = len(batch) // world
                    if share == 0 or (drop_last and len(batch) < batch_size):
                        return
                    pixels, shown, geometry = self._decode(batch, rank * share, share, pool)
                    generator = Generator(place).manual_seed(seed_of(seed, epoch, b))
                    index = torch.tensor([row.number for row in shown])
                    draw = Draw(generator, len(batch), rank * share, index, epoch, seed)
                    labels = torch.tensor([row.label for row in shown])
                    keys = tuple(self._key(row) for row in shown)
                    yield make_batch(pixels, labels, keys, geometry, draw, place, augment)
                    b += 1

        return made_ahead(make(), ahead, place)

    def _key(self, row: _Row) -> str:
        return f"{self.split}/{row.number:06d}"

    def _rows(self, group: RowGroup, held: bool = False) -> np.ndarray:
        """The rows of a group that are given, or those that are held out; ascending."""
        return np.flatnonzero(held_out(group.first, group.rows, self.holdout, self.seed) == held)

    def _read(self, group: RowGroup, rows: np.ndarray) -> Iterator[_Row]:
        """These rows of a group (ascending), read one after another."""
        import pyarrow as pa
        from pyarrow import parquet

        picture, label = group.columns
        before = 0
        try:
            with parquet.ParquetFile(group.path, buffer_size=BUFFER, pre_buffer=False) as file:
                for part in file.iter_batches(PART, row_groups=[group.number], columns=list(group.columns)):
                    here = _between(rows, before, len(part))
                    before += len(part)
                    some = part.take(pa.array(here))
                    held = zip(here.tolist(), some[picture].to_pylist(), some[label].to_pylist(), strict=True)
                    for at, source, value in held:
                        at += before - len(part)
                        yield _Row(group, at, self._source(source), self._numbers[value])
        except (pa.ArrowException, OSError) as error:
            raise ClearwingError("data", group.path, f"cannot be read as Parquet ({error})", exit_code=1) from error

    def _source(self, held: Any) -> Path | bytes:  # the bytes of a file, or where it lies
        if isinstance(held, bytes):
            return held
        held = held or {}
        return held["bytes"] if held.get("bytes") is not None else self._root / (held.get("path") or "missing")

    def _shuffled(self, seed: int, epoch: int, skip: int) -> Iterator[_Row]:
        """The rows of an epoch in their order, without the first `skip` of them."""
        draw = Random(seed_of(seed, epoch))
        groups = list(self._groups)
        draw.shuffle(groups)
        held: list[_Row] = []
        drawn = 0
        for group in groups:
            rows = self._rows(group)
            needed = drawn + len(rows) > skip  # before that, where a row lies says enough
            for row in self._read(group, rows) if needed else (_Row(group, at) for at in rows.tolist()):
                if len(held) < self.buffer:
                    held.append(row)
                    continue
                i = draw.randrange(self.buffer)
                row, held[i] = held[i], row
                drawn += 1
                if drawn > skip:
                    if row.source is None:
                        self._fill([row, *held])
                    yield row
        draw.shuffle(held)
        held = held[max(0, skip - drawn) :]
        self._fill(held)
        yield from held

    def _fill(self, rows: Sequence[_Row]) -> None:
        """Read those rows that are not read yet."""
        unread: dict[RowGroup, dict[int, _Row]] = {}
        for row in rows:
            if row.source is None:
                unread.setdefault(row.group, {})[row.at] = row
        for group, wanted in unread.items():
            for found in self._read(group, np.array(sorted(wanted))):
                wanted[found.at].source, wanted[found.at].label = found.source, found.label

    def _decode(
        self, batch: Sequence[_Row], first: int, count: int, pool: ThreadPoolExecutor
    ) -> tuple[Tensor, tuple[_Row, ...], tuple[Geometry, ...]]:
        """The pictures of a batch from `first` on, uint8 (count, H, W, C), whose they are and how they came there."""
        pixels = torch.empty((count, *self.size, self.channels), dtype=torch.uint8)

        def decode(i: int) -> tuple[_Row, Geometry]:
            for row in (*batch[first + i :], *batch[: first + i]):
                try:
                    picture = read_picture(row.source or b"", self.channels)
                except ClearwingError as error:
                    self._skipped[self._key(row)] = error.mend
                    continue
                fitted, geometry = fit_picture(picture, self.size, self.fit)
                pixels[i] = fitted.permute(1, 2, 0)
                return row, geometry
            key = self._key(batch[first + i])
            mend = f"none of its batch of {len(batch)} can be read: {self._skipped[key]}"
            raise ClearwingError("pictures", key, mend, exit_code=1)

        with QuietPillow():
            shown, geometry = zip(*pool.map(decode, range(count)), strict=True)
        return pixels, shown, geometry

    def _load(self, groups: Sequence[RowGroup], limit: int | None, size: int | Sequence[int], held: bool) -> Pictures:
        counts = [group.held if held else group.rows - group.held for group in groups]
        chosen = np.array(spread(sum(counts), limit or sum(counts) or 1), dtype=np.int64)
        samples: list[Sample] = []
        before = 0
        for group, count in zip(groups, counts, strict=True):
            here = _between(chosen, before, count)
            before += count
            if len(here):
                rows = self._read(group, self._rows(group, held)[here])
                samples += [Sample(self._key(row), row.source or b"", row.label) for row in rows]
        pictures = load_pictures(samples, size, fit=self.fit, channels=self.channels, workers=self.workers)
        self._skipped.update(pictures.skipped)
        return pictures


def _between(places: np.ndarray, before: int, count: int) -> np.ndarray:
    """Those of the places that lie in the `count` after `before`, counted from there."""
    return places[(places >= before) & (places < before + count)] - before


def open_stream(
    where: str | Path,
    split: str = "train",
    *,
    size: int | Sequence[int],
    fit: str = "squash",
    channels: int = 3,
    classes: Sequence[str] | str | Path | None = None,
    buffer: int = 4096,
    workers: int | None = None,
    holdout: float = 0.0,
    seed: int = 0,
) -> Stream:
    """Open a Parquet file, or a folder of shards, in the schema of a Hugging Face image data set.

    Reads the metadata and the column of labels, and no picture. Splits, columns and class names are found as
    `open_data` finds them; a picture's key is `split/number`. `size` (a side or (H, W)), `fit` and `channels` are those
    of `load_pictures`, `classes` the class names in their order. So many pictures as `buffer` says are shuffled among
    each other. A share `holdout` of the pictures, drawn by `seed`, is held out for `Stream.held_out`.

    Raises ClearwingError where there is no Parquet file, no such split, no picture, or a picture without a label.

    Example: `open_stream("shards", size=160, holdout=0.02).batches(128, augment=cw.Augment(flip=0.5), ahead=2)`.
    """
    for argument, value, good, mend in (
        ("channels", channels, channels in (1, 3), "choose 1 (grey) or 3 (RGB)"),
        ("buffer", buffer, buffer >= 1, "give at least 1 picture"),
        ("holdout", holdout, 0 <= holdout < 1, "give a share from 0 to below 1"),
    ):
        if not good:
            raise ClearwingError(argument, value, mend)
    fit_geometry(1, 1, size, fit)  # refuses a wrong size or fit
    path, notes = Path(where), list[str]()
    root = path.parent if path.is_file() else path
    split_of = parquet_splits(shard_files(path), root, notes)
    splits = tuple(name for name in ("train", "val", "test") if name in split_of.values())
    if split not in splits:
        raise ClearwingError("split", split, f"{path.name} has {', '.join(splits)}")
    own, others = ([file for file in split_of if (split_of[file] == split) is same] for same in (True, False))
    found = list_shards(own, holdout, seed)
    class_names, numbers, counts = _classes(found, others, read_classes(classes), f"{path.name}/{split}")
    if (longest := max(group.rows for group in found.groups)) > buffer:
        notes.append(f"row groups of {longest} pictures are mixed less well by a shuffle buffer of {buffer}")
    return Stream(
        path.stem if path.is_file() else path.resolve().name,
        split,
        splits,
        class_names,
        square(size),
        fit,
        channels,
        buffer,
        workers,
        holdout,
        seed,
        tuple(notes),
        root,
        found.groups,
        numbers,
        counts,
    )


def _classes(
    found: Listing, others: Sequence[Path], given: Sequence[str] | None, title: str
) -> tuple[tuple[str, ...], dict[Any, int], Tensor]:
    """The class names, the class of every label, and the pictures of each class (K,)."""
    if not found.given:
        raise ClearwingError("data", title, "this split has no picture to give; fill it, or hold out less")
    labels = found.labels
    if unlabelled := labels & {None, -1}:
        mend = "a stream is for training, and every picture of it needs a label"
        raise ClearwingError("data", f"{title}: label {unlabelled.pop()}", mend)
    names = found.class_names or given
    if not names:  # those of every split, so that all splits number them alike
        labels |= list_shards(others).labels - {None, -1}
    class_names, numbers = number_labels(labels, names, given, title)
    counts = torch.zeros(len(class_names), dtype=torch.int64)
    for label, count in found.given.items():
        counts[numbers[label]] += count
    if given and not counts.all():
        raise ClearwingError("classes", class_names[int(counts.argmin())], f"no picture of it in {title}; remove it")
    return class_names, numbers, counts
