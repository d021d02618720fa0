"""The jobs `evaluate` and `predict`: how right a network is, and what it says of pictures without labels."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from clearwing.config import EvaluateConfig, PredictConfig, SegmentConfig
from clearwing.data.loader import Pictures
from clearwing.jobs import inputs
from clearwing.jobs.mask_results import told_iou
from clearwing.jobs.progress import Progress
from clearwing.jobs.segment import segment
from clearwing.measure import accuracy as measure
from clearwing.run import Run, plain, write_json, write_text
from clearwing.train.devices import make_fabric
from clearwing.train.predict import predict_logits
from clearwing.types import ClearwingError


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a run on a split; returns what the command prints."""
    if config.masks is not None and config.weights == "best":
        raise ClearwingError("--masks", "with --weights best", "segment uses the last weights")
    run = Run.load(config.run)
    loaded = inputs.open_model(config.run, weights=config.weights)
    dataset = inputs.open_run_data(run, config.data, config.classes, config.pattern, config.masks)
    samples = inputs.split_of(dataset, config.split)
    if any(sample.label is None for sample in samples):
        raise ClearwingError("DATA", config.data, "has no labels; use clearwing predict")
    with Progress(config.json) as progress:
        pictures = inputs.load_for(loaded, samples, config.limit, progress)
        skipped = inputs.told_skipped(pictures, progress)
        fabric = make_fabric(config.device, "float32")
        model = loaded.model.to(fabric.device)
        logits, labels = predict_logits(model, pictures, fabric, config.batch_size)
        mirrored = predict_logits(model, pictures, fabric, config.batch_size, flip=True)[0] if config.flip else None
    result = scores(logits, labels, run.class_names) | {
        "data": inputs.full_name(config.data),
        "split": config.split,
        "weights": config.weights,
        "weights_sha256": inputs.weights_hash(run, config.weights),
        "skipped": len(skipped),
        "skipped_pictures": skipped,
        "notes": [
            *dataset.notes,
            *selection_notes(config, run),
            *inputs.split_notes(dataset, config.split, run, config.data),
        ],
    }
    if mirrored is not None:
        right = int((mirrored.argmax(1) == labels).sum())
        interval = measure.wilson_interval(right, len(labels))
        result["flip"] = {"accuracy": right / len(labels), "ci95": list(interval)}
    masks = segment_too(config, run)
    if masks is not None:
        result["mean_iou"] = masks["mean_iou"]
    stem = config.split if config.weights == "last" else f"{config.split}-{config.weights}"
    write_json(run.file("evaluation", f"{stem}.json"), result)
    table = predictions_csv(pictures, logits, run.class_names, labels)
    write_text(run.file("evaluation", f"{stem}-predictions.csv"), table)
    write_text(run.file("predictions.csv"), table)
    low, high = result["ci95"]
    top5 = f"top-5 {result['top5']:.1%}, " if len(run.class_names) > 5 else ""
    text = [
        f"{config.split}: accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"{top5}loss {result['loss']:.3f}, n = {result['n']}, skipped {len(skipped)}",
        *([f"with mirror images: accuracy {result['flip']['accuracy']:.1%}"] if mirrored is not None else []),
        *([told_iou(masks)] if masks is not None and masks["mean_iou"] is not None else []),
        *(f"note: {note}" for note in result["notes"]),
        f"written: {run.file('evaluation', f'{stem}.json')}",
    ]
    return {"json": plain(result), "text": "\n".join(text)}


def segment_too(config: EvaluateConfig, run: Run) -> dict[str, Any] | None:
    """What segment finds where masks are given, written to RUN/segmentation/<split>."""
    if config.masks is None:
        return None
    made = segment(
        SegmentConfig(
            run=config.run,
            data=config.data,
            out=str(run.file("segmentation", config.split)),
            split=config.split,
            masks=config.masks,
            classes=config.classes,
            pattern=config.pattern,
            device=config.device,
            limit=config.limit,
            json=config.json,
            overwrite=True,
        )
    )
    found: dict[str, Any] = made["json"]
    return found


def selection_notes(config: EvaluateConfig, run: Run) -> list[str]:
    """What a reader must know before quoting the figure."""
    watched = run.config["resolved"]["watch"]
    if config.weights == "best" and config.split == watched:
        return [f"these weights were chosen on {watched}: their accuracy there is too good; quote the last weights"]
    return []


def scores(logits: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy with its interval, top-5, per class, confusion and loss of logits (N, K) against labels (N,)."""
    predicted, n = logits.argmax(1), len(labels)
    confusion = measure.confusion_matrix(predicted, labels, len(class_names))
    correct = int(confusion.diag().sum())
    rows = measure.per_class(confusion, class_names)
    return {
        "accuracy": correct / n,
        "ci95": list(measure.wilson_interval(correct, n)),
        "top5": measure.topk_accuracy(logits, labels, min(5, len(class_names))),
        "per_class": {
            row.name: {"accuracy": row.accuracy, "correct": row.correct, "n": row.n, "ci95": list(row.interval)}
            for row in rows
        },
        "confusion": confusion.tolist(),
        "class_names": list(class_names),
        "n": n,
        "loss": measure.cross_entropy(logits, labels),
    }


def predictions_csv(
    pictures: Pictures, logits: Tensor, class_names: tuple[str, ...], labels: Tensor | None = None
) -> str:
    """One line a picture: key, predicted class, its probability, and the true class where it is known."""
    probability, predicted = logits.float().softmax(1).max(1)
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["picture", "predicted", "probability"] + (["true", "correct"] if labels is not None else []))
    for i, key in enumerate(pictures.keys):
        row: list[Any] = [key, name_of(int(predicted[i]), class_names), f"{float(probability[i]):.6f}"]
        if labels is not None:
            row += [name_of(int(labels[i]), class_names), int(predicted[i] == labels[i])]
        table.writerow(row)
    return written.getvalue()


def name_of(index: int, class_names: tuple[str, ...]) -> str:
    return class_names[index] if index < len(class_names) else str(index)


def predict(config: PredictConfig) -> dict[str, Any]:
    """Name the class of pictures; returns what the command prints."""
    if config.top < 1:
        raise ClearwingError("--top", config.top, "give at least 1")
    out = Path(config.out) if config.out else None
    if out is not None:
        if out.suffix.lower() not in (".csv", ".json"):
            raise ClearwingError("--out", out, "end it in .csv or .json")
        if out.exists() and not config.overwrite:
            raise ClearwingError("--out", out, "exists; use --overwrite or another name")
    loaded = inputs.open_model(config.model, size=config.size, fit=config.fit, classes=config.classes)
    with Progress(config.json) as progress:
        pictures = inputs.load_for(loaded, inputs.open_pictures(config.pictures, progress), config.limit, progress)
        skipped = inputs.told_skipped(pictures, progress)
        fabric = make_fabric(config.device, "float32")
        logits, _ = predict_logits(loaded.model.to(fabric.device), pictures, fabric, config.batch_size)
    names = loaded.model.class_names
    probability, classes = logits.softmax(1).topk(min(config.top, logits.shape[1]), 1)
    rows = [
        {
            "picture": key,
            "predictions": [
                {"class": name_of(int(k), names), "index": int(k), "probability": float(p)}
                for k, p in zip(classes[i], probability[i], strict=True)
            ],
        }
        for i, key in enumerate(pictures.keys)
    ]
    result = plain({"model": loaded.name, "pictures": rows, "skipped": len(skipped), "skipped_pictures": skipped})
    table = top_csv(rows)
    if out is not None:
        write_text(out, table if out.suffix.lower() == ".csv" else json.dumps(result, indent=1) + "\n")
        return {"json": result, "text": f"{len(rows)} pictures, skipped {len(skipped)}; written: {out}"}
    return {"json": result, "text": table.rstrip("\n")}


def top_csv(rows: list[dict[str, Any]]) -> str:
    """A line for each of the likeliest classes of each picture."""
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["picture", "rank", "class", "probability"])
    for row in rows:
        for rank, item in enumerate(row["predictions"], 1):
            table.writerow([row["picture"], rank, item["class"], f"{item['probability']:.6f}"])
    return written.getvalue()
