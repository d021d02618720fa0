"""Turn maps, masks and numbers into pictures: heatmap, overlay, edges, outline, montage, curves and tables.

Pictures leave as uint8 RGB, channels last. Only here are maps scaled for the eye; the values stay raw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clearwing.types import FOREGROUND, ClearwingError, atomic_path

Picture = NDArray[np.uint8]  # (H, W, 3)

HEAT = "inferno"
"""For maps without a sign: perceptually uniform, black at zero."""
DIVERGING = "RdBu_r"
"""For signed maps: red speaks for the class, blue against it, white is zero."""

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Okabe and Ito's colours, told apart under every common colour blindness: train, val, test in charts."""
PREDICTION, TRUTH = (255, 176, 0), (86, 180, 233)
"""Contour colours: amber for the mask, sky blue for the truth."""

_INK, _FAINT = "#3c4650", "#d9dee2"


def to_rgb(images: Tensor | NDArray[Any]) -> Picture:
    """Give pictures as uint8 RGB, channels last: (N, C, H, W) -> (N, H, W, 3), (C, H, W) -> (H, W, 3).

    A tensor is channels first, floating in [0, 1] or uint8, with one or three channels; an array is already
    uint8 RGB, channels last.
    """
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
            raise ClearwingError(
                "images",
                f"array {images.shape} {images.dtype}",
                "give uint8 (H, W, 3) or (N, H, W, 3), or a tensor",
            )
        return images
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3):
        raise ClearwingError("images", f"shape {tuple(images.shape)}", "give (N, C, H, W) or (C, H, W) with C 1 or 3")
    values = images.detach().cpu()
    if values.is_floating_point():
        values = (values.float().clamp(0, 1) * 255).round().byte()
    values = values.movedim(-3, -1)
    return values.expand(*values.shape[:-1], 3).contiguous().numpy()


def normalise(maps: Tensor | NDArray[Any], *, signed: bool | None = None, clip: float = 99.8) -> NDArray[np.float32]:
    """Scale maps (..., H, W) for the eye only, each by its own `clip` percentile: to [0, 1], or [-1, 1] if signed.

    Zero stays zero, so signed maps are symmetric about it. A map that is zero, constant or not finite comes out
    blank (all zero) instead of being stretched into noise. `signed=None`: signed if a value is below zero.
    """
    values = _values(maps)
    if signed is None:
        signed = is_signed(values)
    finite = np.isfinite(values).all(axis=(-2, -1), keepdims=True)
    values = np.where(finite, values, 0.0)
    strength = np.abs(values) if signed else values.clip(min=0)
    top = strength.max(axis=(-2, -1), keepdims=True)
    scale = np.percentile(strength, clip, axis=(-2, -1), keepdims=True)
    scale = np.where(scale > 0, scale, top)  # a few pixels hold everything
    spread = values.max(axis=(-2, -1), keepdims=True) - values.min(axis=(-2, -1), keepdims=True)
    blank = (top <= 0) | (spread <= 1e-6 * np.abs(values).max(axis=(-2, -1), keepdims=True))
    scaled = np.where(blank, 0.0, values / np.where(blank, 1.0, scale))
    return scaled.clip(-1.0 if signed else 0.0, 1.0).astype(np.float32)


def is_signed(maps: Tensor | NDArray[Any]) -> bool:
    """Whether maps (..., H, W) have values below zero, by more than rounding; then they are drawn in red and blue."""
    values = _values(maps)
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() < -1e-6 * np.abs(finite).max())


def heatmap(maps: Tensor | NDArray[Any], *, signed: bool | None = None) -> Picture:
    """Colour maps (N, H, W) or (H, W): inferno from zero up, or red and blue about zero if signed.

    Gives uint8 (N, H, W, 3) or (H, W, 3).
    """
    signed = is_signed(maps) if signed is None else signed
    return _colour(normalise(maps, signed=signed), signed)


def overlay(
    images: Tensor | NDArray[Any],
    maps: Tensor | NDArray[Any],
    *,
    alpha: float = 0.8,
    signed: bool | None = None,
) -> Picture:
    """Lay coloured maps (N, H, W) over pictures (N, C, H, W); one of each without N too.

    The opacity grows with the value up to `alpha`, so the picture stays visible where there is no evidence.
    """
    if not 0 <= alpha <= 1:
        raise ClearwingError("alpha", alpha, "give an opacity between 0 and 1")
    signed = is_signed(maps) if signed is None else signed
    pictures, values = _pair(images, normalise(maps, signed=signed), "maps")
    grey = pictures @ np.array([0.299, 0.587, 0.114], np.float32)
    calm = 0.4 * pictures + 0.6 * grey[..., None]  # less colour in the picture leaves the colour to the map
    opacity = alpha * np.abs(values)[..., None] ** 0.8
    # Inferno starts in black: from a fifth up, faint evidence tints the picture rather than darkens it.
    colours = _colour(values if signed else 0.2 + 0.8 * values, signed)
    blended = calm * (1 - opacity) + colours * opacity
    return blended.round().clip(0, 255).astype(np.uint8)


def edges(images: Tensor | NDArray[Any], maps: Tensor | NDArray[Any], *, signed: bool | None = None) -> Picture:
    """Draw the picture's Canny edges over the coloured maps (N, H, W), to place the evidence on the object.

    The two hysteresis thresholds are 0.66 and 1.33 times the median brightness of each picture.
    """
    signed = is_signed(maps) if signed is None else signed
    pictures, values = _pair(images, normalise(maps, signed=signed), "maps")
    drawn = _colour(values, signed)
    ink = np.array([20, 24, 28] if signed else [235, 240, 245], np.float32)
    for picture, canvas in _each(pictures, drawn):
        grey = cv2.GaussianBlur(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (3, 3), 0)
        middle = float(np.median(grey))
        line = cv2.Canny(grey, max(20.0, 0.66 * middle), max(60.0, min(250.0, 1.33 * middle))) > 0
        canvas[line] = (0.35 * canvas[line] + 0.65 * ink).astype(np.uint8)
    return drawn


def outline(
    images: Tensor | NDArray[Any], masks: Tensor | NDArray[Any], truth: Tensor | NDArray[Any] | None = None
) -> Picture:
    """Draw the contour of masks (N, H, W) on the pictures in amber, over that of the truth in sky blue.

    Foreground is 1 (or True); 0 and 255 (ignore) are not.
    """
    pictures, predicted = _pair(images, _numpy(masks), "masks")
    layers = [(predicted, PREDICTION)]
    if truth is not None:
        layers.insert(0, (_pair(images, _numpy(truth), "truth")[1], TRUTH))
    drawn = pictures.copy()
    width = max(1, round(min(drawn.shape[-3:-1]) / 140))
    for values, _ in layers:  # a dark seam shows the colours on any ground
        _contours(drawn, values, (16, 20, 24), width + 2)
    for values, colour in layers:
        _contours(drawn, values, colour, width)
    return drawn


def montage(
    tiles: Sequence[Picture] | Picture,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    font_size: int | None = None,
) -> Picture:
    """Set pictures (H, W, 3) on one white sheet with captions below, `columns` in a row (about square by default).

    Each is fitted into a square of `size` pixels (the largest picture's side, at least 128) or a box of (height,
    width), its ratio kept; a caption may have several lines, and one that is too long ends in "...".
    """
    if len(tiles) == 0:
        raise ClearwingError("tiles", "[]", "give at least one picture")
    if captions is not None and len(captions) != len(tiles):
        raise ClearwingError("captions", f"{len(captions)} for {len(tiles)} pictures", "give one caption a picture")
    columns = math.ceil(math.sqrt(len(tiles))) if columns is None else columns
    if columns < 1:
        raise ClearwingError("columns", columns, "give 1 or more")
    columns = min(columns, len(tiles))
    size = size or max(128, *(max(tile.shape[:2]) for tile in tiles))
    height, width = (size, size) if isinstance(size, int) else size
    gap = max(8, width // 20)
    font_size = font_size or max(11, width // 13)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), font_size)
    line = math.ceil(font.size * 1.35)
    depth = max((caption.count("\n") + 1 for caption in captions), default=0) * line if captions is not None else 0
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + depth + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + depth + gap)
        scale = min(height / tile.shape[0], width / tile.shape[1])
        picture = fit(tile, round(scale * max(tile.shape[:2])), enlarge=True)
        h, w = picture.shape[:2]
        sheet.paste(Image.fromarray(picture), (x + (width - w) // 2, y + (height - h) // 2))
        for row, text in enumerate(captions[i].split("\n") if captions is not None else ()):
            pen.text((x, y + height + line * row + line // 5), _shorten(text, font, width), "#20262c", font)
    return np.asarray(sheet)


def fit(picture: Picture, size: int, *, enlarge: bool = False) -> Picture:
    """Resize (H, W, 3) so that the longer side is at most `size`; with `enlarge`, exactly `size`.

    Pictures of a few pixels are enlarged in whole blocks, so that nobody takes interpolation for detail.
    """
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    if scale == 1 or (scale > 1 and not enlarge):
        return picture
    how = Image.Resampling.NEAREST if scale >= 2 and max(height, width) <= 64 else Image.Resampling.LANCZOS
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(shape, how))


def save_png(picture: Picture, path: str | Path) -> Path:
    """Write uint8 (H, W, 3) or (H, W) to a PNG file, all or nothing; folders are made."""
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
        raise ClearwingError("picture", f"array {picture.shape} {picture.dtype}", "give uint8 (H, W, 3) or (H, W)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
    return path


def curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw loss and accuracy of train, val and test against the epoch; what was not recorded is left out.

    A row has `epoch` and any of `train_loss`, `val_loss`, `test_loss`, `train_accuracy` ... (in [0, 1]).
    The file's suffix says PNG or SVG.
    """
    kinds = [k for k in ("loss", "accuracy") if any(name.endswith(f"_{k}") for row in metrics for name in row)]
    if not kinds:
        raise ClearwingError("metrics", f"{len(metrics)} rows", "give rows with epoch and train_loss or train_accuracy")
    figure = Figure(figsize=(4.8 * len(kinds), 3.4), layout="constrained", facecolor="white")
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        for split, colour in (("train", BLUE), ("val", ORANGE), ("test", GREEN)):
            rows = [(row["epoch"], row[f"{split}_{kind}"]) for row in metrics if row.get(f"{split}_{kind}") is not None]
            if rows:
                marker = "o" if len(rows) == 1 else None
                axes.plot(*zip(*rows, strict=True), color=colour, label=split, linewidth=1.8, marker=marker)
        _plain(axes, title=kind.capitalize(), grid="y")
        axes.set_xlabel("epoch", color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if kind == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(frameon=False, labelcolor=_INK)
    return _save_figure(figure, path)


def range_curve(
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    path: str | Path,
    *,
    suggestion: float | None = None,
    minimum_tenth: float | None = None,
    title: str = "",
) -> Path:
    """Draw an LR range test: the loss of each step, faint, and their average over log lr; the suggested rates on it.

    Losses far above the beginning are cut off, so that the end of a test that diverged does not flatten the rest.
    """
    if not lrs or not len(lrs) == len(losses) == len(smoothed):
        raise ClearwingError("losses", f"{len(losses)} for {len(lrs)} rates", "give a loss a rate, at least one")
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot(lrs, losses, color=BLUE, alpha=0.3, linewidth=1, label="loss of a batch")
    axes.plot(lrs, smoothed, color=BLUE, linewidth=2, label="exponential average")
    for rate, colour, marker, what in (
        (suggestion, ORANGE, "o", "suggestion: steepest descent"),
        (minimum_tenth, GREEN, "D", "a tenth of the rate of the lowest loss"),
    ):
        if rate is not None:
            height = np.interp(math.log(rate), np.log(lrs), smoothed)
            axes.axvline(rate, color=colour, linewidth=1, linestyle=(0, (4, 3)))
            axes.plot([rate], [height], color=colour, marker=marker, linestyle="", label=f"{what}, {rate:.2g}")
    start = float(np.median(losses[: max(1, len(losses) // 5)]))
    floor, top = min(losses), max(min(max(losses), 1.4 * start), min(smoothed))
    margin = 0.06 * (top - floor) or 1.0
    axes.set_xscale("log")
    axes.set_xlim(lrs[0], lrs[-1] if lrs[-1] > lrs[0] else None)
    axes.set_ylim(floor - margin, top + margin)
    _plain(axes, title="", grid="y")
    axes.tick_params(which="minor", colors=_FAINT)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel("learning rate", color=_INK)
    axes.set_ylabel("training loss", color=_INK)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_INK, fontsize=9)
    return _save_figure(figure, path)


def confusion(matrix: Tensor | NDArray[Any] | Sequence[Sequence[int]], names: Sequence[str], path: str | Path) -> Path:
    """Draw a confusion matrix (K, K): rows true, columns predicted, shade by the row's share; counts if K <= 25."""
    counts = _numpy(matrix) if isinstance(matrix, Tensor) else np.asarray(matrix)
    K = len(names)
    if counts.shape != (K, K):
        raise ClearwingError("matrix", f"shape {counts.shape}", f"give ({K}, {K}) for {K} class names")
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(14.0, 2.6 + 0.42 * K)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 9 if K <= 25 else max(3.0, 9 * 25 / K)
    ticks = range(K)
    axes.set_xticks(ticks, names, rotation=90, fontsize=size, color=_INK, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=size, color=_INK, parse_math=False)
    axes.set_xlabel("predicted", color=_INK)
    axes.set_ylabel("true", color=_INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if K <= 25:
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[i, j] > 0.5 else _INK
            axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=size, color=colour)
    return _save_figure(figure, path)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    path: str | Path,
    *,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    label: str = "accuracy",
) -> Path:
    """Draw one horizontal bar a name, the largest on top, with intervals from `low` to `high` where given.

    Values lie in [0, 1]: accuracy by class, or IoU by method.
    """
    if not names or len(names) != len(values):
        raise ClearwingError("values", f"{len(values)} for {len(names)} names", "give one value a name, at least one")
    order = np.argsort(np.asarray(values, float), kind="stable")
    heights = np.asarray(values, float)[order]
    figure = Figure(figsize=(6.4, min(60.0, 1.0 + 0.28 * len(names))), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.barh(range(len(names)), heights, color=BLUE, height=0.66)
    if low is not None and high is not None:
        for i, k in enumerate(order):
            axes.plot([low[k], high[k]], [i, i], color=_INK, linewidth=1.4)
    axes.set_yticks(range(len(names)), [names[k] for k in order], parse_math=False, fontsize=9)
    axes.set_xlim(0, 1)
    axes.margins(y=0.01)
    _plain(axes, title="", grid="x")
    axes.set_xlabel(label, color=_INK)
    return _save_figure(figure, path)


def _numpy(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _values(maps: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    values = maps.detach().float().cpu().numpy() if isinstance(maps, Tensor) else np.asarray(maps, np.float32)
    if values.ndim < 2 or 0 in values.shape[-2:]:
        raise ClearwingError("maps", f"shape {values.shape}", "give (H, W) or (N, H, W)")
    return values


def _colour(values: NDArray[Any], signed: bool) -> Picture:
    table = matplotlib.colormaps[DIVERGING if signed else HEAT]
    return table((values + 1) / 2 if signed else values, bytes=True)[..., :3].copy()


def _pair(images: Tensor | NDArray[Any], values: NDArray[Any], argument: str) -> tuple[Picture, NDArray[Any]]:
    pictures = to_rgb(images)
    if values.shape != pictures.shape[:-1]:
        raise ClearwingError(argument, f"shape {values.shape}", f"give {pictures.shape[:-1]}, the size of the pictures")
    return pictures, values


def _each(*arrays: NDArray[Any]) -> Any:
    """Walk over the pictures of a batch, or over the one picture; the arrays share their leading shape."""
    single = max(array.ndim for array in arrays) == 3
    return zip(*((array[None] if single else array) for array in arrays), strict=True)


def _contours(drawn: Picture, masks: NDArray[Any], colour: tuple[int, int, int], width: int) -> None:
    for canvas, mask in _each(drawn, masks):
        shape = np.ascontiguousarray(mask == FOREGROUND, dtype=np.uint8)
        lines, _ = cv2.findContours(shape, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, lines, -1, colour, width, cv2.LINE_AA if width > 1 else cv2.LINE_8)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _plain(axes: Axes, *, title: str, grid: Literal["x", "y"]) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(length=0, colors=_INK, labelsize=9)
    axes.grid(axis=grid, color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _save_figure(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise ClearwingError("path", path, "give a file that ends in .png or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)
    return path
