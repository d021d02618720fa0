"""Draw explanations as one sheet of pictures: what a notebook shows where an Explanation is a cell's last line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clearwing.show.draw import Picture, heatmap, is_signed, montage, overlay, to_rgb
from clearwing.types import ClearwingError, Explanation, Status

WIDTH = 1020
"""Pixels that a notebook gives its pictures; a wider sheet would be shrunk, and its captions with it."""
NARROWEST, WIDEST = 144, 224
"""Pixels a tile."""
_USED = WIDTH * 20 // 21 - 8  # the rest lies between the tiles

_STATUS = {
    Status.ZERO: "zero: no evidence",
    Status.CONSTANT: "the same everywhere",
    Status.NONFINITE: "NaN or infinity",
}
_HEAD = 48  # pixels above the tiles
_INK, _FAINT = "#20262c", "#6b7680"

Tile = tuple[Picture, str]  # and its caption
_BLANK: Tile = (np.full((1, 1, 3), 255, np.uint8), "")


def draw_explanation(explanation: Explanation | Mapping[str, Explanation], most: int = 8) -> Picture:
    """Draw a row a picture: the picture, then the map of each asked class laid over it. Gives uint8 RGB (H, W, 3).

    explanation: one, or several of the same pictures by name, as `explain` gives them for several methods or layers.
    most: pictures to draw; a line below says how many are left out.

    Many maps run over several lines; where they are few, pictures share a line, so that a sheet fits a notebook.
    The captions give the class and its probability, and the status where a map holds no evidence. Each map is scaled
    for the eye by itself: from zero up in inferno, or in red and blue about zero where its explanation has values below
    it. Pictures that leave [0, 1] are stretched to it, and of those with neither 1 nor 3 channels the mean is drawn;
    where the explanation came without pictures, the maps stand alone.

    Raises ClearwingError where there is nothing to draw, and for explanations of different pictures.
    """
    named = dict(explanation) if isinstance(explanation, Mapping) else {"": explanation}
    several = "" not in named
    _check(named, most)
    first = next(iter(named.values()))
    shown = min(most, len(first))
    images = next((e.images for e in named.values() if e.images is not None), None)
    heads: list[list[Tile]] = [[] for _ in range(shown)]
    pictures = None
    if images is not None:
        pictures = to_rgb(_visible(images[:shown]))
        keys = [Path(key).name for key in first.keys[:shown]] or [""] * shown
        heads = [[tile] for tile in zip(pictures, keys, strict=True)]
    rows: list[list[Tile]] = [[] for _ in range(shown)]
    for name, e in named.items():
        heading = name.replace("@", "\nat ") + "\n" if several else ""
        for row, tiles in zip(rows, _tiles(e, pictures, shown, heading), strict=True):
            row += tiles
    title = f"{len(named)} explanations" if several else first.method + (f" at {first.layer}" if first.layer else "")
    about = "each map scaled by itself"
    if any(is_signed(e.maps[:shown]) for e in named.values()):
        about += "; red speaks for the class, blue against it"
    left_out = f"{len(first) - shown} of {len(first)} pictures are not shown" if len(first) > shown else ""
    return _framed(_sheet(heads, rows), title, about, left_out)


def _check(named: Mapping[str, Explanation], most: int) -> None:
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ClearwingError("most", most, "give how many pictures to draw, at least 1")
    if not named:
        raise ClearwingError("explanation", "{}", "give at least one Explanation")
    for e in named.values():
        if not isinstance(e, Explanation):
            mend = "give an Explanation, or a dict of them as clearwing.explain makes it"
            raise ClearwingError("explanation", type(e).__name__, mend)
    shapes = {(len(e), *e.maps.shape[2:]) for e in named.values()}
    if len(shapes) > 1 or min(min(shapes)) == 0:
        found = " and ".join(f"{n} pictures of {h} x {w}" for n, h, w in sorted(shapes))
        raise ClearwingError("explanation", found, "give explanations of the same pictures, at least one")


def _tiles(e: Explanation, pictures: Picture | None, shown: int, heading: str) -> list[list[Tile]]:
    """For each picture, the drawn maps of the asked classes with their captions; all signed, or none."""
    M = e.maps.shape[1]
    maps = e.maps[:shown].flatten(0, 1)
    drawn = heatmap(maps) if pictures is None else overlay(pictures.repeat(M, 0), maps)
    return [[(drawn[i * M + m], heading + _caption(e, i, m)) for m in range(M)] for i in range(shown)]


def _caption(e: Explanation, i: int, m: int) -> str:
    k = int(e.classes[i, m])
    lines = ["function of the logits" if k < 0 else _class(e, i, k)]
    if e.against is not None:
        lines.append(f"vs {_class(e, i, int(e.against[i, m]))}")
    status = Status(int(e.status[i, m]))
    return "\n".join([*lines, _STATUS[status]] if status in _STATUS else lines)


def _class(e: Explanation, i: int, k: int) -> str:
    return f"{e.class_names[k] if e.class_names else f'class {k}'}, {e.logits[i].float().softmax(0)[k]:.0%}"


def _visible(images: Tensor) -> Tensor:
    """Pictures (N, C, H, W) of any values as (N, 1 or 3, H, W) in [0, 1]."""
    values = images.detach().float().nan_to_num(0, 0, 0)
    if values.shape[1] not in (1, 3):
        values = values.mean(1, keepdim=True)
    if values.min() >= 0 and values.max() <= 1:
        return values
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-12)


def _sheet(heads: list[list[Tile]], rows: list[list[Tile]]) -> Picture:
    """The pictures and the maps beside them; many maps run over several lines, few leave room for a second picture."""
    lead, maps = len(heads[0]), len(rows[0])
    H, W = rows[0][0][0].shape[:2]
    block = W if max(H, W) <= 64 else 1  # small pictures are enlarged in whole blocks, see `fit`
    narrowest = math.ceil(NARROWEST / block) * block
    room = max(lead + 1, _USED // narrowest)
    lines = math.ceil(maps / (room - lead))
    across = math.ceil(maps / lines)
    columns = lead + across
    tiles: list[Tile] = []
    for head, row in zip(heads, rows, strict=True):
        for start in range(0, maps, across):
            line = (head if start == 0 else [_BLANK] * lead) + row[start : start + across]
            tiles += line + [_BLANK] * (columns - len(line))
    if lines == 1 and len(rows) > 1:
        columns *= max(1, min(len(rows), room // columns))
    width = max(narrowest, min(WIDEST, _USED // columns) // block * block)
    pictures, captions = zip(*tiles, strict=True)
    size = min(2 * width, round(width * H / W)), width
    return montage(pictures, captions, columns, size=size, font_size=max(12, min(14, width // 14)))


def _framed(sheet: Picture, title: str, about: str, left_out: str) -> Picture:
    """The sheet with a title and a line about it above, and a line below."""
    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    bold = ImageFont.truetype(str(folder / "DejaVuSans-Bold.ttf"), 16)
    plain = ImageFont.truetype(str(folder / "DejaVuSans.ttf"), 12)
    height, width = sheet.shape[:2]
    lines = [(8, title, _INK, bold), (30, about, _FAINT, plain), (_HEAD + height + 4, left_out, _FAINT, plain)]
    width = max(width, *(16 + math.ceil(font.getlength(text)) for _, text, _, font in lines))
    page = Image.new("RGB", (width, _HEAD + height + (28 if left_out else 0)), "white")
    page.paste(Image.fromarray(sheet), (0, _HEAD))
    pen = ImageDraw.Draw(page)
    for y, text, colour, font in lines:
        pen.text((8, y), text, colour, font)
    return np.asarray(page)
