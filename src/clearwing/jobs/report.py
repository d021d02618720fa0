"""The job `report`: everything a run holds, as one page and as PNG files."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import METHODS, explain
from clearwing.attribution.views import upsample
from clearwing.config import ReportConfig, SegmentConfig
from clearwing.data.loader import Pictures, spread
from clearwing.data.preprocess import fit_geometry, read_mask, read_picture, restore
from clearwing.data.sources import Sample
from clearwing.jobs import inputs
from clearwing.jobs.evaluate import scores
from clearwing.jobs.progress import Progress
from clearwing.jobs.timeline import Glance, read_timeline
from clearwing.run import Run, read_json
from clearwing.show import draw
from clearwing.show import report as page
from clearwing.train.devices import make_fabric
from clearwing.train.predict import predict_logits
from clearwing.types import Batch, ClearwingError

LOOKS = 8  # epochs that the timeline shows, the first and the last among them
EXPLAINED = 6  # pictures that several methods are shown on
WAYS = ("decoder", "refine", "classic")  # pipelines, the one that makes the headline first
METHODS_SHOWN = ("saliency", "grad-cam", "layer-cam", "guided-backprop", "guided-grad-cam")  # quick, and asked for most


def report(config: ReportConfig) -> dict[str, Any]:
    """Write RUN/report.html and RUN/pictures/*.png, or compare several runs; returns what the command prints."""
    from clearwing.jobs import compare  # which takes parts of this file

    if compare.is_comparison(config):
        return compare.compare(config)
    run = Run.load(config.run)
    out = compare.page_file(config, run, "report.html")
    split = config.split or run.config["resolved"]["watch"]
    with Progress(config.json) as progress:
        seen = look(run, config, split, progress)
        parts = segmentations(run, progress)
        found = page.Report(
            title=run.path.resolve().name,
            when=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            facts=facts(run),
            specimen=specimen(seen, parts) if seen else None,
            data=data_facts(run),
            training=training(run),
            evaluations=evaluations(run, seen, split, progress),
            mistakes=mistakes(seen, config) if seen and seen.labels is not None else None,
            mistakes_total=len(seen.wrong()) if seen and seen.labels is not None else None,
            methods=method_rows(seen) if seen else (),
            timeline=timeline(run, config),
            segmentation=segmentation(run, parts, seen, config),
            skipped=tuple((str(key), str(reason)) for key, reason in run.config["data"]["skipped"]),
            commands=commands(run, parts, split),
            environment={key: str(value) for key, value in run.config["environment"].items()},
        )
        path = page.write_report(out, found)
        files = write_pictures(run, found)
    result = {"report": str(path), "pictures": [str(file) for file in files], "skipped": seen.skipped if seen else 0}
    return {"json": result, "text": f"report: {path}\npictures: {run.file('pictures')} ({len(files)} PNG files)"}


class Seen:
    """A split as the network sees it: the pictures, its logits, and the true classes where they are known."""

    def __init__(self, run: Run, pictures: Pictures, logits: Tensor, labels: Tensor | None, larger_than: int | None):
        self.run, self.pictures, self.logits, self.labels = run, pictures, logits, labels
        self.skipped = len(pictures.skipped)
        self.names = run.class_names
        self.predicted = logits.argmax(1)
        self.confidence = logits.softmax(1).amax(1)
        self.model = run.model
        one = next(iter(pictures.subset(1).batches(1))).images
        self.layer = find_layer(self.model, one, larger_than=larger_than)

    def wrong(self) -> list[int]:
        """The misclassified, the most confident first."""
        if self.labels is None:
            return []
        found = (self.predicted != self.labels).nonzero().flatten().tolist()
        return sorted(found, key=lambda i: -float(self.confidence[i]))

    def batch(self, indices: list[int]) -> Batch:
        return next(iter(self.pictures.subset(indices).batches(len(indices))))

    def picture(self, i: int) -> Any:
        """The original picture, uint8 (H, W, 3)."""
        return draw.to_rgb(read_picture(self.pictures.samples[i].source))

    def overlays(self, indices: list[int], method: str, target: Any = "pred") -> list[Any]:
        """The method's overlay on the original picture, for each."""
        made = explain(
            self.model, self.batch(indices), method, self.layer if METHODS[method].needs_layer else None, target
        )
        full = restore(made.maps[:, 0], made.geometry)
        return [draw.overlay(self.picture(i), item) for i, item in zip(indices, full, strict=True)]

    def named(self, i: int) -> str:
        return f"{self.names[int(self.predicted[i])]} ({float(self.confidence[i]):.0%})"

    def about(self, i: int) -> str:
        said = f"predicted {self.named(i)}"
        return said if self.labels is None else f"true {self.names[int(self.labels[i])]}, {said}"


def look(run: Run, config: ReportConfig, split: str, progress: Progress) -> Seen | None:
    """The split through the network; None where its pictures are not there any more."""
    try:
        dataset = inputs.open_run_data(run, config.data, config.classes, config.pattern)
        samples = inputs.split_of(dataset, split)
    except ClearwingError as error:
        if config.data is not None or config.split is not None:
            raise
        progress.say(f"note: the report has no pictures: {error}")
        return None
    loaded = inputs.open_model(config.run)
    pictures = inputs.load_for(loaded, samples, config.limit, progress)
    inputs.told_skipped(pictures, progress)
    fabric = make_fabric(config.device, "float32")
    logits, labels = predict_logits(run.model.to(fabric.device), pictures, fabric)
    run.model.cpu()  # the galleries are a few dozen pictures
    return Seen(run, pictures, logits, labels if len(labels) else None, config.larger_than)


def facts(run: Run) -> dict[str, str]:
    """What kind of network it is."""
    made, resolved = run.config["model"], run.config["resolved"]
    parameters = sum(p.numel() for p in run.model.parameters())
    return {
        "Network": str(made["name"]),
        "Parameters": f"{parameters:,}",
        "Input": f"{resolved['size']} x {resolved['size']} px",
        "Classes": str(len(run.class_names)),
        "Start": str(run.config["train"]["weights"] or "from scratch"),
    }


def data_facts(run: Run) -> page.DataFacts:
    data, watch = run.config["data"], run.config["resolved"]["watch"]
    notes = list(data["notes"])
    if watch == "test":
        notes.append("training watched the test split; its accuracy is no measure of new pictures if it guided choices")
    if (limit := run.config["train"]["limit"]) is not None:
        notes.append(f"the run used at most {limit:,} pictures of each split (--limit); scores here are of all")
    return page.DataFacts(data["name"], run.class_names, data["splits"], tuple(notes))


def training(run: Run) -> page.Training | None:
    """The epochs; figures of the watched split under its own name."""
    watch = run.config["resolved"]["watch"]
    rows = tuple(
        {(key.replace("val_", f"{watch}_", 1) if key.startswith("val_") else key): value for key, value in row.items()}
        for row in run.metrics
    )
    if not rows:
        return None
    return page.Training(rows, sum(row["seconds"] for row in rows))


def current(run: Run, result: dict[str, Any], name: str, progress: Progress) -> bool:
    """Whether a result is of the weights that the run holds now, or does not say of which."""
    held = inputs.weights_hash(run, result.get("weights", "last"))
    if result.get("weights_sha256") in (None, held):
        return True
    progress.say(f"note: the results in {name} are of other weights; left out")
    return False


def evaluations(run: Run, seen: Seen | None, split: str, progress: Progress) -> tuple[page.Evaluation, ...]:
    """What evaluate wrote, the report's split first; computed here where it was not run."""
    results = {
        name: result
        for name, result in run.results().items()
        if "accuracy" in result and current(run, result, f"evaluation/{name}.json", progress)
    }
    if split not in results and seen is not None and seen.labels is not None:
        results[split] = scores(seen.logits, seen.labels, run.class_names) | {"split": split, "weights": "last"}
    ordered = sorted(results.items(), key=lambda item: (item[0] != split, item[1]["weights"] != "last", item[0]))
    made = []
    for _, result in ordered:
        rows = tuple(
            page.ClassScore(name, row["n"], page.Estimate(row["accuracy"] or 0.0, *row["ci95"]))
            for name, row in result["per_class"].items()
        )
        made.append(
            page.Evaluation(
                result["split"],
                result["n"],
                page.Estimate(result["accuracy"], *result["ci95"]),
                result["loss"],
                result["top5"] if len(result["class_names"]) > 5 else None,
                result["weights"],
                rows,
                tuple(tuple(row) for row in result["confusion"]),
                tuple(result["class_names"]),
                tuple(result.get("notes", ())),
            )
        )
    return tuple(made)


def mistakes(seen: Seen, config: ReportConfig) -> tuple[page.Mistake, ...]:
    """The misclassified with the Grad-CAM of the class they were taken for and of the class they are."""
    wrong = seen.wrong()[: config.most]
    if not wrong or seen.labels is None:
        return ()
    taken = seen.overlays(wrong, "grad-cam", seen.predicted[wrong])
    true = seen.overlays(wrong, "grad-cam", seen.labels[wrong])
    return tuple(
        page.Mistake(
            seen.pictures.keys[i],
            seen.names[int(seen.labels[i])],
            seen.names[int(seen.predicted[i])],
            float(seen.confidence[i]),
            seen.picture(i),
            taken[at],
            true[at],
        )
        for at, i in enumerate(wrong)
    )


def method_rows(seen: Seen) -> tuple[page.MethodRow, ...]:
    """Pictures spread over the split as several methods see them."""
    shown = spread(len(seen.pictures), EXPLAINED)
    drawn = {name: seen.overlays(shown, name) for name in METHODS_SHOWN}
    return tuple(
        page.MethodRow(seen.pictures.keys[i], seen.picture(i), {name: drawn[name][at] for name in drawn}, seen.about(i))
        for at, i in enumerate(shown)
    )


def timeline(run: Run, config: ReportConfig) -> page.Timeline | None:
    """Where the network looked after some of the epochs, and how well that covered the drawn masks; None without."""
    glances = read_timeline(run)
    if not glances:
        return None
    about = "A mask is where the map lies above its own Otsu threshold, at the network's size; nothing was fitted to"
    about += " the drawn masks. The dashed line is the same rule on a Gaussian in the centre, without a network."
    return page.Timeline(
        timeline_rows(run, glances, config),
        {one.epoch: one.mask_iou for one in glances if one.mask_iou is not None},
        len(glances[-1].iou),
        glances[-1].baseline,
        about,
    )


def timeline_rows(run: Run, glances: list[Glance], config: ReportConfig) -> tuple[page.TimelineRow, ...]:
    """The pictures that are still there, with their maps after epochs spread over the run."""
    watch, size = run.config["resolved"]["watch"], run.config["resolved"]["size"]
    try:
        dataset = inputs.open_run_data(run, config.data, config.classes, config.pattern)
        samples = {sample.key: sample for sample in inputs.split_of(dataset, watch)}
    except ClearwingError:
        return ()  # `look` has said it
    last = len(glances) - 1
    shown = [glances[i] for i in sorted({round(k * last / (LOOKS - 1)) for k in range(LOOKS)})]
    rows = []
    for i, key in enumerate(shown[-1].keys):
        if key not in samples:
            continue
        picture = draw.to_rgb(read_picture(samples[key].source))
        place = fit_geometry(picture.shape[0], picture.shape[1], size, run.config["train"]["fit"])
        maps = torch.stack([upsample(one.maps[i], *place.size) for one in shown])
        looks = {
            one.epoch: (draw.overlay(picture, full), float(one.probabilities[i]))
            for one, full in zip(shown, restore(maps[None], [place])[0], strict=True)
        }
        rows.append(page.TimelineRow(key, run.class_names[int(shown[-1].labels[i])], picture, looks))
    return tuple(rows)


class Part:
    """What one call of segment left in the run."""

    def __init__(self, folder: Path, result: dict[str, Any]) -> None:
        self.folder, self.result = folder, result
        self.pipeline = str(result["pipeline"])  # "refine", "refine (changed)"
        self.per_image: dict[str, float] = result["per_image"]
        self.calibration = int(result.get("masks_used_for_calibration") or 0)
        self.name = self.pipeline + (", calibrated" if self.calibration else "")

    @property
    def way(self) -> str:
        return self.pipeline.removesuffix(" (changed)")

    @property
    def rank(self) -> tuple[Any, ...]:
        """The headline's is the lowest: scored, no drawn mask looked at, the best practice, as it comes."""
        way = WAYS.index(self.way) if self.way in WAYS else len(WAYS)
        return (not self.per_image, self.calibration > 0, way, self.pipeline != self.way)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the call was told, where its manifest is still there."""
        for path in sorted(self.folder.glob("manifest-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                return dict(json.loads(file.readline()).get("settings", {}))
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
        elif current(run, result, name, progress):
            parts.append(Part(file.parent, result))
    return sorted(parts, key=lambda part: part.rank)


def segmentation(run: Run, parts: list[Part], seen: Seen | None, config: ReportConfig) -> page.Segmentation | None:
    """The pipelines and baselines side by side, and the masks of the first: how good, which missed, and why."""
    if not parts:
        return None
    first, result = parts[0], parts[0].result
    samples = samples_by_key(run, first, config)
    ranked = drawable(first, samples, first.per_image or samples)
    refines = first.way != "decoder" and result["threshold"].get("recipe", {}).get("refine", "none") != "none"
    return page.Segmentation(
        result["split"],
        result["n"],
        pipelines(parts),
        masks_used_for_calibration=first.calibration,
        chosen="the threshold" if first.way == "decoder" else "method, layers and threshold",
        threshold=threshold_words(result["threshold"]),
        per_image=tuple(first.per_image.values()),
        gallery=outlined(first, samples, evenly(ranked, config.most)),
        notes=tuple(result["notes"]),
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
        if part.name in rows or part.result["split"] != first.result["split"] or part.result["mean_iou"] is None:
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
        "everything": "every pixel foreground",
        "centre-gaussian": "a Gaussian on the centre, 80th percentile, 5x5 max-pool; no network",
        "centre-box-grabcut": "GrabCut from a centre box; no network",
        "edge-map": f"{same} on the picture's edges; no network",
        "untrained-network": f"{same} on the network before training",
    }


def about_pipeline(result: dict[str, Any]) -> str:
    """How the masks were made, in a few words."""
    threshold = result["threshold"]
    if (decoder := threshold.get("decoder")) is not None:
        taught = decoder["pictures"] - decoder["without_mask"]
        by = f"{decoder['masks_used']} drawn masks" if decoder.get("masks_used") else "the network alone"
        words = ["a decoder on the network's features", "one forward pass"]
        words += [f"taught by {taught:,} pictures' masks from {by}"]
    else:
        how = threshold["recipe"]
        method = METHOD_NAMES.get(how["method"], how["method"])
        words = [f"{method} at {' + '.join(threshold['layers'])}" if threshold["layers"] else method]
        words += [threshold_words(threshold)]
        words += [f"{how['pool']}x{how['pool']} max-pool"] if how["pool"] > 1 else []
        words += ["GrabCut"] if how["refine"] == "grabcut" else []
    if (chosen := threshold.get("chosen_on")) is not None:
        words += [f"chosen among {chosen['tried']} on {chosen['masks']} drawn masks"]
    return ", ".join(words)


def threshold_words(threshold: dict[str, Any]) -> str:
    """The threshold as a reader knows it."""
    how, value = str(threshold["how"]), threshold.get("value")
    if how.startswith("percentile:"):
        return f"percentile {value:g}"
    if how == "probability":
        return f"probability {value:g}"
    return {"otsu": "Otsu"}.get(how, how)


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
    place = {key: i for i, key in enumerate(seen.pictures.keys)} if seen is not None else {}
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


def specimen(seen: Seen, parts: list[Part]) -> page.Specimen:
    """One picture on the whole path. The one of median IoU, so that the head of the page promises nothing."""
    at = len(seen.pictures) // 2
    steps: dict[str, Any] = {}
    part = next((part for part in parts if part.per_image.keys() & set(seen.pictures.keys)), None)
    if part is not None:
        ranked = sorted((key for key in part.per_image if key in seen.pictures.keys), key=lambda k: part.per_image[k])
        at = seen.pictures.keys.index(ranked[len(ranked) // 2])
    key, picture = seen.pictures.keys[at], seen.picture(at)
    steps["picture"] = picture
    steps["guided backprop"] = seen.overlays([at], "guided-backprop")[0]
    steps["Grad-CAM"] = seen.overlays([at], "grad-cam")[0]
    about = seen.about(at)
    if part is not None:
        if (mask := part.mask(key)) is not None:
            steps["mask"] = draw.outline(picture, mask)
        about += f"; the picture of median IoU, {part.per_image[key]:.2f}"
    return page.Specimen(key, steps, about)


def commands(run: Run, parts: list[Part], split: str) -> tuple[str, ...]:
    """How to do it again."""
    where = run.config["data"]["where"]
    lines = [f"clearwing train --config {run.path}/config.json {where} --out {run.path}-again"]
    if run.config["train"].get("time_budget"):
        lines[0] += f" --replay {run.path}/plan.json" if run.file("plan.json").is_file() else ""
    lines.append(f"clearwing evaluate {run.path} {where} --split {split}")
    lines += [
        f"clearwing segment {run.path} {part.result.get('data', where)}{segment_options(part)} --out {part.folder}"
        for part in parts
    ]
    return (*lines, f"clearwing report {run.path}")


def segment_options(part: Part) -> str:
    """The options that make the part's masks anew, those that are not the defaults."""
    settings = part.settings
    given = {
        name: settings.get(name, getattr(SegmentConfig, name)) for name in ("masks", "limit", "size", "fit", "seed")
    }
    given |= {"pipeline": part.way, "format": part.result.get("format", "png"), "calibrate": part.calibration}
    kept = {name: value for name, value in given.items() if value != getattr(SegmentConfig, name)}
    kept = {"split": part.result["split"]} | kept | part.result.get("options", {})
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in kept.items())


def write_pictures(run: Run, found: page.Report) -> list[Path]:
    """The report's pictures as PNG files."""
    files: list[Path] = []

    def target(name: str) -> Path:
        path = run.file("pictures", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append(path)
        return path

    if found.training:
        draw.curves(found.training.metrics, target("curves.png"))
    if found.evaluations:
        first = found.evaluations[0]
        draw.confusion([list(row) for row in first.confusion], first.class_names, target("confusion.png"))
        rows = [row for row in first.per_class if row.n]
        values = [row.accuracy for row in rows]
        low, high = [v.low or 0.0 for v in values], [v.high or 0.0 for v in values]
        names = [row.name for row in rows]
        draw.bars(names, [v.value for v in values], target("per_class.png"), low=low, high=high)
    tiles: list[Any]
    if found.mistakes:
        tiles, captions = [], []
        for item in found.mistakes:
            tiles += [item.picture, item.cam_predicted, item.cam_true]
            captions += [item.key, f"taken for {item.predicted}\n{item.confidence:.0%}", f"true {item.true}"]
        draw.save_png(draw.montage(tiles, captions, columns=6, size=176), target("misclassified.png"))
    if found.methods:
        tiles, captions = [], []
        for row in found.methods:
            tiles += [row.picture, *row.maps.values()]
            captions += [row.about, *row.maps]
        columns = 1 + len(found.methods[0].maps)
        draw.save_png(draw.montage(tiles, captions, columns=columns, size=176), target("methods.png"))
    if found.timeline and found.timeline.rows:
        tiles, captions = [], []
        for line in found.timeline.rows:
            tiles += [line.picture, *(picture for picture, _ in line.looks.values())]
            captions += [line.true, *(f"epoch {epoch}: {share:.0%}" for epoch, (_, share) in line.looks.items())]
        columns = 1 + len(found.timeline.rows[0].looks)
        draw.save_png(draw.montage(tiles, captions, columns=columns, size=176), target("timeline.png"))
    if found.segmentation and found.segmentation.gallery:
        shown = found.segmentation.gallery
        captions = [f"IoU {item.iou:.2f}" if item.iou is not None else item.key for item in shown]
        draw.save_png(
            draw.montage([item.picture for item in shown], captions, columns=6, size=176), target("masks.png")
        )
    return files
