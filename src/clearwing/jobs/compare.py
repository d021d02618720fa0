"""The job `report` for several runs: their curves, figures and settings side by side, and where they disagree."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clearwing.config import ReportConfig
from clearwing.data.preprocess import read_picture
from clearwing.data.sources import BUILT_IN, Sample
from clearwing.jobs import inputs
from clearwing.jobs.progress import Progress
from clearwing.jobs.report_masks import segmentations
from clearwing.measure.accuracy import mcnemar, wilson_interval
from clearwing.run import Run, plain
from clearwing.show import compare as page
from clearwing.show import draw
from clearwing.types import ClearwingError

PARTS = ("train", "model", "resolved", "data", "environment")
ABOUT_ONE_CALL = {f"train.{name}" for name in ("out", "json", "resume", "overwrite", "config")}


def compare(config: ReportConfig) -> dict[str, Any]:
    """Write RUN/compare.html about the runs that the command names; returns what it prints."""
    runs, data = parties(config)
    out = page_file(config, runs[0], "compare.html")
    with Progress(config.json) as progress:
        names = short_names([run.path for run in runs])
        rows = [figures(run, name, progress) for run, name in zip(runs, names, strict=True)]
        pairs, notes = paired(runs, rows, data, config)
        notes = [*remarks(runs, rows), *notes]
        differing = settings(runs, names)
        found = page.Comparison(
            when=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            runs=tuple(
                page.Contender(
                    row["name"],
                    str(run.path.resolve()),
                    tuple(run.metrics),
                    estimate(row["val_accuracy"], row["ci95"]),
                    about_accuracy(row),
                    row["watched"],
                )
                for run, row in zip(runs, rows, strict=True)
            ),
            figures=table(rows),
            settings=tuple(
                page.Setting(row["setting"], tuple(said(row["values"], name) for name in names)) for row in differing
            ),
            pairs=tuple(pairs),
            notes=tuple(notes),
            commands=(command(config),),
        )
        path = page.write_comparison(out, found)
    sentences = [page.sentence(pair) for pair in pairs]
    result = {
        "report": str(path),
        "runs": rows,
        "settings": differing,
        "paired": [as_json(pair) for pair in pairs],
        "notes": notes,
        "skipped": 0,
    }
    lines = [*map(line, rows), *sentences, *(f"note: {note}" for note in notes)]
    lines += [
        f"settings that differ: {', '.join(row['setting'] for row in differing) or 'none'}",
        f"comparison: {path}",
    ]
    return {"json": plain(result), "text": "\n".join(lines)}


def command(config: ReportConfig) -> str:
    """How to do it again."""
    named = [config.run, *([] if config.data is None else [config.data]), *config.more]
    given = {name: getattr(config, name) for name in ("split", "most", "classes", "pattern", "out")}
    options = [f"--{name}={value}" for name, value in given.items() if value != getattr(ReportConfig, name)]
    options += ["--overwrite"] if config.out else []
    return shlex.join(["clearwing", "report", *named, *options])


# --- what the command names -----------------------------------------------------------------------------------


def is_run(name: str | None) -> bool:
    """Whether this is a folder that clearwing train wrote; `demo` and the like are data, such a folder is `./demo`."""
    if name is None or name in BUILT_IN:
        return False
    return all(Path(name, file).is_file() for file in ("config.json", "classes.json"))


def is_comparison(config: ReportConfig) -> bool:
    """Whether the command names more than one run."""
    return bool(config.more) or is_run(config.data)


def parties(config: ReportConfig) -> tuple[list[Run], str | None]:
    """The runs to compare, and where the pictures are, if that is said."""
    for name, value in (("--larger-than", config.larger_than), ("--limit", config.limit)):
        if value is not None:
            raise ClearwingError(name, value, "a comparison looks at no picture anew; leave it out")
    if config.most < 0:
        raise ClearwingError("--most", config.most, "give 0 or more pictures")
    named = [name for name in (config.data, *config.more) if name is not None]
    others = [name for name in named if not is_run(name)]
    if len(others) > 1 or (others and not Path(others[0]).exists() and others[0] not in BUILT_IN):
        raise ClearwingError("RUN", others[-1], "give folders that clearwing train wrote (with config.json in them)")
    runs = [Run.load(name) for name in (config.run, *(name for name in named if name not in others))]
    if len(runs) > page.MOST_RUNS:
        raise ClearwingError("RUN", f"{len(runs)} runs", f"compare at most {page.MOST_RUNS} at a time")
    seen = set()
    for run in runs:
        if run.path.resolve() in seen:
            raise ClearwingError("RUN", run.path, "is given twice; a run cannot be compared with itself")
        seen.add(run.path.resolve())
        if not run.metrics:
            raise ClearwingError("RUN", run.path, "has no finished epoch; train it first")
    return runs, others[0] if others else None


def page_file(config: ReportConfig, run: Run, name: str) -> Path:
    """Where the page goes: into the run under `name`, or where --out says; what is there is kept unless --overwrite."""
    if config.out is None:
        return run.file(name)
    path = Path(config.out)
    if path.suffix.lower() != ".html":
        raise ClearwingError("--out", path, "end it in .html")
    if path.exists() and not config.overwrite:
        raise ClearwingError("--out", path, "exists; use --overwrite or another name")
    return path


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = next(n for n in itertools.count(1) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


# --- figures --------------------------------------------------------------------------------------------------


def figures(run: Run, name: str, progress: Progress) -> dict[str, Any]:
    """What one run came to."""
    rows, watch, data = run.metrics, run.config["resolved"]["watch"], run.config["data"]
    watched = [row for row in rows if row.get("val_accuracy") is not None]
    n = data.get("used", {}).get("watched", data["splits"].get(watch))
    last, scored = rows[-1], watched[-1] if watched else {}
    best = max(watched, key=lambda row: row["val_accuracy"], default={})
    accuracy = scored.get("val_accuracy")
    with torch.random.fork_rng(devices=[]):  # the random start is thrown away
        parameters = sum(p.numel() for p in run.build_model().parameters())
    speeds = [row["images_per_s"] for row in rows if row.get("images_per_s") is not None]
    return {
        "run": str(run.path),
        "name": name,
        "watched": watch,
        "n": n,
        "val_accuracy": accuracy,
        "ci95": None if accuracy is None or not n else list(wilson_interval(round(accuracy * n), n)),
        "val_epoch": scored.get("epoch"),
        "val_loss": scored.get("val_loss"),
        "best_val_accuracy": best.get("val_accuracy"),
        "best_epoch": best.get("epoch"),
        "train_accuracy": last.get("train_accuracy"),
        "train_loss": last.get("train_loss"),
        "parameters": parameters,
        "epochs": last["epoch"],
        "steps": last.get("step"),
        "seconds": sum(row.get("seconds") or 0.0 for row in rows),
        "images_per_s": statistics.median(speeds) if speeds else None,
        "evaluations": {
            stem: {key: result.get(key) for key in ("split", "weights", "data", "n", "accuracy", "ci95", "loss")}
            for stem, result in run.results().items()
            if fresh(run, result)
        },
        "masks": {
            f"{part.result['split']}, {part.name}": {
                "mean_iou": part.result["mean_iou"],
                "ci95": part.result["ci95"],
                "n": part.result["n"],
            }
            for part in segmentations(run, progress)
            if part.result["mean_iou"] is not None
        },
    }


def fresh(run: Run, result: dict[str, Any]) -> bool:
    """Whether an evaluation is of the weights that the run holds now, or does not say of which."""
    return result.get("weights_sha256") in (None, inputs.weights_hash(run, result.get("weights", "last")))


def estimate(value: float | None, interval: Sequence[float] | None = None) -> page.Estimate | None:
    return None if value is None else page.Estimate(value, *(interval or ()))


def about_accuracy(row: dict[str, Any]) -> str:
    if row["val_accuracy"] is None:
        return "not watched"
    count = f"{row['n']} pictures of " if row["n"] else ""
    return f"{count}{row['watched']}, after epoch {row['val_epoch']} (last weights)"


def table(rows: list[dict[str, Any]]) -> tuple[page.Figure, ...]:
    """The figures, one row each, of those that at least one run has."""

    def row(name: str, key: str, kind: page.Kind, interval: str = "", note: str = "") -> page.Figure:
        values = tuple(estimate(one[key], one.get(interval)) for one in rows)
        return page.Figure(name, values, kind, note)

    watches = sorted({one["watched"] for one in rows})
    watch = watches[0] if len(watches) == 1 else "the watched split"
    chosen = f"chosen on {watch} itself, so too good there: no headline"
    epochs = tuple("" if one["best_epoch"] is None else f"epoch {one['best_epoch']}" for one in rows)
    best = page.Figure(
        f"Best accuracy on {watch}", tuple(estimate(one["best_val_accuracy"]) for one in rows), "share", chosen, epochs
    )
    made = [
        row(f"Accuracy on {watch}", "val_accuracy", "share", "ci95", "last weights, 95 % interval (Wilson)"),
        best,
        row(f"Loss on {watch}", "val_loss", "number"),
        row("Accuracy on train", "train_accuracy", "share", note="last epoch, as augmented"),
        row("Loss on train", "train_loss", "number", note="last epoch, as trained"),
        row("Parameters", "parameters", "count"),
        row("Epochs", "epochs", "count"),
        row("Steps", "steps", "count"),
        row("Time of all epochs", "seconds", "time"),
        row("Pictures/s", "images_per_s", "count", note="median over epochs"),
    ]
    for stem in dict.fromkeys(stem for one in rows for stem in one["evaluations"]):
        made += evaluated(stem, [one["evaluations"].get(stem, {}) for one in rows])
    for masks in dict.fromkeys(name for one in rows for name in one["masks"]):
        found = [one["masks"].get(masks, {}) for one in rows]
        values = tuple(estimate(one.get("mean_iou"), one.get("ci95")) for one in found)
        made.append(page.Figure(f"Mean IoU of the masks on {masks}", values, "number", "95 % interval", counts(found)))
    return tuple(figure for figure in made if any(value is not None for value in figure.values))


def evaluated(stem: str, found: list[dict[str, Any]]) -> list[page.Figure]:
    """The rows of what evaluate wrote under one name; {} for a run without."""
    split, weights = next((one["split"], one["weights"]) for one in found if one)
    about = f"clearwing evaluate, {weights} weights" + (", chosen on the watched split" if weights == "best" else "")
    accuracy = tuple(estimate(one.get("accuracy"), one.get("ci95")) for one in found)
    loss = tuple(estimate(one.get("loss")) for one in found)
    return [
        page.Figure(f"Evaluated on {split}: accuracy", accuracy, "share", about, counts(found)),
        page.Figure(f"Evaluated on {split}: loss", loss, "number", about),
    ]


def counts(found: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(f"n = {one['n']}" if one else "" for one in found)


def line(row: dict[str, Any]) -> str:
    """One run in one line."""
    spent = f"{row['epochs']} epochs in {page.duration(row['seconds'])}"
    if row["val_accuracy"] is None:
        return f"{row['name']}: {spent}"
    interval = "" if row["ci95"] is None else " (95 % interval {:.1%} to {:.1%})".format(*row["ci95"])
    return f"{row['name']}: accuracy on {row['watched']} {row['val_accuracy']:.1%}{interval}, {spent}"


# --- settings -------------------------------------------------------------------------------------------------


def settings(runs: list[Run], names: list[str]) -> list[dict[str, Any]]:
    """The settings that differ; one that stands in two places with the same values is given once.

    A run of a version that did not know a setting has no value for it, which equals the default None.
    """
    flat = [leaves({part: run.config[part] for part in PARTS}) for run in runs]
    rows, told = [], set()
    for key in dict.fromkeys(key for one in flat for key in one):
        values = {name: one[key] for name, one in zip(names, flat, strict=True) if key in one}
        written = [json.dumps(one.get(key), sort_keys=True) for one in flat]
        same_elsewhere = (key.rpartition(".")[2], *written)
        if len(set(written)) > 1 and key not in ABOUT_ONE_CALL and same_elsewhere not in told:
            told.add(same_elsewhere)
            rows.append({"setting": key, "values": values})
    return rows


def leaves(value: Any, at: str = "") -> dict[str, Any]:
    """The values that are no dictionaries, by their dotted names; of the skipped pictures only the number."""
    if at == "data.skipped":
        return {at: len(value)}
    if not isinstance(value, dict):
        return {at: value}
    return {
        name: leaf for key, item in value.items() for name, leaf in leaves(item, f"{at}.{key}" if at else key).items()
    }


def said(values: dict[str, Any], name: str) -> str | None:
    """A setting's value in one cell; None where the run has no record of it."""
    if name not in values:
        return None
    value = values[name]
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 160 else f"{text[:159]}\N{HORIZONTAL ELLIPSIS}"


def remarks(runs: list[Run], rows: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before setting these figures side by side."""
    notes = []
    if len({frozenset(run.class_names) for run in runs}) > 1:
        counted = ", ".join(str(len(run.class_names)) for run in runs)
        notes.append(f"the runs know different classes ({counted}): their accuracies are not of the same task")
    if len({(run.config["data"]["where"], row["watched"], row["n"]) for run, row in zip(runs, rows, strict=True)}) > 1:
        notes.append(
            "the runs watched different pictures: their accuracies and losses on these are not of the same set"
        )
    for run, row in zip(runs, rows, strict=True):
        if row["val_epoch"] not in (None, row["epochs"]):
            notes.append(f"{row['name']}: its last epoch was not scored; the accuracy is that after {row['val_epoch']}")
        for stem in run.results().keys() - row["evaluations"].keys():
            notes.append(f"{row['name']}: evaluation/{stem}.json is of other weights; left out")
    return notes


# --- the same pictures ----------------------------------------------------------------------------------------

Predictions = dict[str, dict[str, str]]  # by the key of the picture: predicted, probability, true, correct


def paired(
    runs: list[Run], rows: list[dict[str, Any]], data: str | None, config: ReportConfig
) -> tuple[list[page.Pair], list[str]]:
    """The runs against the first of them that has the evaluation, on the pictures of both; and what to note of that."""
    pairs: list[page.Pair] = []
    notes: list[str] = []
    for stem in dict.fromkeys(stem for row in rows for stem in row["evaluations"]):
        having = [i for i, row in enumerate(rows) if stem in row["evaluations"] and prediction_file(runs[i], stem)]
        if not having or config.split not in (None, rows[having[0]]["evaluations"][stem]["split"]):
            continue
        first, scored = having[0], rows[having[0]]["evaluations"][stem]
        own, made = predictions(runs[first], stem), []
        for i in having[1:]:
            other = predictions(runs[i], stem)
            names = (rows[first]["name"], rows[i]["name"])
            reason, common = comparable(own, other, scored["data"], rows[i]["evaluations"][stem]["data"])
            if reason:
                notes.append(f"{stem}: {names[0]} and {names[1]}: {reason}")
            if common:
                made.append((pair_of(scored, names, own, other, common), other))
        if made:
            samples = samples_of(runs[first], scored, data, config, notes)
            pairs += [replace(pair, gallery=gallery(pair, own, other, samples, config.most)) for pair, other in made]
    if config.split is not None and not pairs:
        raise ClearwingError("--split", config.split, "no two of the runs are evaluated on it; use clearwing evaluate")
    return pairs, notes


def prediction_file(run: Run, stem: str) -> Path | None:
    path = run.file("evaluation", f"{stem}-predictions.csv")
    return path if path.is_file() else None


def predictions(run: Run, stem: str) -> Predictions:
    """What evaluate wrote of each picture."""
    path = run.file("evaluation", f"{stem}-predictions.csv")
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if not {"picture", "predicted", "probability", "true", "correct"} <= set(table.fieldnames or ()):
            raise ClearwingError("RUN", path, "is not what clearwing evaluate wrote; run it again")
        return {row["picture"]: row for row in table}


def comparable(own: Predictions, other: Predictions, where: Any, there: Any) -> tuple[str, list[str]]:
    """What is to be noted of two evaluations, and the keys of the pictures that they share."""
    common = [key for key in own if key in other]
    if not common:
        return "evaluated on different pictures", []
    if any(own[key]["true"] != other[key]["true"] for key in common):
        return "pictures of one name have another true class; not paired", []
    reasons = []
    if len(common) < max(len(own), len(other)):
        reasons.append(f"paired on the {len(common)} pictures that both were evaluated on")
    if where != there and where is not None and there is not None:
        reasons.append(f"evaluated in {where} and in {there}; the pictures are matched by their names")
    return "; ".join(reasons), common


def pair_of(
    scored: dict[str, Any], names: tuple[str, str], own: Predictions, other: Predictions, common: list[str]
) -> page.Pair:
    """Who is right where the other is wrong; the most confident mistakes first."""

    def alone(right: Predictions, wrong: Predictions) -> tuple[str, ...]:
        keys = [key for key in common if right[key]["correct"] == "1" and wrong[key]["correct"] != "1"]
        return tuple(sorted(keys, key=lambda key: -float(wrong[key]["probability"])))

    only_first, only_second = alone(own, other), alone(other, own)
    both = sum(own[key]["correct"] == other[key]["correct"] == "1" for key in common)
    p = mcnemar(len(only_first), len(only_second))
    return page.Pair(scored["split"], scored["weights"], *names, len(common), both, only_first, only_second, p)


def samples_of(
    run: Run, scored: dict[str, Any], data: str | None, config: ReportConfig, notes: list[str]
) -> dict[str, Sample]:
    """The evaluated samples by their key; none where the pictures are gone."""
    try:
        dataset = inputs.open_like_run(run, data or scored["data"], config.classes, config.pattern)
        return {sample.key: sample for sample in inputs.split_of(dataset, scored["split"])}
    except ClearwingError as error:
        if data is not None:
            raise
        notes.append(f"the pictures of {scored['split']} are not shown: {error}")
        return {}


def gallery(
    pair: page.Pair, own: Predictions, other: Predictions, samples: dict[str, Sample], most: int
) -> tuple[page.Disputed, ...]:
    """At most `most` of the pictures on which one alone is right, half of them for each where there are so many."""
    first = [key for key in pair.only_first if key in samples]
    second = [key for key in pair.only_second if key in samples]
    taken = min(len(first), max(most - len(second), (most + 1) // 2))
    return tuple(
        page.Disputed(
            key,
            draw.to_rgb(read_picture(samples[key].source)),
            own[key]["true"],
            (own[key]["predicted"], float(own[key]["probability"])),
            (other[key]["predicted"], float(other[key]["probability"])),
        )
        for key in [*first[:taken], *second[: most - taken]]
    )


def as_json(pair: page.Pair) -> dict[str, Any]:
    return {
        "split": pair.split,
        "weights": pair.weights,
        "first": pair.first,
        "second": pair.second,
        "n": pair.n,
        "both_right": pair.both,
        "only_first_right": len(pair.only_first),
        "only_second_right": len(pair.only_second),
        "both_wrong": pair.neither,
        "difference": pair.difference,
        "p": pair.p,
        "pictures_only_first_right": pair.only_first,
        "pictures_only_second_right": pair.only_second,
    }
