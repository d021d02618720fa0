"""The values that Clearwing hands from room to room: Batch, Geometry, Explanation, and the codes of masks and maps.

Nothing heavy is imported here: torch is loaded by the functions that need it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

BACKGROUND, FOREGROUND, IGNORE = 0, 1, 255
"""The codes of a mask (uint8). PNG files hold 0 and 255 for the first two; see `clearwing.read_mask`."""


class ClearwingError(ValueError):
    """What was wrong at a door: the argument, its value and the mend, in one line.

    `exit_code` is 2 where it was found before work started, 1 where it was found later.
    """

    def __init__(self, argument: str, value: object, mend: str, *, exit_code: int = 2) -> None:
        self.argument, self.value, self.mend, self.exit_code = argument, str(value), mend, exit_code
        super().__init__(" ".join(f"{argument}: {self.value}; {mend}".split()))

    def __reduce__(self) -> tuple[Any, ...]:  # keep the parts when an error crosses a process boundary
        return _rebuild_error, (self.argument, self.value, self.mend, self.exit_code)


def _rebuild_error(argument: str, value: str, mend: str, exit_code: int) -> ClearwingError:
    return ClearwingError(argument, value, mend, exit_code=exit_code)


class Status(IntEnum):
    """What an attribution map holds, so that an empty map is not stretched into a picture of noise."""

    OK = 0
    ZERO = 1
    """Every value is zero: no evidence."""
    CONSTANT = 2
    """One value everywhere, not zero."""
    NONFINITE = 3
    """NaN or infinity somewhere."""


@dataclass(frozen=True)
class Geometry:
    """How one picture came to its size: a box of the original was resized to `size`, then perhaps mirrored.

    The box is in original pixels and may reach over the border (`--fit pad`) or lie inside it (`--fit crop`).
    """

    height: int  # of the original picture, after its EXIF orientation
    width: int
    top: int
    left: int
    box_height: int
    box_width: int
    size: tuple[int, int]  # (H, W) of the picture in the batch
    flip: bool = False  # mirrored left to right after the resize


@dataclass(frozen=True)
class Batch:
    """Pictures on the device."""

    images: Tensor  # (N, C, H, W), floating, in [0, 1]
    labels: Tensor | None = None  # (N,) int64
    keys: tuple[str, ...] = ()  # N names, unique in their data set
    geometry: tuple[Geometry, ...] = ()  # N
    targets: Tensor | None = None  # (N, K) shares of the classes, where pictures are mixed

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def to(self, device: Any) -> Batch:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, labels=moved(self.labels), targets=moved(self.targets))


@dataclass(frozen=True)
class Explanation:
    """Raw attribution maps of one method, never min-max scaled.

    `maps[i, m]` explains class `classes[i, m]` (against `against[i, m]` for a contrast) of picture i.
    """

    maps: Tensor  # (N, M, H, W) float32, at the size of the images
    classes: Tensor  # (N, M) int64; -1 where the target was a callable
    logits: Tensor  # (N, K)
    method: str
    layer: str | None  # None for methods at the input
    status: Tensor  # (N, M) uint8, codes of `Status`
    against: Tensor | None = None  # (N, M) int64
    geometry: tuple[Geometry, ...] = ()
    keys: tuple[str, ...] = ()
    channels: Tensor | None = None  # (N, M, C, H, W), the signed input gradient of the input methods
    class_names: tuple[str, ...] = ()
    peak: Tensor | None = None  # (N, M), the largest raw value, of joined layers before they were scaled
    images: Tensor | None = None  # (N, C, H, W), as they were given: for drawing, not saved

    def __len__(self) -> int:
        return int(self.maps.shape[0])

    def __repr__(self) -> str:
        n, m, h, w = self.maps.shape
        codes = self.status.flatten().tolist()
        counts = ", ".join(f"{codes.count(code)} {code.name.lower()}" for code in Status if code in codes)
        where = f"{self.method} at {self.layer}" if self.layer else self.method
        return f"Explanation({where}: {n} x {m} maps of {h} x {w}, {counts})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows, see `clearwing.draw_explanation`."""
        from io import BytesIO

        from PIL import Image

        import clearwing

        file = BytesIO()
        Image.fromarray(clearwing.draw_explanation(self)).save(file, "PNG")
        return file.getvalue()

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, (N, K)."""
        return self.logits.float().softmax(1)

    @property
    def predicted(self) -> Tensor:
        """The class with the largest logit, (N,)."""
        return self.logits.argmax(1)

    def to(self, device: Any) -> Explanation:
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        names = ("maps", "classes", "logits", "status", "against", "channels", "peak")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def picture(self, i: int) -> Explanation:
        """The explanation of picture i alone, N = 1."""
        tensors: dict[str, Any] = {name: value[i : i + 1].clone() for name, value in self.tensors().items()}
        images = None if self.images is None else self.images[i : i + 1]
        return replace(self, **tensors, geometry=self.geometry[i : i + 1], keys=self.keys[i : i + 1], images=images)

    @staticmethod
    def cat(parts: Sequence[Explanation]) -> Explanation:
        """Join explanations of the same method and layer along the pictures."""
        import torch

        if not parts:
            raise ClearwingError("parts", "[]", "give at least one Explanation")
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].tensors()
        }
        images = [part.images for part in parts if part.images is not None]
        joined["images"] = torch.cat(images) if len(images) == len(parts) else None
        for name in ("geometry", "keys"):
            joined[name] = tuple(item for part in parts for item in getattr(part, name))
        return replace(parts[0], **joined)

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file, all or nothing (a temporary name, then renamed)."""
        from pathlib import Path

        from safetensors.torch import save

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": "clearwing.Explanation/1",
            "method": self.method,
            "layer": self.layer,
            "keys": self.keys,
            "class_names": self.class_names,
            "geometry": [
                [g.height, g.width, g.top, g.left, g.box_height, g.box_width, *g.size, int(g.flip)]
                for g in self.geometry
            ],
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors().items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"about": json.dumps(about)}))
        return path

    @staticmethod
    def load(path: str | Path) -> Explanation:
        """Read what `save` wrote.

        Raises ClearwingError where the file is missing or is no saved Explanation.
        """
        from pathlib import Path

        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ClearwingError("path", path, "give a file that Explanation.save wrote")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ClearwingError("path", path, f"not a safetensors file ({error})") from error
        if about.get("format") != "clearwing.Explanation/1":
            raise ClearwingError("path", path, "give a file that Explanation.save wrote")
        geometry = []
        for height, width, top, left, box_height, box_width, h, w, flip in about["geometry"]:
            geometry.append(Geometry(height, width, top, left, box_height, box_width, (h, w), bool(flip)))
        return Explanation(
            **tensors,
            method=about["method"],
            layer=about["layer"],
            geometry=tuple(geometry),
            keys=tuple(about["keys"]),
            class_names=tuple(about["class_names"]),
        )


class atomic_path:  # noqa: N801 (used like a function)
    """Give a temporary name beside `path`; rename it to `path` when the block ends well, delete it otherwise."""

    def __init__(self, path: str | Path) -> None:
        import os
        from pathlib import Path

        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def near(word: str, words: Sequence[str], most: int = 3) -> str:
    """The known words most like `word`, for the mend of an error: "did you mean a, b?" or all of a short list."""
    from difflib import get_close_matches

    written = {known.lower(): known for known in words}
    close = get_close_matches(word.lower(), written, n=most, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(written[one] for one in close)}?"
    shown = ", ".join(list(words)[:40])
    return f"choose one of {shown}{' ...' if len(words) > 40 else ''}"
