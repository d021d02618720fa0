"""Scores of masks, picture by picture, and what all blocks of a manifest come to."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clearwing.masks import formats
from clearwing.measure.curves import Curve, max_box_accuracy, threshold_curve
from clearwing.measure.failures import CAUSES, causes, wrong_reason
from clearwing.measure.overlap import bootstrap_interval, boundary_f, box_of, dice, iou, mean_class_iou

BINS = 100
"""Steps of the threshold curve that is kept in the results."""
METRICS = {"iou": iou, "miou": mean_class_iou, "dice": dice, "boundary_f": boundary_f}


def scores_of(
    masks: Mapping[str, Sequence[Tensor]],
    truths: Mapping[int, Tensor],
    right: Sequence[bool | None],
    empty: Sequence[bool] | None,
) -> list[dict[str, Any]]:
    """The scores of the pictures of `truths` in their order: every metric of "masks", and the IoU of every rival.

    right, whether the network names a picture rightly, is by position in the block, like the keys of `truths`.
    """
    own, true = list(masks["masks"]), list(truths.values())
    values = {name: metric(own, true).tolist() for name, metric in METRICS.items()}
    against = {name: iou(list(of), true).tolist() for name, of in masks.items() if name != "masks"}
    named = [right[i] for i in truths]
    why = causes(own, true, right_class=[known is not False for known in named], empty_map=empty)
    found = []
    for i in range(len(true)):
        score: dict[str, Any] = {name: value[i] for name, value in values.items()}
        score |= {"rivals": {name: value[i] for name, value in against.items()}, "right": named[i], "cause": why[i]}
        found.append(score)
    return found


def curve_sums(maps: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[str, Any]:
    """What adds up to the curves of all pictures, of maps (height, width) scaled to [0, 1] each for itself."""
    curve = threshold_curve(list(maps), list(truths), bins=BINS, normalise=True)
    there = [i for i, truth in enumerate(truths) if bool((truth == 1).any())]  # an empty truth has no box
    sums: dict[str, Any] = {
        "n": len(truths),
        "iou": curve.iou.double().sum(0).tolist(),
        "both": curve.both.long().sum(0).tolist(),
        "claimed": curve.claimed.long().sum(0).tolist(),
        "true": int(curve.true.long().sum()),
        "boxes": len(there),
    }
    if there:
        true_boxes = torch.cat([box_of(truths[i][None] == 1) for i in there])
        found = max_box_accuracy([maps[i] for i in there], true_boxes, steps=BINS, normalise=True)
        levels = torch.tensor(found.levels)[:, None, None]
        sums |= {"largest": (found.largest >= 0.5).sum(0).tolist(), "best": (found.best >= levels).sum(1).tolist()}
    return sums


class Tally:
    """All blocks of a manifest, added up: scores by picture, the rest as counts."""

    def __init__(self, rivals: Sequence[str]) -> None:
        self.rivals = list(rivals)
        self.records: dict[str, dict[str, Any]] = {}
        self.skipped: list[list[str]] = []
        self.unscored: list[list[str]] = []
        self.seen: set[str] = set()
        self.curve: dict[str, Any] = {}

    @property
    def n(self) -> int:
        return len(self.records)

    def add(self, block: dict[str, Any]) -> None:
        """One line of the manifest; a picture that is there twice counts once."""
        fresh = [record for record in block["pictures"] if record["key"] not in self.seen]
        new = {record["key"] for record in fresh}
        self.seen |= new
        for record in fresh:
            if "skipped" in record:
                self.skipped.append([record["key"], record["skipped"]])
            else:
                self.records[record["key"]] = record
        self.unscored += [item for item in block.get("unscored", []) if item[0] in new]
        if len(fresh) == len(block["pictures"]) and block.get("curve"):
            self.curve = added(self.curve, block["curve"])

    def in_order(self, order: Mapping[str, int]) -> list[dict[str, Any]]:
        return sorted(self.records.values(), key=lambda record: order.get(record["key"], len(order)))

    def summary(self, seed: int, order: Mapping[str, int]) -> dict[str, Any]:
        """Means, bootstrap intervals, paired differences to every baseline, causes and curves."""
        records = self.in_order(order)
        scored = [record for record in records if "iou" in record]
        own = torch.tensor([record["iou"] for record in scored], dtype=torch.float64)

        def interval(values: Tensor) -> list[float] | None:  # one picture says nothing of how others vary
            return list(bootstrap_interval(values, seed=seed)) if len(values) > 1 else None

        result: dict[str, Any] = {
            "mean_iou": float(own.mean()) if scored else None,
            "ci95": interval(own) if scored else None,
            "per_image": {record["key"]: record["iou"] for record in scored},
            "scored": len(scored),
            "n": len(records),
            "fell_back": sum(record["fell_back"] for record in records),
            "fell_back_pictures": [record["key"] for record in records if record["fell_back"]],
            "no_evidence": sum(record["empty"] for record in records),
            "no_evidence_pictures": [record["key"] for record in records if record["empty"]],
            "skipped": len(self.skipped),
            "skipped_pictures": self.skipped,
            "unscored": self.unscored if scored else [u for u in self.unscored if "no mask" not in u[1]],
            "files": {record["key"]: record["file"] for record in records if "file" in record},
        }
        parts = ("baselines", "baseline_ci95", "differences", "baseline_per_image", "metrics", "failures")
        result |= {part: {} for part in parts}
        if not scored:
            return result
        for name in METRICS:
            values = torch.tensor([record[name] for record in scored], dtype=torch.float64)
            result["metrics"][name] = {"mean": float(values.mean()), "ci95": interval(values)}
        for name in self.rivals:
            other = torch.tensor([record["rivals"][name] for record in scored], dtype=torch.float64)
            result["baselines"][name] = float(other.mean())
            result["baseline_ci95"][name] = interval(other)
            result["differences"][name] = {"mean": float((own - other).mean()), "ci95": interval(own - other)}
            result["baseline_per_image"][name] = {record["key"]: record["rivals"][name] for record in scored}
        if self.rivals:
            result["best_baseline"] = max(self.rivals, key=lambda name: result["baselines"][name])
        result["failures"] = {why: [r["key"] for r in scored if r["cause"] == why] for why in CAUSES}
        wrong = wrong_reason(own, torch.tensor([bool(record["right"]) for record in scored])).tolist()
        result["wrong_reason"] = [record["key"] for record, is_wrong in zip(scored, wrong, strict=True) if is_wrong]
        result["curve"] = curve_figures(self.curve) if self.curve else None
        return result

    def boxes_csv(self, order: Mapping[str, int], names: Sequence[str]) -> str:
        """A line a picture: its class and the box of its mask, x, y, width, height in its own pixels."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["key", "class", "probability", "x", "y", "width", "height", "share"])
        for record in self.in_order(order):
            k = record.get("class")
            name = "" if k is None else names[k] if k < len(names) else k
            box = record["box"] or ["", "", "", ""]
            writer.writerow([record["key"], name, record.get("probability", ""), *box, record["share"]])
        return table.getvalue()

    def coco(self, order: Mapping[str, int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The entries of pictures and of their masks, numbered from 1."""
        images, annotations = [], []
        for number, record in enumerate(self.in_order(order), 1):
            size = {"width": record["width"], "height": record["height"]}
            images.append(formats.coco_image(id=number, file_name=record["key"], **size))
            if record.get("coco"):
                category = record.get("class", 0) + 1
                annotations.append(record["coco"] | {"id": number, "image_id": number, "category_id": category})
        return images, annotations


def added(sums: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two results of `curve_sums` as one."""
    return {
        key: plus(sums[key], more[key]) if key in sums and key in more else sums.get(key, more.get(key))
        for key in (*more, *sums)
    }


def plus(a: Any, b: Any) -> Any:
    return [plus(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b


def curve_figures(sums: dict[str, Any]) -> dict[str, Any]:
    """The IoU at every threshold, PxAP and MaxBoxAcc of all pictures, and the peak, which is an oracle: it looks at the
    masks it is scored on."""
    thresholds = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    both, claimed, true = (torch.tensor([sums[key]]) for key in ("both", "claimed", "true"))
    mean = [value / sums["n"] for value in sums["iou"]]
    peak = max(range(len(mean)), key=lambda t: mean[t])
    figures: dict[str, Any] = {
        "n": sums["n"],
        "thresholds": thresholds.tolist(),
        "mean_iou": mean,
        "peak_iou_oracle": {"value": mean[peak], "threshold": float(thresholds[peak])},
    }
    if sums["boxes"]:
        figures |= {
            "pxap": Curve(thresholds, both, claimed, true).pxap,
            "max_box_acc_oracle": max(sums["largest"]) / sums["boxes"],
            "max_box_acc_v2_oracle": sum(max(level) for level in sums["best"]) / len(sums["best"]) / sums["boxes"],
        }
    return figures
