"""The files of masks: each format holds the same ones, as do the tables; none replaces what was read."""

import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageDraw
from segmenting import FAST, contents, factory, segmented, table

import clearwing as cw
from commands import failure, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def png(tmp_path_factory, trained, photos):
    """Masks of val as PNG files, and segmentation.json: what the other formats must say, too."""
    from clearwing.cli import main

    out = tmp_path_factory.mktemp("png")
    assert main(["segment", str(trained), str(photos), "--out", str(out), "--cutouts", *FAST, "--json"]) == 0
    return out


@pytest.fixture
def masks(png):
    """The masks of `png` by key: uint8 (40, 56)."""
    files = json.loads((png / "segmentation.json").read_text())["files"]
    found = {key: cw.read_mask(png / file).numpy() for key, file in files.items()}
    assert 0 < np.mean(list(found.values())) < 1
    return found


def test_png_masks_their_boxes_and_cutouts(capsys, png, masks, trained, photos):
    rows = table(png / "boxes.csv")
    assert [row["key"] for row in rows] == list(masks)
    said = json.loads(run(capsys, "predict", trained, photos / "val", "--json")[1])["pictures"]
    said = {row["picture"]: row["predictions"][0] for row in said}
    for row, (key, mask) in zip(rows, masks.items(), strict=True):
        ys, xs = np.nonzero(mask)
        box = (xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min())
        assert tuple(int(row[name]) for name in ("x", "y", "width", "height")) == box
        assert float(row["share"]) == pytest.approx(mask.mean(), abs=1e-6)
        first = said[key.removeprefix("val/")]
        assert row["class"] == first["class"]
        assert float(row["probability"]) == pytest.approx(first["probability"], abs=1e-3)
        with Image.open(png / "cutouts" / key) as file:
            cutout = np.asarray(file)
        picture = np.asarray(Image.open(photos / key).convert("RGB"))
        assert (cutout[..., 3] == mask * 255).all()
        assert (cutout[..., :3] == picture * mask[..., None]).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_coco_holds_the_same_masks(capsys, png, masks, trained, photos, tmp_path):
    from pycocotools.coco import COCO

    result = segmented(capsys, trained, photos, "--format", "coco", "--out", tmp_path, *FAST)
    assert result["files"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "boxes.csv",
        "coco.json",
        "manifest-0.jsonl",
        "segmentation.json",
    ]
    coco = COCO(tmp_path / "coco.json")
    assert [category["name"] for category in coco.cats.values()] == ["species_0", "species_1", "species_2"]
    assert [image["file_name"] for image in coco.imgs.values()] == list(masks)
    rows = {row["key"]: row for row in table(tmp_path / "boxes.csv")}
    assert table(png / "boxes.csv") == list(rows.values())
    for image in coco.imgs.values():
        [annotation] = coco.imgToAnns[image["id"]]
        mask, row = masks[image["file_name"]], rows[image["file_name"]]
        assert (coco.annToMask(annotation) == mask).all()
        assert annotation["bbox"] == [int(row[name]) for name in ("x", "y", "width", "height")]
        assert coco.cats[annotation["category_id"]]["name"] == row["class"]


def test_geojson_holds_outlines_of_the_same_masks(capsys, masks, trained, photos, tmp_path):
    result = segmented(capsys, trained, photos, "--format", "geojson", "--out", tmp_path, *FAST)
    assert list(result["files"]) == list(masks)
    for key, file in result["files"].items():
        document = json.loads((tmp_path / file).read_text())
        [feature] = document["features"]
        assert feature["properties"]["picture"] == key
        assert feature["properties"]["class"] in ("species_0", "species_1", "species_2")
        geometry, drawn = feature["geometry"], Image.new("1", (56 * 8, 40 * 8))
        pieces = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        for piece in pieces:
            for i, ring in enumerate(piece):
                ImageDraw.Draw(drawn).polygon([(8 * x, 8 * y) for x, y in ring], fill=i == 0)
        inside = np.asarray(drawn)[4::8, 4::8]  # at the centres of the pixels
        assert (inside & (masks[key] == 1)).sum() / (inside | (masks[key] == 1)).sum() > 0.93


def test_voc_holds_the_same_masks_by_class(capsys, png, masks, trained, photos, tmp_path):
    result = segmented(capsys, trained, photos, "--format", "voc", "--out", tmp_path, *FAST)
    rows = {row["key"]: row for row in table(tmp_path / "boxes.csv")}
    for key, mask in masks.items():
        path = tmp_path / result["files"][key]
        assert path == tmp_path / "SegmentationClass" / key
        assert (cw.read_mask(path).numpy() == mask).all()
        with Image.open(path) as file:
            assert file.mode == "P"
            number = int(np.asarray(file).max())
        row = rows[key]
        assert number == 1 + int(row["class"].removeprefix("species_"))
        document = ElementTree.parse((tmp_path / "Annotations" / key).with_suffix(".xml"))
        assert document.findtext("segmented") == "1"
        thing = document.find("object")
        assert thing.findtext("name") == row["class"]
        low = [int(thing.findtext(f"bndbox/{name}")) for name in ("xmin", "ymin")]
        assert low == [int(row["x"]) + 1, int(row["y"]) + 1]
        assert int(thing.findtext("bndbox/xmax")) == int(row["x"]) + int(row["width"])
    assert result["per_image"] == json.loads((png / "segmentation.json").read_text())["per_image"]


@pytest.mark.parametrize("kind", ["coco", "voc", "geojson"])
def test_classes_without_a_name_are_numbered(capsys, photos, tmp_path, kind):
    options = ["--size", "32", "--format", kind, "--limit", "2", "--pipeline", "classic", *FAST]
    segmented(capsys, factory(tmp_path), photos, *options, "--out", tmp_path / "out")
    assert {row["class"] for row in table(tmp_path / "out" / "boxes.csv")} == {"class 2"}
    if kind == "coco":
        document = json.loads((tmp_path / "out" / "coco.json").read_text())
        assert document["categories"][2]["name"] == "class 2"
        assert {annotation["category_id"] for annotation in document["annotations"]} == {3}
    else:
        files = [*(tmp_path / "out").rglob("*.xml"), *(tmp_path / "out").rglob("*.geojson")]
        assert files
        assert all("class 2" in file.read_text() for file in files)


def test_pictures_and_masks_are_not_replaced_in_the_folders_of_a_format_either(capsys, photos, trained, tmp_path):
    shutil.copytree(photos / "MASKS", tmp_path / "SegmentationClass")
    shutil.copytree(photos / "val", tmp_path / "cutouts" / "val")
    before = contents(tmp_path)
    wrong = ["segment", trained, photos, "--out", tmp_path, "--overwrite"]
    told = failure(capsys, *wrong, "--masks", tmp_path / "SegmentationClass", "--format", "voc")
    assert "would replace" in told
    wrong[2] = tmp_path / "cutouts"
    assert "would replace" in failure(capsys, *wrong, "--cutouts")
    assert contents(tmp_path) == before
