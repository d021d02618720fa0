"""The files of masks in each format, the cutouts, and the tables beside them: where they lie, and how they are written.

A file has a temporary name until it is whole, so that a killed call leaves no half of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clearwing.config import SegmentConfig
from clearwing.data.loader import Pictures
from clearwing.data.preprocess import read_picture
from clearwing.jobs import inputs
from clearwing.jobs.tally import Tally
from clearwing.masks import formats
from clearwing.run import write_json, write_text
from clearwing.show.draw import save_png, to_rgb
from clearwing.types import ClearwingError, atomic_path

VOC_CLASSES = 254
"""What a palette PNG holds beside background and void."""


class MaskWriter:
    """Writes the masks of pictures below the output folder, in the format that a command asks for.

    names: those of the network's classes, none where it has none.
    """

    def __init__(self, config: SegmentConfig, keys: Sequence[str], names: Sequence[str]) -> None:
        self.out, self.kind, self.cutouts, self.names = Path(config.out), config.format, config.cutouts, tuple(names)
        self.files = inputs.result_paths(keys, ".geojson" if self.kind == "geojson" else ".png")
        self.order = {key: at for at, key in enumerate(self.files)}

    def paths(self, keys: Iterable[str] | None = None) -> list[Path]:
        """All files that are written for pictures, those of `keys` or all, below the output folder."""
        files = list(self.files.values()) if keys is None else [self.files[key] for key in keys]
        found = [] if self.kind == "coco" else [mask_file(self.kind, file) for file in files]
        found += [annotation_file(file) for file in files] if self.kind == "voc" else []
        return found + ([cutout_file(file) for file in files] if self.cutouts else [])

    def file(self, key: str) -> Path | None:
        """Where the mask of a picture is written, below the output folder; None where one file holds all masks."""
        return None if self.kind == "coco" else mask_file(self.kind, self.files[key])

    def name(self, record: dict[str, Any]) -> str:
        """The class of a picture in words."""
        k = record.get("class")
        return "object" if k is None else self.names[k] if k < len(self.names) else f"class {k}"

    def write(self, pictures: Pictures, masks: Sequence[Tensor], records: Sequence[dict[str, Any]]) -> None:
        """The masks of a block, and their cutouts; what `coco.json` is to say of a mask goes into its record."""
        for sample, mask, record in zip(pictures.samples, masks, records, strict=True):
            file = self.files[sample.key]
            path = self.out / mask_file(self.kind, file)
            if self.kind == "png":
                save_png((mask * 255).numpy(), path)
            elif self.kind == "voc":
                save_voc(self.out, path, file, mask, record, self.name(record))
            elif self.kind == "geojson":
                about = {"class": self.name(record), "probability": record.get("probability"), "picture": sample.key}
                document = formats.geojson_document([formats.geojson_feature(mask, about)])
                write_json(path, document)
            else:
                record["coco"] = formats.coco_annotation(mask, id=0, image_id=0, category_id=0)
            if self.cutouts:
                picture = to_rgb(read_picture(sample.source))
                save_png(formats.cutout(picture, mask), self.out / cutout_file(file))

    def write_tables(self, tally: Tally) -> None:
        """What holds all pictures: `boxes.csv`, and the masks themselves in `coco.json`."""
        most = max((record.get("class", 0) for record in tally.records.values()), default=0)
        names = self.names or tuple(f"class {k}" for k in range(most + 1))
        write_text(self.out / "boxes.csv", tally.boxes_csv(self.order, names))
        if self.kind == "coco":
            entries = tally.coco(self.order)
            document = formats.coco_document(*entries, categories=names, info={"description": "clearwing"})
            write_json(self.out / "coco.json", document)


def check_format(config: SegmentConfig, classes: int) -> None:
    """Refuse a format that cannot hold so many classes."""
    if config.format == "voc" and classes > VOC_CLASSES:
        raise ClearwingError("--format", "voc", f"holds {VOC_CLASSES} classes at most; take another")


def mask_file(kind: str, file: Path) -> Path:
    """Where a mask is written in a format, below the output folder."""
    return Path("SegmentationClass", file) if kind == "voc" else file


def annotation_file(file: Path) -> Path:
    return Path("Annotations", file).with_suffix(".xml")


def cutout_file(file: Path) -> Path:
    return Path("cutouts", file).with_suffix(".png")


def save_voc(out: Path, path: Path, file: Path, mask: Tensor, record: dict[str, Any], name: str) -> None:
    """A palette PNG and the XML of its box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        formats.voc_mask(mask, record.get("class", 0)).save(temporary, "PNG")
    text = formats.voc_xml(mask, record["key"], record["width"], record["height"], name)
    write_text(out / annotation_file(file), text)
