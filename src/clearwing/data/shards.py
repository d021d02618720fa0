"""Sharded Parquet in the schema of a Hugging Face image data set: what it says of itself, and how it is written."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from clearwing.data.augment import seed_of
from clearwing.data.rows import ParquetRow, parquet_columns
from clearwing.data.sources import SPLITS, Sample, hidden
from clearwing.types import ClearwingError, atomic_path, near

ROWS = 100
"""Rows of the row groups that `write_shards` makes: with short ones a small shuffle buffer mixes well."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of one shard."""

    path: Path
    number: int  # in its file
    first: int  # the number in the split of its first row
    rows: int
    held: int  # of these rows held out
    columns: tuple[str, str | None]  # of the pictures and of the labels


@dataclass(frozen=True)
class Listing:
    """What the metadata and the labels of the files of a split say."""

    groups: tuple[RowGroup, ...]
    given: Counter[Any]  # rows by label, as it stands in the column (None where there is none), without those held out
    held: Counter[Any]
    class_names: tuple[str, ...]  # of the metadata

    @property
    def labels(self) -> set[Any]:
        return set(self.given) | set(self.held)


def shard_files(path: Path) -> list[Path]:
    """A Parquet file by itself, or all below a folder."""
    if not path.exists():
        raise ClearwingError("data", path, "no such file or folder")
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = [file for file in files if file.suffix.lower() == ".parquet" and not hidden(file.relative_to(path))]
    if not files:
        raise ClearwingError("data", path, "no Parquet file here; write_shards makes some of any data set")
    return files


def held_out(first: int, rows: int, share: float, seed: int) -> np.ndarray:
    """Which rows of a row group are held out, (rows,) bool; drawn from the seed and the group's place alone."""
    return np.random.default_rng(seed_of(seed, first)).random(rows) < share


def list_shards(files: Sequence[Path], holdout: float = 0.0, seed: int = 0) -> Listing:
    """Read the metadata and the column of labels, and no picture.

    Raises ClearwingError where a file is no Parquet, has no column of pictures or other class names than the first.
    """
    import pyarrow as pa
    from pyarrow import parquet

    groups: list[RowGroup] = []
    given, held = Counter[Any](), Counter[Any]()
    class_names: tuple[str, ...] = ()
    first = 0
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                picture, label, names = parquet_columns(path, file.schema_arrow)
                if path != files[0] and names != class_names:
                    raise ClearwingError(
                        "data", path, f"its class names are not those of {files[0].name}; use one list"
                    )
                class_names = names
                for number in range(file.num_row_groups):
                    rows = file.metadata.row_group(number).num_rows
                    column = file.read_row_group(number, columns=[label])[label] if label else pa.nulls(rows)
                    out = held_out(first, rows, holdout, seed)
                    for counter, mask in ((given, ~out), (held, out)):
                        for item in column.filter(pa.array(mask)).value_counts().to_pylist():
                            counter[item["values"]] += item["counts"]
                    groups.append(RowGroup(path, number, first, rows, int(out.sum()), (picture, label)))
                    first += rows
        except (pa.ArrowException, OSError) as error:
            raise ClearwingError("data", path, f"cannot be read as Parquet ({error})") from error
    return Listing(tuple(groups), given, held, class_names)


def number_labels(
    labels: Iterable[Any], names: Sequence[str] | None, given: Sequence[str] | None, title: str
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The class names, and the class of every label, as `open_data` numbers them.

    `names` are those that a label counts in, `given` those asked for, in their order.
    """

    def name(label: Any) -> str:
        if not names or not isinstance(label, int):
            return str(label)
        if not 0 <= label < len(names):
            raise ClearwingError("data", f"{title}: label {label}", f"there are {len(names)} class names")
        return names[label]

    by_value = sorted(labels, key=lambda label: (isinstance(label, str), label))
    class_names = tuple(given or names or map(str, by_value))
    position = {known: i for i, known in enumerate(class_names)}
    for label in by_value:
        if name(label) not in position:
            raise ClearwingError("class", name(label), f"not among the classes; {near(name(label), class_names)}")
    return class_names, {label: position[name(label)] for label in by_value}


def write_shards(
    samples: Sequence[Sample],
    folder: str | Path,
    *,
    class_names: Sequence[str],
    split: str = "train",
    rows_per_shard: int = 1000,
    seed: int | None = 0,
) -> tuple[Path, ...]:
    """Write samples (of `open_data`) as shards that `open_stream`, `open_data` and Hugging Face's `datasets` read.

    A file, or the bytes of one, is taken as it is, an array as PNG; the key becomes the path, and masks are left out.
    The order is drawn from the seed, so that a small shuffle buffer mixes well; None keeps that of the samples. A label
    None becomes -1. Of one shard all pictures are in memory. All shards get their names when the last is written.

    Raises ClearwingError where the folder holds shards of this split, and where a file cannot be read.

    Example: `write_shards(data.split("train"), "shards", class_names=data.class_names)`.
    """
    folder = Path(folder)
    if split not in SPLITS.values():
        raise ClearwingError("split", split, near(split, tuple(dict.fromkeys(SPLITS.values()))))
    if rows_per_shard < 1:
        raise ClearwingError("rows_per_shard", rows_per_shard, "give at least 1")
    if not samples:
        raise ClearwingError("samples", "[]", "there is no picture to write")
    if any(folder.glob(f"{split}-*.parquet")):
        raise ClearwingError("folder", folder, f"holds shards of {split}; remove them or name another folder")
    order = list(samples)
    if seed is not None:
        Random(seed).shuffle(order)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(order), rows_per_shard)
    paths = tuple(folder / f"{split}-{i:05d}-of-{len(starts):05d}.parquet" for i in range(len(starts)))
    with ExitStack() as stack:
        for path, start in zip(paths, starts, strict=True):
            _write(stack.enter_context(atomic_path(path)), order[start : start + rows_per_shard], class_names)
    return paths


def _write(path: Path, samples: Sequence[Sample], class_names: Sequence[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(class_names)}}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", picture), ("label", pa.int64())], about)
    encoded = {i: _encoded(samples[i]) for i in sorted(range(len(samples)), key=lambda i: _place(samples[i]))}
    with parquet.ParquetWriter(path, schema, compression="none") as writer:  # pictures are compressed already
        for i in range(0, len(samples), ROWS):
            part = range(i, min(i + ROWS, len(samples)))
            pictures = [{"bytes": encoded[j], "path": samples[j].key} for j in part]
            labels = [-1 if (label := samples[j].label) is None else label for j in part]
            writer.write_table(pa.table({"image": pictures, "label": labels}, schema))


def _place(sample: Sample) -> tuple[str, int]:
    """Where a picture lies in a Parquet file: taken in this order, the file is gone through once."""
    source = sample.source
    return (str(source.path), source.at) if isinstance(source, ParquetRow) else ("", 0)


def _encoded(sample: Sample) -> bytes:
    source = sample.source
    if isinstance(source, bytes):
        return source
    if not isinstance(source, np.ndarray):
        try:
            return source.read_bytes()
        except OSError as error:
            raise ClearwingError("picture", source, f"cannot be read ({error}); remove it", exit_code=1) from error
    file = io.BytesIO()
    Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source).save(file, "PNG")
    return file.getvalue()
