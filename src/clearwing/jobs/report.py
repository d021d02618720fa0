"""The job `report`: everything a run holds, as one page and as PNG files."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from clearwing.config import ReportConfig
from clearwing.jobs import compare, inputs
from clearwing.jobs.evaluate import scores
from clearwing.jobs.progress import Progress
from clearwing.jobs.report_masks import Part, segment_options, segmentation, segmentations
from clearwing.jobs.report_seen import Seen, look, method_rows, mistakes, timeline
from clearwing.run import Run
from clearwing.show import draw
from clearwing.show import report as page


def report(config: ReportConfig) -> dict[str, Any]:
    """Write RUN/report.html and RUN/pictures/*.png, or compare several runs; returns what the command prints."""
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


def evaluations(run: Run, seen: Seen | None, split: str, progress: Progress) -> tuple[page.Evaluation, ...]:
    """What evaluate wrote, the report's split first; computed here where it was not run."""
    results = {
        name: result
        for name, result in run.results().items()
        if "accuracy" in result and inputs.current(run, result, f"evaluation/{name}.json", progress)
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


def specimen(seen: Seen, parts: list[Part]) -> page.Specimen:
    """One picture on the whole path. The one of median IoU, so that the head of the page promises nothing."""
    at = len(seen.pictures) // 2
    steps: dict[str, Any] = {}
    part = next((part for part in parts if part.own and part.per_image.keys() & set(seen.pictures.keys)), None)
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
