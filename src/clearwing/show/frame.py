"""What the pages share: their frame, numbers in words, pictures as data URIs, and charts as inline SVG."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clearwing.show.draw import Picture, fit
from clearwing.types import ClearwingError, atomic_path

TILE = 256
"""The longer side of a picture in a gallery, in pixels."""

Points = Sequence[tuple[float, float]]  # (x, y), x rising


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Write a page of this folder's `template` to `path`, all or nothing; it loads nothing from elsewhere.

    Raises ClearwingError where `path` is a folder.
    """
    path, here = Path(path), Path(__file__).parent
    if path.is_dir():
        raise ClearwingError("path", path, "give the name of a file, such as report.html")
    house = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    house.filters.update(
        encode=_encode, percent=_percent, number=_number, duration=duration, plain=_plain, between=_between
    )
    page = house.get_template(template).render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        script=Markup((here / "report.js").read_text(encoding="utf-8")),
        **values,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


# --- words and numbers ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Write a time as a person would: 83 -> "1 min 23 s", 7300 -> "2 h 2 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


def _between(estimate: Estimate, percent: bool = False) -> str:
    """Write the interval: "90.1 to 97.2 %" or "0.762 to 0.798", and nothing where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    if percent:
        return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f} %"
    return f"{estimate.low:.3f} to {estimate.high:.3f}".replace("-", "\N{MINUS SIGN}")


def _plain(name: object) -> str:
    return str(name).replace("_", " ")


# --- pictures ------------------------------------------------------------------------------------------------


def _encode(picture: Picture, size: int = TILE) -> dict[str, Any]:
    """Give a data URI: WebP, lossless for pictures of a few pixels, which the page shows in whole blocks."""
    small = fit(picture, size)
    pixels = max(small.shape[:2]) <= 64
    file = io.BytesIO()
    Image.fromarray(small).save(file, format="WEBP", quality=85, lossless=pixels, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {"uri": uri, "height": small.shape[0], "width": small.shape[1], "pixels": pixels}


# --- charts: coordinates here, drawn as inline SVG by the template ---------------------------------------------

_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 12, 30
_SLOTS = 150
"""How many places along a chart tell their values when they are pointed at."""


def finite(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """The points (row[x], row[y]) of the rows that have them, but NaN and infinity."""
    points = [(float(row[x]), float(row[y])) for row in rows if row.get(y) is not None]
    return [point for point in points if math.isfinite(point[1])]


def chart(
    title: str,
    series: Mapping[str, Points],
    *,
    percent: bool = False,
    across: str = "epoch",
    styles: Mapping[str, str] | None = None,
    size: tuple[int, int] = (380, 232),
) -> dict[str, Any]:
    """Place the lines of `series` in a box of `size` for the macro `chart`.

    `across` names one step of x: with "epoch" ticks are whole and a place tells the values at it; with a unit of time
    x begins at 0 and a place tells the latest values. `styles` are the lines' CSS classes, their names by default.
    """
    width, height = size
    timed = across != "epoch"
    points = [point for rows in series.values() for point in rows]
    x_low, x_high = 0.0 if timed else min(x for x, _ in points), max(x for x, _ in points)
    top, bottom = max(y for _, y in points), min(y for _, y in points)
    y_ticks = ticks(math.floor(bottom * 5) / 5 if percent else 0.0, 1.0 if percent else top)
    if top > y_ticks[-1] and len(y_ticks) > 1:
        y_ticks.append(round(2 * y_ticks[-1] - y_ticks[-2], 10))
    y_low, y_high = y_ticks[0], max(y_ticks[-1], top)

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low) if y_high > y_low else 0.5
        return (
            round(_LEFT + along * (width - _LEFT - _RIGHT), 1),
            round(height - _BOTTOM - up * (height - _TOP - _BOTTOM), 1),
        )

    def say(y: float) -> str:
        return f"{100 * y:.1f} %" if percent else f"{y:.3g}"

    def told(x: float) -> str:
        latest = {name: [y for a, y in rows if a == x or (timed and a < x)] for name, rows in series.items()}
        return f"{across} {x:.4g}: " + ", ".join(f"{name} {say(ys[-1])}" for name, ys in latest.items() if ys)

    xs = sorted({x for x, _ in points})
    xs = xs[:: math.ceil(len(xs) / _SLOTS)]
    at = [place(x, y_low)[0] for x in xs]
    edges = [_LEFT, *((a + b) / 2 for a, b in itertools.pairwise(at)), width - _RIGHT]
    return {
        "title": title,
        "across": across,
        "size": size,
        "frame": (_LEFT, width - _RIGHT, _TOP, height - _BOTTOM),
        "x_ticks": [(place(x, y_low)[0], f"{x:g}") for x in ticks(x_low, x_high, whole=not timed)],
        "y_ticks": [(place(x_low, y)[1], f"{100 * y:.0f} %" if percent else f"{y:g}") for y in y_ticks],
        "series": [
            {
                "name": name,
                "style": (styles or {}).get(name, name),
                "line": " ".join(f"{a:g},{b:g}" for a, b in (place(*row) for row in rows)),
                "end": place(*rows[-1]),
                "last": say(rows[-1][1]),
            }
            for name, rows in series.items()
        ],
        "slots": [
            {"x": at[i], "left": round(edges[i], 1), "width": round(edges[i + 1] - edges[i], 1), "text": told(x)}
            for i, x in enumerate(xs)
        ],
    }


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)] or [low]
