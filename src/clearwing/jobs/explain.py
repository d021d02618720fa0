"""The job `explain`: overlays and raw maps of pictures, from any network."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from clearwing.attribution.methods import explain as explain_batch
from clearwing.config import ExplainConfig, as_json
from clearwing.data.loader import Pictures
from clearwing.data.preprocess import read_picture, restore
from clearwing.jobs import inputs
from clearwing.jobs.evaluate import name_of
from clearwing.jobs.progress import Progress
from clearwing.run import check_free, make_folder, plain, write_json
from clearwing.settings import comma_list
from clearwing.show import draw
from clearwing.types import ClearwingError, Explanation, Status

TILE = 320
"""Width of a picture on the sheet, in pixels."""


def explain(config: ExplainConfig) -> dict[str, Any]:
    """Explain pictures, a block of them at a time; returns what the command prints."""
    if config.layers and config.larger_than is not None:
        raise ClearwingError("--larger-than", config.larger_than, "chooses a layer where --layers names none; give one")
    loaded = inputs.open_model(config.model, size=config.size, fit=config.fit, classes=config.classes)
    settings = read_settings(config, loaded.model.class_names)
    device = inputs.pick_device(config.device)
    model = loaded.model.to(device)
    rows: list[dict[str, Any]] = []
    skipped: list[list[str]] = []
    out = Path(config.out)
    with Progress(config.json) as progress:
        samples = inputs.limited(inputs.open_pictures(config.pictures, progress, config.out), config.limit)
        stems = inputs.result_paths([sample.key for sample in samples], "")
        inputs.keep_sources(config.out, stems.values(), samples, grown=True)
        check_free(out, config.overwrite)
        told = progress.task("explaining")
        for pictures in inputs.load_blocks(loaded, samples):
            skipped += inputs.told_skipped(pictures, progress)
            left = len(samples) - len(skipped)
            for start in range(0, len(pictures), config.batch_size):
                part = pictures.subset(range(start, min(start + config.batch_size, len(pictures))))
                batch = next(part.batches(len(part), device=device))

                def tell(done: float, _: float, before: int = len(rows), left: int = left) -> None:
                    told(before + done, left)

                found: dict[str, Explanation] = explain_batch(model, batch, **settings, progress=tell)
                make_folder(out)
                moved = {key: replace(item.to("cpu"), images=None) for key, item in found.items()}
                if config.maps_only:
                    rows += write_maps(out, len(rows), moved)
                else:
                    rows += write_batch(out, stems, part, moved, config.edges)
    empty = sum(status != "ok" for row in rows for status in row["status"].values())
    result = {
        "model": loaded.name,
        "out": str(out),
        "methods": list(rows[0]["status"]) if rows else [],
        "settings": as_json(config),
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


def read_settings(config: ExplainConfig, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What the command was told, as the arguments of `clearwing.explain`."""
    options = {}
    for item in comma_list(config.options):
        name, equals, value = item.partition("=")
        if not equals:
            raise ClearwingError("--options", item, "give name=number, as in steps=64,samples=50")
        options[name.strip()] = _number(value.strip())
    average = [item if item == "flip" else _number(item) for item in comma_list(config.average)]
    return {
        "methods": comma_list(config.methods),
        "layers": comma_list(config.layers) or None,
        "larger_than": config.larger_than,
        "target": read_target(config.target, class_names),
        "precision": None if config.precision == "model" else config.precision,
        "seed": config.seed,
        "fuse": config.fuse,
        "average": average,
        "options": options,
    }


def _number(text: str) -> Any:
    """An int or float where the text is one; what is none is refused where it is used."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def write_maps(out: Path, first: int, found: dict[str, Explanation]) -> list[dict[str, Any]]:
    """The raw maps of a batch, a file for each method, named by its first picture; a row a picture."""
    files = [item.save(out / f"{key}.{first:08}.safetensors") for key, item in found.items()]
    names = [str(path.relative_to(out)) for path in files]
    return [_row(key, i, found, names) for i, key in enumerate(next(iter(found.values())).keys)]


def map_name(key: str, item: Explanation, m: int) -> str:
    """What the m-th map of a picture is called: by its method and layer, and by its place where there are several."""
    return key if item.maps.shape[1] == 1 else f"{key}.{m + 1}"


def asked_for(item: Explanation, i: int, m: int) -> str:
    """The class of a map with its probability, and the class that it is held against: "cat 86% against dog 2%"."""

    def said(k: int) -> str:
        name = name_of(k, item.class_names) if item.class_names else f"class {k}"
        return f"{name} {float(item.probabilities[i, k]):.0%}"

    if int(item.classes[i, m]) < 0:
        return "target"
    return said(int(item.classes[i, m])) + ("" if item.against is None else f" against {said(int(item.against[i, m]))}")


def _row(key: str, i: int, found: dict[str, Explanation], files: list[str]) -> dict[str, Any]:
    first = next(iter(found.values()))
    k = int(first.predicted[i])
    maps = [(map_name(name, item, m), item, m) for name, item in found.items() for m in range(item.maps.shape[1])]
    return {
        "picture": key,
        "predicted": name_of(k, first.class_names),
        "probability": float(first.probabilities[i, k]),
        "explains": {name: asked_for(item, i, m) for name, item, m in maps},
        "status": {name: Status(int(item.status[i, m])).name.lower() for name, item, m in maps},
        "files": files,
    }


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
        tiles, files = [draw.to_rgb(picture)], []
        captions = [f"{stem.name}\neach map scaled by itself;\nred for the class, blue against"]
        for key, item in found.items():
            for m in range(item.maps.shape[1]):
                drawn = (draw.edges if edges else draw.overlay)(picture, full[key][i][m])
                path = draw.save_png(drawn, out / stem.with_name(f"{stem.name}.{map_name(key, item, m)}.png"))
                state = Status(int(item.status[i, m])).name.lower()
                tiles.append(drawn)
                asked = asked_for(item, i, m).replace(" against ", "\nagainst ")
                captions.append(f"{key}\n{asked}" + ("" if state == "ok" else f" ({state}: no evidence)"))
                files.append(str(path.relative_to(out)))
            one = item.picture(i)
            files.append(str(one.save(out / stem.with_name(f"{stem.name}.{key}.safetensors")).relative_to(out)))
        height, width = tiles[0].shape[:2]
        sheet = draw.montage(
            tiles, captions, columns=min(len(tiles), 6), size=(TILE * height // width, TILE), font_size=17
        )
        files.append(str(draw.save_png(sheet, out / stem.with_name(f"{stem.name}.png")).relative_to(out)))
        rows.append(_row(sample.key, i, found, files))
    return rows
