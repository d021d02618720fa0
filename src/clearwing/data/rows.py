"""The rows of Parquet files: what their columns are, and pictures that are read when they are asked for."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clearwing.types import ClearwingError

PART = 32
"""Rows that are taken out of a file at a time."""
KEPT = 64 * max(16, os.cpu_count() or 1)
"""Rows that are kept, so that threads that read side by side find what another has passed."""
MEMORY = 256 * 2**20
"""Bytes of pictures that are kept of a file: fewer rows where they are large."""
BUFFER = 2**20
"""Bytes of a file that are read at a time: of a row group of any length no more than a page is in memory."""


@dataclass(frozen=True)
class ParquetRow:
    """Where the bytes of one picture lie; `read_bytes` reads them, as that of a Path does.

    Asked for about in their order, the rows of a file are read once; one that lies elsewhere is reached from the
    beginning of its row group.
    """

    path: Path
    at: int  # the row, in the file
    group: int  # its row group
    first: int  # the first row of that
    column: str
    child: str | None = None  # of a column that is a struct

    def __str__(self) -> str:
        return f"{self.path}: row {self.at}"

    def read_bytes(self) -> bytes:
        """The bytes of a picture file; OSError where they cannot be read."""
        return _reader(self.path, self.column, self.child).read(self)


class _Reader:
    """Goes through the pictures of a file, and keeps the last ones."""

    def __init__(self, path: Path, column: str, child: str | None) -> None:
        self.path, self.column, self.child = path, column, child
        self.lock = threading.Lock()
        self.version: tuple[int, int] | None = None  # of the file
        self.begin(0, 0)

    def begin(self, group: int, first: int) -> None:
        self.parts = self.read_parts(group)
        self.next = first  # the first row that is still to be read
        self.kept: deque[Any] = deque()  # those before it
        self.size = 0  # their bytes

    def read_parts(self, group: int) -> Iterator[Any]:
        from pyarrow import parquet

        column = self.column if self.child is None else f"{self.column}.{self.child}"
        with parquet.ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False) as file:
            groups = range(group, file.num_row_groups)
            for part in file.iter_batches(PART, row_groups=groups, columns=[column]):
                yield part[self.column] if self.child is None else part[self.column].field(self.child)

    def read(self, row: ParquetRow) -> bytes:
        from pyarrow import ArrowException

        with self.lock:
            try:
                about = os.stat(self.path)
                version = about.st_mtime_ns, about.st_size
                passed = row.at < self.next - len(self.kept)
                if passed or row.first > self.next + KEPT // 2 or version != self.version:
                    self.begin(row.group, row.first)
                    self.version = version
                while row.at >= self.next:
                    self.keep(next(self.parts))
            except (ArrowException, OSError, StopIteration) as error:
                self.version = None
                raise OSError(str(error) or "the file was changed") from error
            held = self.kept[row.at - self.next]
        if held is None:
            raise OSError("it holds no picture")
        return bytes(held)

    def keep(self, part: Any) -> None:
        """Add rows, and let go the first ones where there are too many; never those just added."""
        added = part.to_pylist()
        self.kept.extend(added)
        self.next += len(added)
        self.size += sum(len(held or b"") for held in added)
        while len(self.kept) > len(added) and (len(self.kept) > KEPT or self.size > MEMORY):
            self.size -= len(self.kept.popleft() or b"")


@lru_cache(maxsize=4)
def _reader(path: Path, column: str, child: str | None) -> _Reader:
    return _Reader(path, column, child)


def parquet_columns(path: Path, schema: Any) -> tuple[str, str | None, tuple[str, ...]]:
    """The columns of the picture and of the label, and the class names of the schema's `huggingface` metadata."""
    import pyarrow as pa

    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (about.get("info") or {}).get("features") or {}

    def holds_bytes(kind: Any) -> bool:
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return pa.types.is_binary(inner) or pa.types.is_large_binary(inner)

    pictures = [c for c in schema.names if holds_bytes(schema.field(c).type)]
    likely = [c for c in ("image", "img", "picture") if c in pictures] + pictures
    if not likely:
        raise ClearwingError("data", path, f"no column of pictures among {', '.join(schema.names)}")
    labels = [c for c in ("label", "fine_label", "labels", "target", "class") if c in schema.names]
    labels += [c for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    label = labels[0] if labels else None
    feature = features.get(label) or {}
    return likely[0], label, tuple(feature.get("names") or ())


def parquet_rows(
    path: Path, file: Any, group: int, first: int, image: str, label: str | None
) -> Iterable[tuple[Any, Any]]:
    """(picture, label) of every row of a row group; where all its pictures lie in the file, they are left there."""
    import pyarrow as pa

    about, kind = file.metadata.row_group(group), file.schema_arrow.field(image).type
    columns = [about.column(i) for i in range(about.num_columns)]
    nulls = {c.path_in_schema: c.statistics.null_count for c in columns if c.statistics and c.statistics.has_null_count}
    child = "bytes" if pa.types.is_struct(kind) else None
    later = nulls.get(f"{image}.bytes" if child else image) == 0
    pathed = child is not None and kind.get_field_index("path") >= 0
    wanted = [image] if not later else [f"{image}.path"] if pathed else []
    table = file.read_row_group(group, columns=wanted + ([label] if label else []))
    pictures = table[image].to_pylist() if wanted else [{}] * about.num_rows
    if later:
        rows = (ParquetRow(path, first + i, group, first, image, child) for i in range(about.num_rows))
        pictures = [picture | {"bytes": row} for picture, row in zip(pictures, rows, strict=True)]
    labels = table[label].to_pylist() if label else [None] * about.num_rows
    return zip(pictures, labels, strict=True)
