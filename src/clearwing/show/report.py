"""Write what a run found as one self-contained page: `write_report(path, Report(...))`.

The values come ready-made (numbers, names, pictures as uint8 RGB arrays); what is missing is said on the page.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clearwing.show.draw import Picture, fit
from clearwing.types import ClearwingError, atomic_path

MISTAKES_SHOWN, METHODS_SHOWN, MASKS_SHOWN, CLASSES_SHOWN = 24, 8, 24, 15
"""How many cards, rows and classes the page shows at most before it folds or leaves out; it says of how many."""

TILE = 256
"""The longer side of a picture in a gallery, in pixels."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class DataFacts:
    """What the pictures were."""

    name: str
    class_names: tuple[str, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)  # split -> number of pictures
    notes: tuple[str, ...] = ()  # "val is a stratified 20 % slice of train", "val is the test split" ...


@dataclass(frozen=True)
class Training:
    """Rows of `metrics.jsonl`: epoch, train_loss, train_accuracy, val_*, test_*, lr, seconds, images_per_s."""

    metrics: tuple[Mapping[str, Any], ...]
    seconds: float | None = None  # wall clock of the whole training
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassScore:
    name: str
    n: int
    accuracy: Estimate


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on one split; the first of a report is its headline."""

    split: str
    n: int
    accuracy: Estimate
    loss: float | None = None
    top5: float | None = None
    weights: str = "last"  # "last" or "best"
    per_class: tuple[ClassScore, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()  # rows true, columns predicted
    class_names: tuple[str, ...] = ()  # of the rows of `confusion`
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Mistake:
    """One misclassified picture, with the Grad-CAM overlays of the class it took and of the class it was."""

    key: str
    true: str
    predicted: str
    confidence: float  # the probability of the predicted class
    picture: Picture  # (H, W, 3)
    cam_predicted: Picture | None = None
    cam_true: Picture | None = None


@dataclass(frozen=True, eq=False)
class MethodRow:
    """One picture as several methods see it, in the order given: {"saliency": (H, W, 3), ...}."""

    key: str
    picture: Picture
    maps: Mapping[str, Picture]
    about: str = ""  # "true a, predicted b (0.97)"


@dataclass(frozen=True, eq=False)
class MaskPicture:
    """One picture with the outlines of mask and truth drawn; `iou` None where there is no truth."""

    key: str
    picture: Picture
    iou: float | None = None
    about: str = ""


@dataclass(frozen=True)
class Pipeline:
    """One way to masks; `difference` is the default's mean IoU less this one's, with a paired interval."""

    name: str
    kind: str  # "default" | "recipe" | "baseline"
    iou: Estimate
    difference: Estimate | None = None
    about: str = ""


@dataclass(frozen=True, eq=False)
class Segmentation:
    split: str
    n: int  # masks written
    pipelines: tuple[Pipeline, ...] = ()
    masks_used_for_calibration: bool = False
    threshold: str = ""
    per_image: tuple[float, ...] = ()  # IoU of every scored picture under the default pipeline
    gallery: tuple[MaskPicture, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def default(self) -> Pipeline | None:
        return next((p for p in self.pipelines if p.kind == "default"), None)


@dataclass(frozen=True, eq=False)
class Specimen:
    """One picture on the whole path, for the head of the page: picture, where the network looks, mask."""

    key: str
    steps: Mapping[str, Picture]  # {"picture": (H, W, 3), "Grad-CAM": ..., "mask": ...}
    about: str = ""


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows; every part but the title may be missing."""

    title: str
    when: str = ""
    summary: str = ""  # one or two sentences; written from the numbers where empty
    facts: Mapping[str, str] = field(default_factory=dict)  # model, parameters, input size ...
    specimen: Specimen | None = None
    data: DataFacts | None = None
    training: Training | None = None
    evaluations: tuple[Evaluation, ...] = ()
    mistakes: tuple[Mistake, ...] | None = None  # None: not looked at; (): there are none
    mistakes_total: int | None = None
    methods: tuple[MethodRow, ...] = ()
    segmentation: Segmentation | None = None
    skipped: tuple[tuple[str, str], ...] = ()  # (key, reason)
    commands: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page to `path`, all or nothing; it loads nothing from elsewhere.

    Raises ClearwingError where a confusion matrix does not fit its class names, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ClearwingError("path", path, "give the name of a file, such as report.html")
    for evaluation in report.evaluations:
        K = len(evaluation.class_names)
        if evaluation.confusion and [len(row) for row in evaluation.confusion] != [K] * K:
            raise ClearwingError(
                "confusion", f"{len(evaluation.confusion)} rows", f"give {K} x {K} for {K} class names"
            )
    here = Path(__file__).parent
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
    page = house.get_template("report.html.jinja").render(
        report=report,
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        script=Markup((here / "report.js").read_text(encoding="utf-8")),
        lead=report.summary or _lead(report),
        charts=_training_charts(report.training.metrics if report.training else ()),
        masks=_spread(report.segmentation.gallery if report.segmentation else ()),
        iou_strip=_strip(report.segmentation.per_image if report.segmentation else ()),
        confusion=_confusion,
        limits={
            "mistakes": MISTAKES_SHOWN,
            "methods": METHODS_SHOWN,
            "masks": MASKS_SHOWN,
            "classes": CLASSES_SHOWN,
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def duration(seconds: float) -> str:
    """Write a time as a person would: 83 -> "1 min 23 s", 7300 -> "2 h 2 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- words and numbers ---------------------------------------------------------------------------------------


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


def _lead(report: Report) -> str:
    said = []
    if report.evaluations:
        first = report.evaluations[0]
        right = round(first.accuracy.value * first.n)
        said.append(f"It names {right} of {first.n} pictures of the {first.split} split correctly.")
    segmentation = report.segmentation
    if segmentation is not None and segmentation.default is not None:
        how = "after seeing some of them" if segmentation.masks_used_for_calibration else "without having seen one"
        said.append(f"Its masks overlap the drawn ones with a mean IoU of {segmentation.default.iou.value:.3f}, {how}.")
    return " ".join(said)


# --- pictures ------------------------------------------------------------------------------------------------


def _encode(picture: Picture, size: int = TILE) -> dict[str, Any]:
    """Give a data URI: WebP, lossless for pictures of a few pixels, which the page shows in whole blocks."""
    small = fit(picture, size)
    pixels = max(small.shape[:2]) <= 64
    file = io.BytesIO()
    Image.fromarray(small).save(file, format="WEBP", quality=85, lossless=pixels, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {"uri": uri, "height": small.shape[0], "width": small.shape[1], "pixels": pixels}


def _spread(gallery: Sequence[MaskPicture], most: int = MASKS_SHOWN) -> list[MaskPicture]:
    """Take at most `most` pictures, from the best IoU to the worst and evenly between; unscored ones last."""
    ordered = sorted(gallery, key=lambda item: -math.inf if item.iou is None else item.iou, reverse=True)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


# --- charts: coordinates here, drawn as inline SVG by the template ---------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 232, 42, 10, 12, 30


def _training_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    for title, names in (
        ("Loss", {"train": "train_loss", "val": "val_loss", "test": "test_loss"}),
        ("Accuracy", {"train": "train_accuracy", "val": "val_accuracy", "test": "test_accuracy"}),
        ("Learning rate", {"lr": "lr"}),
    ):
        series = {}
        for label, name in names.items():
            rows = [(float(row["epoch"]), float(row[name])) for row in metrics if row.get(name) is not None]
            rows = [(x, y) for x, y in rows if math.isfinite(y)]
            if rows:
                series[label] = rows
        if series:
            charts.append(_chart(title, series, percent=title == "Accuracy"))
    return charts


def _chart(title: str, series: Mapping[str, list[tuple[float, float]]], *, percent: bool) -> dict[str, Any]:
    points = [point for rows in series.values() for point in rows]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    top, bottom = max(y for _, y in points), min(y for _, y in points)
    y_ticks = _ticks(math.floor(bottom * 5) / 5 if percent else 0.0, 1.0 if percent else top)
    if top > y_ticks[-1] and len(y_ticks) > 1:
        y_ticks.append(round(2 * y_ticks[-1] - y_ticks[-2], 10))
    y_low, y_high = y_ticks[0], max(y_ticks[-1], top)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low) if y_high > y_low else 0.5
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    def say(y: float) -> str:
        return f"{100 * y:.1f} %" if percent else f"{y:.3g}"

    def label(y: float) -> str:
        return f"{100 * y:.0f} %" if percent else f"{y:g}"

    epochs = sorted({x for x, _ in points})
    epochs = epochs[:: math.ceil(len(epochs) / 150)]
    at = {name: dict(rows) for name, rows in series.items()}
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(epochs))
    return {
        "title": title,
        "size": (_WIDTH, _HEIGHT),
        "frame": (_LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM),
        "x_ticks": [(place(x, y_low)[0], f"{x:g}") for x in _ticks(x_low, x_high, whole=True)],
        "y_ticks": [(place(x_low, y)[1], label(y)) for y in y_ticks],
        "series": [
            {
                "name": name,
                "line": " ".join(f"{a:g},{b:g}" for a, b in (place(*row) for row in rows)),
                "end": place(*rows[-1]),
                "last": say(rows[-1][1]),
            }
            for name, rows in series.items()
        ],
        "slots": [
            {
                "x": place(x, y_low)[0],
                "step": round(step, 2),
                "text": f"epoch {x:g}: " + ", ".join(f"{name} {say(ys[x])}" for name, ys in at.items() if x in ys),
            }
            for x in epochs
        ],
    }


def _ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
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


def _strip(values: Iterable[float]) -> dict[str, Any] | None:
    """The IoU of every picture, sorted, as a path in a box of 1000 x 100; at most 250 steps."""
    ordered = np.sort(np.asarray(list(values), float))[::-1]
    ordered = ordered[np.isfinite(ordered)]
    if ordered.size < 2:
        return None
    taken = ordered[np.linspace(0, ordered.size - 1, min(250, ordered.size)).round().astype(int)]
    width = 1000 / taken.size
    path = "M0,100 " + " ".join(
        f"L{i * width:.1f},{100 - 100 * y:.1f} L{(i + 1) * width:.1f},{100 - 100 * y:.1f}" for i, y in enumerate(taken)
    )
    return {
        "path": path + " L1000,100 Z",
        "n": int(ordered.size),
        "best": float(ordered[0]),
        "median": float(np.median(ordered)),
        "worst": float(ordered[-1]),
        "failed": int((ordered < 0.5).sum()),
    }


def _confusion(evaluation: Evaluation) -> dict[str, Any] | None:
    """The table of the classes with most errors, the most frequent mix-ups, and all cells for the fold-out."""
    if not evaluation.confusion:
        return None
    counts, names = np.asarray(evaluation.confusion, int), evaluation.class_names
    K = len(names)
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    chosen = range(K) if K <= CLASSES_SHOWN else np.argsort(-errors, kind="stable")[:CLASSES_SHOWN].tolist()
    totals = np.maximum(counts.sum(1), 1)
    rows = [
        {
            "name": names[i],
            "n": int(counts[i].sum()),
            "cells": [(int(counts[i, j]), round(float(counts[i, j] / totals[i]), 3), i == j) for j in chosen],
            "elsewhere": int(counts[i].sum() - counts[i, list(chosen)].sum()),
        }
        for i in chosen
    ]
    off = counts - np.diag(counts.diagonal())
    pairs = [(int(i), int(j)) for i, j in zip(*np.nonzero(off), strict=True)]
    pairs.sort(key=lambda pair: (-off[pair], -off[pair] / totals[pair[0]]))
    cells = [
        (int(i), int(j), int(counts[i, j]), round(float(counts[i, j] / totals[i]), 3))
        for i, j in zip(*np.nonzero(counts), strict=True)
    ]
    return {
        "names": [names[i] for i in chosen],
        "rows": rows,
        "total": K,
        "folded": K > CLASSES_SHOWN,
        "pairs": [(names[i], names[j], int(off[i, j]), int(totals[i])) for i, j in pairs[:8]],
        "all": [(names[i], names[j], n, i, j, share) for i, j, n, share in cells],
    }
