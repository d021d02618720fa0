"""Write what a run found as one self-contained page: `write_report(path, Report(...))`.

The values come ready-made (numbers, names, pictures as uint8 RGB arrays); what is missing is said on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clearwing.show.draw import Picture
from clearwing.show.frame import Estimate, chart, finite, write_page
from clearwing.types import ClearwingError

MISTAKES_SHOWN, METHODS_SHOWN, TIMELINE_SHOWN, MASKS_SHOWN, CLASSES_SHOWN = 24, 8, 12, 24, 15
FAILURES_SHOWN, WRONG_REASON_SHOWN = 6, 12
"""How many cards, rows and classes the page shows at most before it folds or leaves out; it says of how many."""

ORACLE = "oracle: chosen on these masks"


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
class TimelineRow:
    """One picture as the network saw it after some epochs: {epoch: (overlay (H, W, 3), probability of the class)}."""

    key: str
    true: str
    picture: Picture
    looks: Mapping[int, tuple[Picture, float]]


@dataclass(frozen=True, eq=False)
class Timeline:
    """Where the network looked while it learned."""

    rows: tuple[TimelineRow, ...]
    mask_iou: Mapping[int, float] = field(default_factory=dict)  # by epoch, of masks made of the maps
    masked: int = 0  # pictures that `mask_iou` is the mean of
    baseline: float | None = None  # the same rule on a Gaussian in the centre
    about: str = ""  # how a map becomes a mask


@dataclass(frozen=True, eq=False)
class MaskPicture:
    """One picture with the outlines of mask and truth drawn; `iou` None where there is no truth."""

    key: str
    picture: Picture
    iou: float | None = None
    about: str = ""
    looked: Picture | None = None  # where the network looked, as an overlay


@dataclass(frozen=True)
class Pipeline:
    """One way to masks; `difference` is the headline's mean IoU less this one's, with a paired interval."""

    name: str
    kind: str  # "first" | "other" | "baseline"
    iou: Estimate
    difference: Estimate | None = None
    about: str = ""
    best: bool = False  # of the baselines


@dataclass(frozen=True)
class Metric:
    """A mean over all scored pictures, from 0 to 1."""

    name: str
    value: Estimate
    about: str = ""


@dataclass(frozen=True)
class ThresholdCurve:
    """The mean IoU of maps that are cut at one threshold for all pictures, and what else needs no chosen threshold.

    The peak and the accuracies of boxes are oracles: they are the best of all thresholds on the very masks that score.
    """

    thresholds: tuple[float, ...]
    mean_iou: tuple[float, ...]
    peak: tuple[float, float]  # mean IoU, threshold
    n: int
    pxap: float | None = None
    max_box_acc: float | None = None
    max_box_acc_v2: float | None = None


@dataclass(frozen=True, eq=False)
class Cause:
    """Masks that missed their object for one reason: how many, and some of them."""

    name: str
    n: int
    about: str = ""
    pictures: tuple[MaskPicture, ...] = ()


@dataclass(frozen=True, eq=False)
class WrongReason:
    """Pictures with the right class whose mask misses the object: how many, and some of them."""

    n: int
    pictures: tuple[MaskPicture, ...] = ()


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The masks of one split; all but `pipelines` is of the first of these, the headline."""

    split: str
    n: int  # masks written
    pipelines: tuple[Pipeline, ...] = ()
    masks_used_for_calibration: int = 0  # so many drawn masks chose how masks are made
    chosen: str = ""  # what they chose
    threshold: str = ""
    per_image: tuple[float, ...] = ()  # IoU of every scored picture
    gallery: tuple[MaskPicture, ...] = ()
    notes: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    curve: ThresholdCurve | None = None
    causes: tuple[Cause, ...] | None = None  # None: not looked for
    wrong_reason: WrongReason | None = None  # None: the true classes are not known
    fell_back: int | None = None  # masks that are the map alone; None: nothing refines it
    no_evidence: int = 0

    @property
    def headline(self) -> Pipeline | None:
        return next((p for p in self.pipelines if p.kind == "first"), None)


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
    timeline: Timeline | None = None
    segmentation: Segmentation | None = None
    skipped: tuple[tuple[str, str], ...] = ()  # (key, reason)
    commands: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page to `path`, all or nothing; it loads nothing from elsewhere.

    Raises ClearwingError where a confusion matrix does not fit its class names, or `path` is a folder.
    """
    for evaluation in report.evaluations:
        K = len(evaluation.class_names)
        if evaluation.confusion and [len(row) for row in evaluation.confusion] != [K] * K:
            raise ClearwingError(
                "confusion", f"{len(evaluation.confusion)} rows", f"give {K} x {K} for {K} class names"
            )
    return write_page(
        path,
        "report.html.jinja",
        report=report,
        lead=report.summary or _lead(report),
        charts=_training_charts(report.training.metrics if report.training else ()),
        iou_chart=_iou_chart(report.timeline),
        masks=_spread(report.segmentation.gallery if report.segmentation else ()),
        curve_chart=_curve_chart(report.segmentation),
        iou_strip=_strip(report.segmentation.per_image if report.segmentation else ()),
        confusion=_confusion,
        limits={
            "mistakes": MISTAKES_SHOWN,
            "methods": METHODS_SHOWN,
            "timeline": TIMELINE_SHOWN,
            "masks": MASKS_SHOWN,
            "failures": FAILURES_SHOWN,
            "wrong_reason": WRONG_REASON_SHOWN,
            "classes": CLASSES_SHOWN,
        },
    )


def _lead(report: Report) -> str:
    said = []
    if report.evaluations:
        first = report.evaluations[0]
        right = round(first.accuracy.value * first.n)
        said.append(f"It names {right} of {first.n} pictures of the {first.split} split correctly.")
    segmentation = report.segmentation
    if segmentation is not None and segmentation.headline is not None:
        used = segmentation.masks_used_for_calibration
        how = f"after seeing {used} of them" if used else "without having seen one"
        value = segmentation.headline.iou.value
        said.append(f"Its masks overlap the drawn ones with a mean IoU of {value:.3f}, {how}.")
    return " ".join(said)


# --- pictures ------------------------------------------------------------------------------------------------


def _spread(gallery: Sequence[MaskPicture], most: int = MASKS_SHOWN) -> list[MaskPicture]:
    """Take at most `most` pictures, from the best IoU to the worst and evenly between; unscored ones last."""
    ordered = sorted(gallery, key=lambda item: -math.inf if item.iou is None else item.iou, reverse=True)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


# --- charts: coordinates here, drawn as inline SVG by the template ---------------------------------------------


def _training_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    for title, names in (
        ("Loss", {"train": "train_loss", "val": "val_loss", "test": "test_loss"}),
        ("Accuracy", {"train": "train_accuracy", "val": "val_accuracy", "test": "test_accuracy"}),
        ("Learning rate", {"lr": "lr"}),
    ):
        series = {label: rows for label, name in names.items() if (rows := finite(metrics, "epoch", name))}
        if series:
            charts.append(chart(title, series, percent=title == "Accuracy"))
    return charts


def _iou_chart(timeline: Timeline | None) -> dict[str, Any] | None:
    if timeline is None or not timeline.mask_iou:
        return None
    epochs = sorted(timeline.mask_iou)
    series = {"Grad-CAM": [(float(x), timeline.mask_iou[x]) for x in epochs]}
    if timeline.baseline is not None:
        series["centre"] = [(float(x), timeline.baseline) for x in epochs]
    return chart("Mask IoU", series, styles={"Grad-CAM": "train", "centre": "baseline"}, size=(760, 232))


def _curve_chart(segmentation: Segmentation | None) -> dict[str, Any] | None:
    """The IoU of the cut maps by threshold, its peak as a dot, and beside it what the masks themselves reach."""
    if segmentation is None or segmentation.curve is None:
        return None
    curve, headline = segmentation.curve, segmentation.headline
    iou, threshold = curve.peak
    maps = "maps alone, one threshold for all"
    lines = {maps: list(zip(curve.thresholds, curve.mean_iou, strict=True))}
    styles = {maps: "train", ORACLE: "oracle"}
    if headline is not None:
        name = f"{headline.name}, as scored above"
        lines[name] = [(curve.thresholds[0], headline.iou.value), (curve.thresholds[-1], headline.iou.value)]
        styles[name] = "baseline"
    common: dict[str, Any] = {"across": "threshold", "styles": styles, "size": (480, 260)}
    made = chart("Mean IoU by threshold", {ORACLE: [(threshold, iou)]} | lines, **common)
    made["slots"] = chart("", lines, **common)["slots"]  # the dot is no line that goes on to the right
    made["series"][0]["last"] = f"{iou:.3f} at {threshold:g}"
    made["series"][1]["last"] = ""  # at a threshold of 1 hardly anything is left
    return made


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
