"""What a call of `segment` comes to: the figures of `segmentation.json`, and the lines that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clearwing.config import SegmentConfig
from clearwing.data.sources import Dataset
from clearwing.jobs import inputs
from clearwing.jobs.manifest import Manifest
from clearwing.jobs.mask_files import MaskWriter
from clearwing.jobs.mask_recipe import OPTIONS, changed
from clearwing.jobs.maskers import Prepared
from clearwing.jobs.tally import Tally
from clearwing.run import plain, write_json
from clearwing.types import ClearwingError


def finished(
    config: SegmentConfig,
    prepared: Prepared,
    loaded: inputs.Loaded,
    dataset: Dataset,
    manifest: Manifest,
    writer: MaskWriter,
    rate: float | None,
) -> dict[str, Any]:
    """Join what all processes did: segmentation.json, boxes.csv, and coco.json; returns what the command prints."""
    out, tally = Path(config.out), Tally(list(prepared.rivals))
    for block in manifest.blocks():
        tally.add(block)
    if not tally.n:
        key, reason = tally.skipped[0] if tally.skipped else (config.data, "there is none")
        raise ClearwingError("pictures", key, f"none of {len(writer.files)} can be read: {reason}")
    result = tally.summary(config.seed, writer.order) | {
        "data": inputs.full_name(config.data),
        "split": inputs.split_name(dataset, config.split),
        "pipeline": config.pipeline + (" (changed)" if changed(config) else ""),
        "format": config.format,
        "options": {name: getattr(config, name) for name in OPTIONS if getattr(config, name) is not None},
        "threshold": prepared.threshold,
        "masks_used_for_calibration": prepared.calibration or False,
        "pictures_per_s": rate,
        "notes": list(dataset.notes),
    }
    if not (loaded.run is not None and inputs.own_data(loaded.run, config.data)):
        result["notes"] += inputs.left_out_notes(dataset, config.split)
    if loaded.run is not None:
        result["weights_sha256"] = inputs.weights_hash(loaded.run)
        result["notes"] += inputs.split_notes(dataset, config.split, loaded.run, config.data)
    writer.write_tables(tally)
    write_json(out / "segmentation.json", result)
    return {"json": plain(result), "text": told(result, out)}


def told_iou(result: dict[str, Any]) -> str:
    """The headline, where masks were scored."""
    interval = "" if result["ci95"] is None else "95 % interval {:.3f} to {:.3f}, ".format(*result["ci95"])
    return f"mean IoU {result['mean_iou']:.3f} ({interval}n = {result['scored']})"


def told(result: dict[str, Any], out: Path) -> str:
    """The result in a few lines."""
    rate = f", {result['pictures_per_s']:.0f} pictures/s" if result["pictures_per_s"] else ""
    lines = [
        f"{result['n']} masks, {result['fell_back']} fell back, {result['no_evidence']} without evidence, "
        f"skipped {result['skipped']}{rate}"
    ]
    if used := result["masks_used_for_calibration"]:
        chosen = result["threshold"]["chosen_on"]
        kept = (
            "" if chosen["changed"] else f"; of {chosen['tried']} ways none was surely better, so nothing was changed"
        )
        lines.append(f"calibrated on {used} drawn masks, which are not scored{kept}")
    if result["mean_iou"] is not None:
        lines.append(told_iou(result))
        for name, value in result["baselines"].items():
            difference = result["differences"][name]
            line = f"  {name:<20}{value:.3f}   difference {difference['mean']:+.3f}"
            if difference["ci95"] is not None:
                line += " ({:+.3f} to {:+.3f})".format(*difference["ci95"])
            lines.append(line)
    if result["unscored"]:
        key, why = result["unscored"][0]
        lines.append(f"not scored: {len(result['unscored'])} of {result['n']}; {key}: {why}")
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, f"written: {out}"])
