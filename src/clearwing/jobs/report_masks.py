"""The parts of a report that show masks: what `segment` left in a run, how good it is, which masks missed, and why."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearwing.config import ReportConfig, SegmentConfig
from clearwing.data.preprocess import read_mask, read_picture
from clearwing.data.sources import Sample
from clearwing.jobs import inputs
from clearwing.jobs.manifest import manifest_lines
from clearwing.jobs.progress import Progress
from clearwing.jobs.report_seen import Seen
from clearwing.run import Run, read_json
from clearwing.show import draw
from clearwing.show import report as page
from clearwing.types import ClearwingError

WAYS = ("decoder", "refine", "classic")  # pipelines, the one that makes the headline first


class Part:
    """What one call of segment left in the run; `own`, whether of the data that the run was trained on."""

    def __init__(self, folder: Path, result: dict[str, Any], own: bool = True) -> None:
        self.folder, self.result, self.own = folder, result, own
        self.pipeline = str(result["pipeline"])  # "refine", "refine (changed)"
        self.per_image: dict[str, float] = result["per_image"]
        self.calibration = int(result.get("masks_used_for_calibration") or 0)
        self.cut = self.way == "decoder" and result["threshold"]["how"] == "grabcut"
        self.name = (f"{self.way}, cut" if self.cut else self.pipeline) + (", calibrated" if self.calibration else "")

    @property
    def way(self) -> str:
        return self.pipeline.removesuffix(" (changed)")

    @property
    def source(self) -> tuple[str, str]:
        """The data and the split; parts of one source stand side by side."""
        return str(self.result.get("data")), self.result["split"]

    @property
    def rank(self) -> tuple[Any, ...]:
        """The headline's is the lowest: scored, of the run's own data, no drawn mask looked at, the best practice, as
        it comes."""
        way = WAYS.index(self.way) if self.way in WAYS else len(WAYS)
        return (not self.per_image, not self.own, self.calibration > 0, way, self.pipeline != self.way)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the call was told, where its manifest is still there."""
        for path in sorted(self.folder.glob("manifest-*.jsonl")):
            for line in manifest_lines(path):
                if "settings" in line:
                    return dict(line["settings"])
        return {}

    def file(self, key: str) -> Path | None:
        """The PNG file of a picture's mask; None where the masks are in other files, or it is gone."""
        file = self.folder / self.result["files"].get(key, "none")
        return file if file.suffix == ".png" and file.is_file() else None

    def mask(self, key: str) -> Tensor | None:
        """A picture's mask, (H, W), from its PNG file."""
        file = self.file(key)
        return None if file is None else read_mask(file)


def segmentations(run: Run, progress: Progress) -> list[Part]:
    """What segment wrote below the run, the headline's first."""
    parts = []
    for file in sorted([*run.path.glob("*/segmentation.json"), *run.path.glob("*/*/segmentation.json")]):
        result, name = read_json(file), str(file.parent.relative_to(run.path))
        if "pipeline" not in result:
            progress.say(f"note: the results in {name} are of an earlier version; left out")
        elif inputs.current(run, result, name, progress):
            parts.append(Part(file.parent, result, inputs.own_data(run, result.get("data"))))
    return sorted(parts, key=lambda part: part.rank)


def segmentation(run: Run, parts: list[Part], seen: Seen | None, config: ReportConfig) -> page.Segmentation | None:
    """The pipelines and baselines side by side, and the masks of the first: how good, which missed, and why."""
    if not parts:
        return None
    first, result = parts[0], parts[0].result
    samples = samples_by_key(run, first, config)
    ranked = drawable(first, samples, first.per_image or samples)
    recipe = result["threshold"].get("recipe", {})
    refines = first.cut or (first.way != "decoder" and recipe.get("refine", "none") != "none")
    return page.Segmentation(
        result["split"],
        result["n"],
        pipelines(parts),
        masks_used_for_calibration=first.calibration,
        chosen=("the threshold" if first.way == "decoder" else "method, layers and threshold")
        + ("" if result["threshold"].get("chosen_on", {}).get("changed", True) else ", and nothing was surely better"),
        threshold=threshold_words(result["threshold"]),
        per_image=tuple(first.per_image.values()),
        gallery=outlined(first, samples, evenly(ranked, config.most)),
        notes=(*([] if first.own else [f"these masks are of {result['data']}"]), *result["notes"]),
        metrics=metrics(result),
        curve=threshold_curve(result.get("curve")),
        causes=failures(first, samples, config.most),
        wrong_reason=wrong_reason(first, samples, seen, config.most),
        fell_back=result["fell_back"] if refines else None,
        no_evidence=result["no_evidence"],
    )


def pipelines(parts: list[Part]) -> tuple[page.Pipeline, ...]:
    """Every way to masks with its interval; differences are of the first one's IoU, picture by picture."""
    first = parts[0]
    if not first.per_image:
        return ()
    rows: dict[str, page.Pipeline] = {}
    for part in parts:
        if part.name in rows or part.source != first.source or part.result["mean_iou"] is None:
            continue
        kind = "first" if part is first else "other"
        gained = None if part is first else difference(first.per_image, part.per_image)
        value = estimate(part.result["mean_iou"], part.result["ci95"])
        about = about_pipeline(part.result)
        if part.per_image.keys() != first.per_image.keys():
            about += f"; scored on other pictures than {first.name}, n = {len(part.per_image)}"
        rows[part.name] = page.Pipeline(part.name, kind, value, gained, about)
    names, best = about_baselines(first), first.result.get("best_baseline")
    for name, value in first.result["baselines"].items():
        found = first.result["differences"][name]
        rows[name] = page.Pipeline(
            name,
            "baseline",
            estimate(value, first.result["baseline_ci95"][name]),
            estimate(found["mean"], found["ci95"]),
            names.get(name, ""),
            name == best,
        )
    return tuple(rows.values())


def estimate(value: float, interval: Sequence[float] | None) -> page.Estimate:
    return page.Estimate(value, *(interval or ()))


def difference(own: Mapping[str, float], other: Mapping[str, float]) -> page.Estimate | None:
    """The mean of own - other with its paired interval; None where they are not of the same pictures."""
    from clearwing.measure.overlap import paired_interval

    if own.keys() != other.keys():
        return None
    a = torch.tensor([own[key] for key in own], dtype=torch.float64)
    b = torch.tensor([other[key] for key in own], dtype=torch.float64)
    return estimate(float((a - b).mean()), paired_interval(a, b) if len(a) > 1 else None)


METHOD_NAMES = {
    "hires-cam": "HiResCAM",
    "layer-cam": "LayerCAM",
    "grad-cam": "Grad-CAM",
    "grad-cam++": "Grad-CAM++",
    "saliency": "input gradient",
}


def about_baselines(part: Part) -> dict[str, str]:
    """What each baseline does, in a few words."""
    same = "the refine pipeline" if part.way == "decoder" else "the same pipeline"
    return {
        "everything": "all that the network sees, foreground",
        "centre-gaussian": "a Gaussian on the centre, 80th percentile, 5x5 max-pool; no network",
        "centre-box-grabcut": "GrabCut from a centre box; no network",
        "edge-map": f"{same} on the picture's edges; no network",
        "untrained-network": f"{same} on the network before training",
    }


def about_pipeline(result: dict[str, Any]) -> str:
    """How the masks were made, in a few words."""
    threshold = result["threshold"]
    if (decoder := threshold.get("decoder")) is not None:
        rounds = decoder.get("rounds") or [decoder]  # an earlier version knew of one
        taught = decoder["pictures"] - rounds[-1]["without_mask"]
        by = f"{decoder['masks_used']} drawn masks" if decoder.get("masks_used") else "the network alone"
        cut = threshold["how"] == "grabcut"
        words = ["a decoder on the network's features", "its masks cut by GrabCut" if cut else "one forward pass"]
        words += [f"taught by {taught:,} pictures' masks from {by}"]
    else:
        how = threshold["recipe"]
        method = METHOD_NAMES.get(how["method"], how["method"])
        words = [f"{method} at {' + '.join(threshold['layers'])}" if threshold["layers"] else method]
        words += [threshold_words(threshold)]
        words += [f"{how['pool']}x{how['pool']} max-pool"] if how["pool"] > 1 else []
        words += ["GrabCut"] if how["refine"] == "grabcut" else []
    if (chosen := threshold.get("chosen_on")) is not None:
        kept = "chosen among" if chosen.get("changed", True) else "unchanged, for nothing was surely better among"
        words += [f"{kept} {chosen['tried']} on {chosen['masks']} drawn masks"]
    return ", ".join(words)


def threshold_words(threshold: dict[str, Any]) -> str:
    """The threshold as a reader knows it."""
    how, value = str(threshold["how"]), threshold.get("value")
    if how.startswith("percentile:"):
        return f"percentile {value:g}"
    if how == "probability":
        return f"probability {value:g}"
    return {"otsu": "Otsu", "grabcut": "cut by GrabCut"}.get(how, how)


def metrics(result: dict[str, Any]) -> tuple[page.Metric, ...]:
    """The measures beside the IoU of the foreground."""
    names = {
        "miou": ("mIoU", "the mean of the IoU of foreground and background"),
        "dice": ("Dice", "twice the overlap, divided by the pixels of both masks together"),
        "boundary_f": ("Boundary F", "outlines that lie within 0.75 % of the picture's diagonal of each other"),
    }
    found = result.get("metrics", {})
    return tuple(
        page.Metric(name, estimate(found[key]["mean"], found[key]["ci95"]), about)
        for key, (name, about) in names.items()
        if key in found
    )


def threshold_curve(figures: dict[str, Any] | None) -> page.ThresholdCurve | None:
    if not figures:
        return None
    peak = figures["peak_iou_oracle"]
    return page.ThresholdCurve(
        tuple(figures["thresholds"]),
        tuple(figures["mean_iou"]),
        (peak["value"], peak["threshold"]),
        figures["n"],
        figures.get("pxap"),
        figures.get("max_box_acc_oracle"),
        figures.get("max_box_acc_v2_oracle"),
    )


CAUSES = {
    "empty map": "The map held no evidence.",
    "wrong class": "The network named another class.",
    "off the object": "Less than half of the mask lies on the object, and less than half of the object in the mask.",
    "too big": "The mask has more pixels than the object.",
    "too small": "The mask has no more pixels than the object, and misses too many of it.",
}


def failures(part: Part, samples: Mapping[str, Sample], most: int) -> tuple[page.Cause, ...] | None:
    """The masks with an IoU under 0.5 by their cause, some of each from best to worst; None where none is scored."""
    found = part.result.get("failures")
    if not found:
        return None
    most = min(page.FAILURES_SHOWN, most)
    return tuple(
        page.Cause(why, len(keys), CAUSES[why], outlined(part, samples, evenly(drawable(part, samples, keys), most)))
        for why, keys in found.items()
    )


def wrong_reason(part: Part, samples: Mapping[str, Sample], seen: Seen | None, most: int) -> page.WrongReason | None:
    """Pictures that are named rightly while the mask misses the object, the worst first and beside them where the
    network looked; None where no label or no mask is known."""
    keys = part.result.get("wrong_reason")
    if keys is None or (samples and all(sample.label is None for sample in samples.values())):
        return None
    most = min(page.WRONG_REASON_SHOWN, most)
    shown = outlined(part, samples, drawable(part, samples, keys)[::-1][:most])
    place = {key: i for i, key in enumerate(seen.pictures.keys)} if seen is not None and part.own else {}
    known = [place[item.key] for item in shown if item.key in place]
    if seen is not None and known:
        looks = dict(zip(known, seen.overlays(known, "grad-cam"), strict=True))
        shown = tuple(
            replace(item, looked=looks[place[item.key]], about=seen.named(place[item.key]))
            if item.key in place
            else item
            for item in shown
        )
    return page.WrongReason(len(keys), shown)


def samples_by_key(run: Run, part: Part, config: ReportConfig) -> dict[str, Sample]:
    """The samples that masks were made of, by their key; none where the data is gone."""
    try:
        dataset = inputs.open_like_run(run, config.data or part.result.get("data"), config.classes, config.pattern)
        return {sample.key: sample for sample in inputs.split_of(dataset, part.result["split"])}
    except ClearwingError:
        return {}


def drawable(part: Part, samples: Mapping[str, Sample], keys: Iterable[str]) -> list[str]:
    """The keys whose picture and mask are there, from the best IoU to the worst."""
    there = [key for key in keys if key in samples and part.file(key) is not None]
    return sorted(there, key=lambda key: (-part.per_image.get(key, 0.0), key))


def evenly(keys: Sequence[str], most: int) -> list[str]:
    """At most so many of the keys, in their order, both ends among them."""
    if len(keys) <= most or most < 2:
        return list(keys[: max(0, most)])
    return [keys[round(i * (len(keys) - 1) / (most - 1))] for i in range(most)]


def outlined(part: Part, samples: Mapping[str, Sample], keys: Iterable[str]) -> tuple[page.MaskPicture, ...]:
    """Pictures with the outlines of mask and truth."""
    shown = []
    for key in keys:
        mask = part.mask(key)
        if mask is None:
            continue
        sample = samples[key]
        picture = draw.to_rgb(read_picture(sample.source))
        truth = read_mask(sample.mask) if sample.mask is not None else None
        if truth is not None and truth.shape != mask.shape:
            truth = None
        shown.append(page.MaskPicture(key, draw.outline(picture, mask, truth), part.per_image.get(key)))
    return tuple(shown)


def segment_options(part: Part) -> str:
    """The options that make the part's masks anew, those that are not the defaults."""
    settings = part.settings
    given = {
        name: settings.get(name, getattr(SegmentConfig, name)) for name in ("masks", "limit", "size", "fit", "seed")
    }
    given |= {
        "pipeline": part.way,
        "format": part.result.get("format", "png"),
        "calibrate": settings.get("calibrate", part.calibration),
    }
    kept = {name: value for name, value in given.items() if value != getattr(SegmentConfig, name)}
    kept = {"split": part.result["split"]} | kept | part.result.get("options", {})
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in kept.items())
