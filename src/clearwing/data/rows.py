"""Pictures that lie in a Parquet file and are read when they are asked for."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

PART = 32
"""Rows that are taken out of a file at a time."""
KEPT = 64 * max(16, os.cpu_count() or 1)
"""Rows that are kept, so that threads that read side by side find what another has passed."""
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
        self.kept: deque[Any] = deque(maxlen=KEPT)  # those before it

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
                    part = next(self.parts)
                    self.kept.extend(part)
                    self.next += len(part)
            except (ArrowException, OSError, StopIteration) as error:
                self.version = None
                raise OSError(str(error) or "the file was changed") from error
            held = self.kept[row.at - self.next].as_py()
        if held is None:
            raise OSError("it holds no picture")
        return bytes(held)


@lru_cache(maxsize=4)
def _reader(path: Path, column: str, child: str | None) -> _Reader:
    return _Reader(path, column, child)
