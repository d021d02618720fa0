"""Reading a picture right, bringing it to the network's size, and the way back to its own pixels."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clearwing.types import FOREGROUND, IGNORE, ClearwingError, Geometry

FITS = ("squash", "crop", "pad")
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # its value: transpose first?, then the axes of (C, H, W) to mirror
    2: (False, 2),
    3: (False, 1, 2),
    4: (False, 1),
    5: (True,),
    6: (True, 2),
    7: (True, 1, 2),
    8: (True, 1),
}


class Held(Protocol):
    """What can give the bytes of a picture file: a Path, or a row of a Parquet file."""

    def read_bytes(self) -> bytes: ...


Source = str | Held | bytes | np.ndarray


class QuietPillow:
    """Silence Pillow's warnings (bombs, broken EXIF, odd TIFF tags) while at least one thread reads.

    `warnings.catch_warnings` swaps process-wide state, so threads that overlapped would restore each other's; this
    one counts its holders, the first swaps and the last swaps back.
    """

    _lock = threading.Lock()
    _holders = 0
    _saved: warnings.catch_warnings | None = None

    def __enter__(self) -> None:
        with QuietPillow._lock:
            if QuietPillow._holders == 0:
                QuietPillow._saved = warnings.catch_warnings()
                QuietPillow._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            QuietPillow._holders += 1

    def __exit__(self, *error: Any) -> None:
        with QuietPillow._lock:
            QuietPillow._holders -= 1
            if QuietPillow._holders == 0 and QuietPillow._saved is not None:
                QuietPillow._saved.__exit__(None, None, None)
                QuietPillow._saved = None


def read_picture(source: Source, channels: int = 3) -> Tensor:
    """One picture as uint8 (C, H, W), upright after its EXIF orientation.

    `source` is a file, the bytes of one, what gives them (`read_bytes()`), or a uint8 array (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4). Transparency is laid over white, CMYK becomes RGB, 16 bits a sample become 8 by v / 257.
    `channels=1` gives the luma of ITU-R BT.601, `channels=3` repeats a grey picture.

    Raises ClearwingError where the picture cannot be read.
    """
    if channels not in (1, 3):
        raise ClearwingError("channels", channels, "choose 1 (grey) or 3 (RGB)")
    return _to_channels(_read(source, _from_pillow), channels)


def _read(source: Source, convert: Callable[[Image.Image], Tensor]) -> Tensor:  # uint8 (1 or 3, H, W)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    try:
        held = Path(source) if isinstance(source, str) else source
        data = held if isinstance(held, bytes) else held.read_bytes()
        with QuietPillow():
            return _decode(data, convert)
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, Image.DecompressionBombError) as error:
        # what Pillow's decoders raise on broken files; SyntaxError is its word for a broken PNG
        reason = (str(error).splitlines() or ["it is broken"])[0]
        reason = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", reason)  # Pillow's word for our copy of the file
        raise ClearwingError("picture", name, f"cannot be read ({reason}); replace or remove it") from error


def read_mask(source: Source) -> Tensor:
    """One mask as uint8 (H, W), 0 background and 1 foreground.

    In a file, values above 127 (after grey conversion) are foreground; a file of 0 and 1 alone is taken as it is.
    Transparency is laid over black, so that what is transparent is background. A palette file holds class numbers, as
    in PASCAL VOC: foreground is every index but 0, whatever its colour. (Where the colour of index 0 is bright, above
    127, the palette holds the mask's own black and white, and the colours are read as in other files.)
    An array with a 1 (or True) in it holds the codes 0, 1, 255 of `clearwing.types` and keeps them; other arrays are
    read like a file.

    Raises ClearwingError where the mask cannot be read.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 2:
            raise ClearwingError("mask", f"array of shape {source.shape}", "give (H, W)")
        grey = torch.from_numpy(np.ascontiguousarray(source).astype(np.uint8))
        if bool((grey == FOREGROUND).any()):
            return grey
    else:
        grey = _to_channels(_read(source, _mask_from_pillow), 1)[0]
    top = 0 if int(grey.max()) <= 1 else 127
    return (grey > top).to(torch.uint8)


def _from_array(array: np.ndarray) -> Tensor:  # (H, W[, C]) uint8 -> (C, H, W) or an error
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise ClearwingError("picture", f"{array.dtype} array of shape {array.shape}", "give uint8 (H, W, C)")
    if array.ndim == 3 and array.shape[2] == 4:
        return _from_pillow(Image.fromarray(array))
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        raise ClearwingError("picture", f"array of shape {array.shape}", "give 1, 3 or 4 channels, last")
    array = array if array.flags.writeable and array.flags.c_contiguous else array.copy()
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def _decode(data: bytes, convert: Callable[[Image.Image], Tensor]) -> Tensor:  # (1 or 3, H, W)
    with Image.open(io.BytesIO(data)) as image:
        if 0 in image.size:
            raise ValueError("it has no pixels")
        image.load()  # first, because Pillow turns TIFF files itself while loading, and then drops the tag
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        picture = convert(image)
    if turn is None:
        return picture
    transposed, *mirrored = turn
    return (picture.transpose(1, 2) if transposed else picture).flip(mirrored)


def _mask_from_pillow(image: Image.Image) -> Tensor:  # (1 or 3, H, W), see `read_mask`
    if image.mode == "P" and max((image.getpalette() or [0])[:3]) <= 127:
        return torch.from_numpy((np.array(image) > 0).astype(np.uint8) * 255)[None]
    return _from_pillow(image, backdrop=0)


def _from_pillow(image: Image.Image, backdrop: int = 255) -> Tensor:  # (1 or 3, H, W)
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("32 bits a sample; save it with 8 or 16")
        return torch.from_numpy(((wide + 128) // 257).astype(np.uint8))[None]
    if image.mode == "F":
        raise ValueError("floating-point samples; save it with 8 or 16 bits")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        behind = Image.new("RGBA", colour.size, (backdrop, backdrop, backdrop, 255))
        image = Image.alpha_composite(behind, colour).convert("RGB")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def _to_channels(picture: Tensor, channels: int) -> Tensor:  # uint8 (1 or 3, H, W) -> (channels, H, W)
    if picture.shape[0] == channels:
        return picture
    if channels == 3:
        return picture.expand(3, -1, -1).contiguous()
    # 16-bit fixed-point weights of ITU-R BT.601, rounded as Pillow rounds
    red, green, blue = picture.to(torch.int32)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[None]


def square(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) from a side or from (H, W)."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if height < 1 or width < 1:
        raise ClearwingError("size", size, "give at least 1 pixel")
    return height, width


def fit_geometry(height: int, width: int, size: int | Sequence[int], fit: str) -> Geometry:
    """The box of a picture of (height, width) that is resized to `size`.

    `squash` takes the whole picture, `crop` the largest centred box of the target's aspect inside it, `pad` the
    smallest centred one around it.
    """
    if fit not in FITS:
        raise ClearwingError("fit", fit, f"choose one of {', '.join(FITS)}")
    H, W = square(size)
    box_height, box_width = height, width
    if fit != "squash":
        across, down = round(height * W / H), round(width * H / W)  # the box's width and height for the other side
        if (across < width) == (fit == "crop"):
            box_width = max(1, across)
        else:
            box_height = max(1, down)
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return Geometry(height, width, top, left, box_height, box_width, size=(H, W))


def fit_picture(picture: Tensor, size: int | Sequence[int], fit: str = "crop") -> tuple[Tensor, Geometry]:
    """A uint8 picture (C, H, W) at `size` (a side or (H, W)), antialiased, and how it came there.

    `fit` is `squash`, `crop` or `pad` (see `fit_geometry`); padding is filled with the picture's own mean colour.
    """
    geometry = fit_geometry(picture.shape[1], picture.shape[2], size, fit)
    H, W = geometry.size
    box = picture[
        :,
        max(geometry.top, 0) : geometry.top + geometry.box_height,
        max(geometry.left, 0) : geometry.left + geometry.box_width,
    ]
    if geometry.top >= 0 and geometry.left >= 0:
        return _resize(box, H, W), geometry
    fill = picture.float().mean((1, 2)).round().to(torch.uint8)[:, None, None]
    # the full side first, so that a very long picture is never padded to a square of its length
    if geometry.top < 0:
        box = _resize(box, geometry.height, W)
        canvas = fill.expand(-1, geometry.box_height, W).clone()
        canvas[:, -geometry.top : -geometry.top + geometry.height] = box
    else:
        box = _resize(box, H, geometry.width)
        canvas = fill.expand(-1, H, geometry.box_width).clone()
        canvas[:, :, -geometry.left : -geometry.left + geometry.width] = box
    return _resize(canvas, H, W), geometry


def _resize(picture: Tensor, height: int, width: int) -> Tensor:  # (C, h, w) -> (C, height, width)
    if picture.shape[1:] == (height, width):
        return picture
    return F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]


def restore(values: Tensor | Sequence[Tensor], geometry: Sequence[Geometry]) -> list[Tensor]:
    """Maps or masks at the network's size, brought back to the pixels of the original pictures.

    `values` is (N, H, W) or (N, M, H, W), more leading dimensions allowed; the result is a list of N tensors
    (height, width) or (M, height, width) with the dtype of `values`. Floating maps are resized bilinearly. Masks (bool
    or the codes 0, 1, 255) are foreground where the resized foreground exceeds one half; 255 (ignore) is carried over
    from the nearest pixel. What the network did not see, outside the box, is 0. Mirroring is undone.

    Example: `full = clearwing.restore(masks, explanation.geometry)`.
    """
    if len(values) != len(geometry):
        raise ClearwingError("geometry", f"{len(geometry)} entries", f"give one for each of {len(values)} values")
    return [_restore_one(value, place) for value, place in zip(values, geometry, strict=True)]


def _restore_one(value: Tensor, place: Geometry) -> Tensor:
    if value.ndim < 2 or tuple(value.shape[-2:]) != tuple(place.size):
        raise ClearwingError("values", tuple(value.shape), f"the geometry says (..., {place.size[0]}, {place.size[1]})")
    if place.flip:
        value = value.flip(-1)
    if value.is_floating_point():
        return _unbox(value.float(), place, "bilinear").to(value.dtype)
    share = _unbox((value == FOREGROUND).float(), place, "bilinear")
    mask = (share > 0.5).to(value.dtype)
    ignored = value == IGNORE if value.dtype != torch.bool else None
    if ignored is not None and bool(ignored.any()):
        mask[_unbox(ignored.float(), place, "nearest-exact") > 0.5] = IGNORE
    return mask


def _unbox(value: Tensor, place: Geometry, mode: str) -> Tensor:
    """Resize (..., H, W) to the box and lay it into zeros (..., height, width); one axis at a time, cut in between, so
    that the box of a very long padded picture is never built."""
    value = _unbox_rows(value, place.top, place.box_height, place.height, mode)
    value = _unbox_rows(value.transpose(-1, -2), place.left, place.box_width, place.width, mode)
    return value.transpose(-1, -2).contiguous()


def _unbox_rows(value: Tensor, start: int, length: int, full: int, mode: str) -> Tensor:
    *lead, rows, columns = value.shape
    if rows != length:
        smooth: dict[str, Any] = {"antialias": True} if mode == "bilinear" else {}
        flat = value.reshape(-1, 1, rows, columns)
        value = F.interpolate(flat, (length, columns), mode=mode, **smooth).reshape(*lead, length, columns)
    value = value[..., max(-start, 0) : full - start, :]
    start = max(start, 0)
    return F.pad(value, (0, 0, start, full - start - value.shape[-2]))
