"""The job `explain`: overlays and raw maps of pictures, from any network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clearwing.attribution.methods import METHODS
from clearwing.attribution.methods import explain as explain_batch
from clearwing.attribution.trace import find_layer
from clearwing.config import ExplainConfig, comma_list
from clearwing.data.loader import Pictures
from clearwing.data.preprocess import read_picture, restore
from clearwing.jobs import inputs
from clearwing.jobs.evaluate import name_of
from clearwing.jobs.progress import Progress
from clearwing.run import free_folder, plain, write_json
from clearwing.show import draw
from clearwing.types import ClearwingError, Explanation, Status


def explain(config: ExplainConfig) -> dict[str, Any]:
    """Explain pictures; returns what the command prints."""
    methods = comma_list(config.methods)
    layers = comma_list(config.layers) or None
    if layers and config.larger_than is not None:
        raise ClearwingError("--larger-than", config.larger_than, "chooses a layer where --layers names none; give one")
    loaded = inputs.open_model(config.model, size=config.size, fit=config.fit, classes=config.classes)
    target = read_target(config.target, loaded.model.class_names)
    device = inputs.pick_device(config.device)
    precision = None if config.precision == "model" else config.precision
    with Progress(config.json) as progress:
        samples = inputs.open_pictures(config.pictures, progress, config.out)
        pictures = inputs.load_for(loaded, samples, config.limit, progress)
        stems = inputs.result_paths(pictures.keys, "")
        inputs.keep_sources(config.out, stems.values(), samples, grown=True)
        out = free_folder(config.out, config.overwrite)
        skipped = inputs.told_skipped(pictures, progress)
        model = loaded.model.to(device)
        if layers is None and any(METHODS[name].needs_layer for name in methods if name in METHODS):
            one = next(iter(pictures.subset(1).batches(1, device=device)))
            layers = [find_layer(model, one, config.larger_than)]  # once, not with every batch
        rows: list[dict[str, Any]] = []
        told = progress.task("explaining")
        for batch in pictures.batches(config.batch_size, device=device):
            found: dict[str, Explanation] = explain_batch(
                model,
                batch,
                methods,
                layers=layers,
                target=target,
                precision=precision,
                seed=config.seed,
            )
            part = pictures.subset(range(len(rows), len(rows) + len(batch)))
            rows += write_batch(out, stems, part, {key: item.to("cpu") for key, item in found.items()}, config.edges)
            told(len(rows), len(pictures))
    empty = sum(status != "ok" for row in rows for status in row["status"].values())
    result = {
        "model": loaded.name,
        "out": str(out),
        "methods": list(rows[0]["status"]) if rows else [],
        "pictures": rows,
        "empty_maps": empty,
        "skipped": len(skipped),
        "skipped_pictures": skipped,
    }
    write_json(out / "explanations.json", result)
    text = f"{len(rows)} pictures, {len(result['methods'])} maps each, skipped {len(skipped)}; written: {out}"
    if empty:
        text += f"\n{empty} maps hold no evidence (zero, constant or not finite) and are drawn blank"
    return {"json": plain(result), "text": text}


def read_target(text: str, class_names: tuple[str, ...]) -> Any:
    """pred, top-3, a class name or index (what is both is the name), or A,B for a contrast."""
    if text in ("pred", "label") or text.startswith("top-") or text in class_names:
        if text == "label":
            raise ClearwingError("--target", text, "these pictures have no labels; give pred, a class, or top-3")
        return text
    parts = [
        int(part) if re.fullmatch(r"-?\d+", part) and part not in class_names else part for part in comma_list(text)
    ]
    if len(parts) == 2:
        return (parts[0], parts[1])
    if len(parts) == 1:
        return parts[0]
    raise ClearwingError("--target", text, "give pred, a class name or index, top-3, or A,B for A against B")


def write_batch(
    out: Path, stems: dict[str, Path], part: Pictures, found: dict[str, Explanation], edges: bool
) -> list[dict[str, Any]]:
    """Per picture: an overlay for each map, all of them side by side, and the raw maps."""
    rows = []
    full = {key: restore(item.maps, part.geometry) for key, item in found.items()}
    for i, sample in enumerate(part.samples):
        picture = read_picture(sample.source)
        stem = stems[sample.key]
        tiles, captions, status, files = [draw.to_rgb(picture)], [stem.name], {}, []
        for key, item in found.items():
            for m in range(item.maps.shape[1]):
                k = int(item.classes[i, m])
                name = key if item.maps.shape[1] == 1 else f"{key}.{m + 1}"
                drawn = (draw.edges if edges else draw.overlay)(picture, full[key][i][m])
                path = draw.save_png(drawn, out / stem.with_name(f"{stem.name}.{name}.png"))
                label = name_of(k, item.class_names) if k >= 0 else "target"
                share = f" {float(item.probabilities[i, k]):.0%}" if k >= 0 else ""
                state = Status(int(item.status[i, m])).name.lower()
                tiles.append(drawn)
                captions.append(f"{key}\n{label}{share}" + ("" if state == "ok" else f" ({state})"))
                status[name] = state
                files.append(str(path.relative_to(out)))
            one = item.picture(i)
            files.append(str(one.save(out / stem.with_name(f"{stem.name}.{key}.safetensors")).relative_to(out)))
        sheet = draw.montage(tiles, captions, columns=min(len(tiles), 6))
        files.append(str(draw.save_png(sheet, out / stem.with_name(f"{stem.name}.png")).relative_to(out)))
        first = next(iter(found.values()))
        k = int(first.predicted[i])
        rows.append(
            {
                "picture": sample.key,
                "predicted": name_of(k, first.class_names),
                "probability": float(first.probabilities[i, k]),
                "status": status,
                "files": files,
            }
        )
    return rows
