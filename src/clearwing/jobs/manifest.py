"""The manifest of a long job: what is done, a line a block, so that a killed run loses one block at the most."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clearwing.run import plain
from clearwing.types import ClearwingError


class Manifest:
    """`OUT/manifest-<rank>.jsonl`: each process appends to its own, and anybody reads all of them.

    The first line that a process writes holds the settings that its blocks are made with; `start` writes it before any
    block is done, and `writing` names the files of a block before they are there, so that what a killed run left is
    known for what it is.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int = 0) -> None:
        self.folder, self.settings, self.rank = folder, plain(settings), rank
        self.begun = False  # whether this process has written there

    @property
    def path(self) -> Path:
        return self.folder / f"manifest-{self.rank}.jsonl"

    def there(self) -> bool:
        """Whether an earlier run left one."""
        return bool(self._paths())

    def clear(self) -> None:
        """Forget all that an earlier run did."""
        for path in self._paths():
            path.unlink()
        self.begun = False

    def check(self) -> None:
        """Raise ClearwingError where what is done was made with other settings."""
        for path in self._paths():
            for line in manifest_lines(path):
                if "settings" in line and line["settings"] != self.settings:
                    keys = [key for key in self.settings if self.settings[key] != line["settings"].get(key)]
                    mend = f"what is there was made with another {', '.join(keys) or 'version'}"
                    mend += "; give another --out, or --overwrite to begin anew"
                    raise ClearwingError("--resume", self.folder, mend)

    def start(self) -> None:
        """Say with which settings this process goes on."""
        if not self.begun:
            self._write({"settings": self.settings})

    def writing(self, files: Iterable[Path]) -> None:
        """Say which files, below the folder, will be written now."""
        self.start()
        self._write({"writing": [str(file) for file in files]})

    def written(self) -> Iterator[Path]:
        """All files that `writing` named in manifests that `start` began, below the folder."""
        for path in self._paths():
            begun = False
            for line in manifest_lines(path):
                begun = begun or "settings" in line
                for file in map(Path, line.get("writing", [])) if begun else ():
                    if not file.is_absolute() and ".." not in file.parts:
                        yield self.folder / file

    def add(self, block: dict[str, Any]) -> None:
        """One block more, on the disk when this returns but for the system's own cache."""
        self.start()
        self._write(plain(block))

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            if not self.begun and file.tell():
                file.write("\n")  # a process that was killed while it wrote left half a line
            file.write(json.dumps(line) + "\n")
        self.begun = True

    def blocks(self) -> Iterator[dict[str, Any]]:
        """All blocks of all processes, one at a time."""
        for path in self._paths():
            for line in manifest_lines(path):
                if "pictures" in line:
                    yield line

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("manifest-*.jsonl") if path.stem[9:].isdecimal())


def manifest_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a manifest holds, line by line; half a line, which a killed process left, is passed over."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                found = json.loads(line) if line.strip() else None
            except ValueError:
                continue  # half a line
            if isinstance(found, dict):
                yield found
