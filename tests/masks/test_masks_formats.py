"""Masks handed to annotation tools: what is written, read back by the tools' own readers, is the mask."""

import contextlib
import io
import json
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.coco import COCO
from skimage.draw import polygon2mask

from clearwing import read_mask
from clearwing.data.synthetic import draw_split
from clearwing.masks import formats
from clearwing.types import ClearwingError

# pycocotools 2.0 decodes into an array that does not know the keyword "copy" of NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def picture(*rows):
    return np.array([[mark == "#" for mark in row] for row in rows], np.uint8)


DRAWN = dict(zip([f"butterfly {i}" for i in range(6)], draw_split("train", 6, seed=1, size=96)[2], strict=True))
NOISE = {
    f"noise {h}x{w}": (np.random.default_rng(h).random((h, w)) < 0.5).astype(np.uint8) for h, w in [(17, 22), (1, 9)]
}
MASKS = DRAWN | {
    "one pixel": picture("....", ".#..", "...."),
    "full": np.ones((5, 7), np.uint8),
    "one row": picture("##.#"),
    "one column": picture("#", "#", "."),
    "hole": picture("#####", "##..#", "##..#", "#####"),
    "island in a hole": picture("#####", "#...#", "#.#.#", "#...#", "#####"),
    "two holes at a corner": picture("#####", "#.###", "##.##", "#####"),
    "hole open at a corner": picture("####", "#.##", "#..#", "###."),
    "diagonal": picture("#..", ".#.", "..#"),
    "ring of corners": picture(".#.", "#.#", ".#."),
    "squares at a corner": picture("##..", "##..", "..##", "..##"),
    "border": picture("##...", "#...#", "....#"),
    # simplified without a check, these two cross themselves
    "crooked": picture("..#", "..#", "###", "..#", ".##", "###", ".#.", "..#"),
    "hook": picture("...#", "..#.", ".#.#", ".#.#", "..##", ".##.", "##.#", ".##.", "#..#"),
    **NOISE,
    "noise of squares": np.kron(np.random.default_rng(2).random((9, 9)) < 0.5, np.ones((3, 3))).astype(np.uint8),
}
EMPTY = np.zeros((4, 6), np.uint8)
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def filled(rings, shape):
    """What the rings enclose by the even-odd rule, at the centres of the pixels; scikit-image counts from these."""
    inside = np.zeros(shape, bool)
    for ring in rings:
        inside ^= polygon2mask(shape, np.asarray(ring)[:, ::-1] - 0.5)
    return inside.astype(np.uint8)


def area(ring):
    return sum(x * v - u * y for (x, y), (u, v) in zip(ring, np.roll(ring, -1, 0), strict=True)) / 2


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def decoded(annotation, shape):
    return run_length.decode(run_length.merge(run_length.frPyObjects(annotation["segmentation"], *shape)))


def annotate(mask, **options):
    return formats.coco_annotation(mask, id=1, image_id=1, category_id=1, **options)


def opened(document, folder):
    path = folder / "coco.json"
    path.write_text(json.dumps(document))
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        return COCO(path)


def test_the_box_holds_the_foreground_and_no_more():
    assert formats.box(MASKS["one pixel"]) == (1, 1, 1, 1)
    assert formats.box(picture("....", "..#.", ".#..")) == (1, 1, 2, 2)
    assert formats.box(MASKS["full"]) == (0, 0, 7, 5)
    assert formats.box(EMPTY) is None
    assert formats.box(torch.from_numpy(MASKS["full"]).bool()) == (0, 0, 7, 5)


def test_rings_follow_the_pixel_edges():
    [[pixel]] = formats.polygons(MASKS["one pixel"], 0)
    assert sorted(pixel.tolist()) == [[1, 1], [1, 2], [2, 1], [2, 2]]
    [[outer, hole]] = formats.polygons(MASKS["hole"], 0)
    assert sorted(outer.tolist()) == [[0, 0], [0, 4], [5, 0], [5, 4]]
    assert sorted(hole.tolist()) == [[2, 1], [2, 3], [4, 1], [4, 3]]
    assert (area(outer), area(hole)) == (20, -4)


@pytest.mark.parametrize(
    ("name", "holes"),
    [
        ("diagonal", [0, 0, 0]),
        ("ring of corners", [0, 0, 0, 0]),
        ("two holes at a corner", [2]),
        ("hole open at a corner", [1]),
        ("island in a hole", [1, 0]),
    ],
)
def test_pieces_hang_together_along_edges(name, holes):
    found = formats.polygons(MASKS[name], 0)
    assert [len(polygon) - 1 for polygon in found] == holes
    for ring in (ring for polygon in found for ring in polygon):
        assert len(np.unique(ring, axis=0)) == len(ring)  # no ring meets itself


@every_mask
def test_filling_the_pixel_edges_gives_the_mask_back(mask):
    found = formats.polygons(mask, tolerance=0)
    rings = [ring for polygon in found for ring in polygon]
    assert (filled(rings, mask.shape) == mask).all()
    assert sum(area(ring) for ring in rings) == mask.sum()
    assert formats.polygons(EMPTY) == formats.polygons(EMPTY, 0) == []


@pytest.mark.parametrize("mask", DRAWN.values(), ids=DRAWN)
def test_simplified_outlines_stay_near_with_half_the_corners(mask):
    exact, simple = formats.polygons(mask, 0), formats.polygons(mask)
    assert overlap(filled([ring for polygon in simple for ring in polygon], mask.shape), mask) > 0.98
    few, many = (sum(len(ring) for polygon in found for ring in polygon) for found in (simple, exact))
    assert few < 0.6 * many
    assert overlap(decoded(annotate(mask, form="polygons"), mask.shape), mask) > 0.98


@pytest.mark.parametrize("tolerance", [0.5, 1.4, 20.0])
def test_small_pieces_and_straight_corners_survive_any_tolerance(tolerance):
    mask = np.zeros((90, 99), np.uint8)
    mask[5:85, 5:60] = 1
    mask[20, 20] = 0
    mask[40, 90], mask[60, 80:95] = 1, 1
    [[square, hole], [pixel], [line]] = formats.polygons(mask, tolerance)
    assert sorted(square.tolist()) == [[5, 5], [5, 85], [60, 5], [60, 85]]
    assert sorted(hole.tolist()) == [[20, 20], [20, 21], [21, 20], [21, 21]]
    assert sorted(pixel.tolist()) == [[90, 40], [90, 41], [91, 40], [91, 41]]
    assert (filled([line], mask.shape)[60, 80:95] == 1).all()


def test_slanting_edges_are_cut_through_the_middles_of_their_steps():
    x = np.abs(np.arange(41) - 20)
    mask = (x[:, None] + x <= 20).astype(
        np.uint8
    )  # a square on its tip; its corners lie 0.35 pixels outside and inside
    [[ring]] = formats.polygons(mask)
    assert len(ring) <= 8
    assert area(ring) == pytest.approx(mask.sum(), rel=0.005)


def crossing(p, q, r, s):
    """Whether two edges meet anywhere but at common ends."""

    def side(a, b, c):
        return np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))

    def within(a, b, c):  # c on the line through a and b, between the two
        return side(a, b, c) == 0 and min(a, b) <= c <= max(a, b) and c not in (a, b)

    proper = side(p, q, r) * side(p, q, s) < 0 and side(r, s, p) * side(r, s, q) < 0
    same = {p, q} == {r, s}
    return proper or same or within(p, q, r) or within(p, q, s) or within(r, s, p) or within(r, s, q)


@pytest.mark.parametrize("tolerance", [0.5, 1.4, 3.0])
@pytest.mark.parametrize("name", ["noise 17x22", "noise of squares", "squares at a corner", "crooked", "hook"])
def test_simplified_outlines_do_not_cross(name, tolerance):
    found = formats.polygons(MASKS[name], tolerance)
    rings = [[tuple(point) for point in ring.tolist()] for polygon in found for ring in polygon]
    edges = [edge for ring in rings for edge in zip(ring, ring[1:] + ring[:1], strict=True)]
    near = [
        (one, other)
        for one, other in combinations(edges, 2)
        if max(one)[0] >= min(other)[0] and max(other)[0] >= min(one)[0]
    ]
    assert not [pair for pair in near if crossing(*pair[0], *pair[1])]
    assert all(area(polygon[0]) > 0 and all(area(hole) < 0 for hole in polygon[1:]) for polygon in found)


@every_mask
@pytest.mark.parametrize("form", formats.FORMS)
def test_coco_reads_the_mask_back(mask, form, tmp_path):
    height, width = mask.shape
    annotation = formats.coco_annotation(mask, id=7, image_id=3, category_id=2, form=form, tolerance=0)
    image = formats.coco_image(id=3, file_name="a.jpg", width=width, height=height)
    coco = opened(formats.coco_document([image], [annotation], ["moth", "monarch"], {"year": 2024}), tmp_path)
    assert coco.getAnnIds(imgIds=[3], catIds=[2]) == [7]
    assert (coco.annToMask(coco.anns[7]) == mask).all()
    assert annotation["area"] == mask.sum()
    assert annotation["iscrowd"] == 0
    assert tuple(annotation["bbox"]) == formats.box(mask) == tuple(run_length.toBbox(coco.annToRLE(annotation)))


def test_a_hole_is_cut_open_in_cocos_polygons():
    [ring] = annotate(MASKS["hole"], form="polygons")["segmentation"]
    points = np.reshape(ring, (-1, 2))
    assert len(points) == 4 + 4 + 2  # both ends of the cut twice
    assert area(points) == 16  # the cut encloses nothing


def test_holes_are_cut_open_to_what_is_nearest():
    mask = np.ones((5, 41), np.uint8)
    mask[2, 2:39:2] = 0  # 19 holes of one pixel, one pixel apart
    [ring] = annotate(mask, form="polygons")["segmentation"]
    points = np.reshape(ring, (-1, 2))
    length = np.hypot(*(points - np.roll(points, -1, 0)).T).sum()
    assert length - (2 * (5 + 41) + 19 * 4) == pytest.approx(2 * (18 + np.hypot(2, 2)))


def test_a_coco_document_of_several_pictures(tmp_path):
    sizes = enumerate([EMPTY, MASKS["hole"]], 1)
    images = [formats.coco_image(id=i, file_name=f"{i}.jpg", width=m.shape[1], height=m.shape[0]) for i, m in sizes]
    rows = [formats.coco_annotation(m, id=i, image_id=i, category_id=1) for i, m in [(1, EMPTY), (2, MASKS["hole"])]]
    assert rows[0] is None
    document = formats.coco_document(images, rows, ["monarch"])
    coco = opened(document, tmp_path)
    assert coco.loadCats([1])[0]["name"] == "monarch"
    assert [len(coco.getAnnIds(imgIds=[i])) for i in (1, 2)] == [0, 1]
    with pytest.raises(ClearwingError, match="annotations: id 2; its category_id 1 is not among the document's 0"):
        formats.coco_document(images, rows, [])
    with pytest.raises(ClearwingError, match="its image_id 2 is not among"):
        formats.coco_document(images[:1], rows, ["monarch"])


@every_mask
def test_geojson_holds_the_mask(mask):
    feature = formats.geojson_feature(mask, {"classification": {"name": "monarch"}}, tolerance=0)
    document = json.loads(json.dumps(formats.geojson_document([feature, None])))
    assert document["type"] == "FeatureCollection"
    [feature] = document["features"]
    assert feature["type"] == "Feature"
    assert feature["properties"] == {"classification": {"name": "monarch"}}
    shapes = feature["geometry"]["coordinates"]
    if feature["geometry"]["type"] == "Polygon":
        shapes = [shapes]
    else:
        assert feature["geometry"]["type"] == "MultiPolygon"
        assert len(shapes) > 1
    for outer, *holes in shapes:
        assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in [outer, *holes])
        assert area(outer[:-1]) > 0  # counterclockwise in the numbers
        assert all(area(hole[:-1]) < 0 for hole in holes)
    assert (filled([ring[:-1] for shape in shapes for ring in shape], mask.shape) == mask).all()


def test_geojson_of_an_empty_mask_is_an_empty_collection():
    assert formats.geojson_feature(EMPTY) is None
    assert formats.geojson_document([None]) == {"type": "FeatureCollection", "features": []}


def test_voc_counts_from_one_and_includes_the_last():
    mask = picture("......", ".##...", ".###..", "......")
    root = ElementTree.fromstring(formats.voc_xml(mask, "a.jpg", 6, 4, "monarch"))
    assert [root.findtext(f"object/bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")] == list("2243")
    assert [root.findtext(f"size/{name}") for name in ("width", "height", "depth")] == ["6", "4", "3"]
    assert (root.findtext("object/name"), root.findtext("segmented")) == ("monarch", "1")
    boxed = ElementTree.fromstring(formats.voc_xml((0, 0, 6, 4), "a.jpg", 6, 4, "monarch"))
    assert [side.text for side in boxed.iterfind("object/bndbox/*")] == ["1", "1", "6", "4"]
    assert boxed.findtext("segmented") == "0"


@pytest.mark.parametrize("nothing", [None, EMPTY])
def test_voc_of_an_empty_mask_has_no_object(nothing):
    root = ElementTree.fromstring(formats.voc_xml(nothing, "a.jpg", 6, 4, "monarch"))
    assert root.findtext("filename") == "a.jpg"
    assert root.find("object") is None


def test_voc_escapes_names():
    name, file = """<Vanessa> & "io" 'é'""", "a\x01\udcff&.jpg"
    root = ElementTree.fromstring(formats.voc_xml((0, 0, 1, 1), file, 6, 4, name))
    assert root.findtext("object/name") == name
    assert root.findtext("filename") == r"a\x01\udcff&.jpg"


@every_mask
def test_voc_masks_are_read_back(mask, tmp_path):
    image = formats.voc_mask(mask, 4)
    assert image.mode == "P"
    image.save(tmp_path / "mask.png")
    assert (read_mask(str(tmp_path / "mask.png")).numpy() == mask).all()
    with Image.open(tmp_path / "mask.png") as held:
        assert (np.array(held) == 5 * mask).all()
        assert {tuple(colour) for colour in np.array(held.convert("RGB"))[mask == 1].tolist()} == {(128, 0, 128)}


def test_the_colours_are_those_of_voc():
    colours = formats.voc_palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {number: tuple(colours[number].tolist()) for number in known} == known
    assert len(np.unique(colours, axis=0)) == 256


def test_a_cutout_is_transparent_elsewhere():
    mask = picture("......", ".##...", ".#.#..", "......")
    colours = np.random.default_rng(0).integers(1, 256, (4, 6, 3), dtype=np.uint8)
    cut = formats.cutout(colours, mask)
    assert (cut[..., 3] == 255 * mask).all()
    assert (cut[..., :3] == colours * mask[..., None]).all()
    assert (formats.cutout(colours, mask.astype(bool), crop=True) == cut[1:3, 1:4]).all()
    empty = formats.cutout(colours, EMPTY, crop=True)
    assert empty.shape == (4, 6, 4)
    assert not empty.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: formats.box(np.array([[0, 255]], np.uint8)), "mask: values 0 to 255; give 0 and 1"),
        (lambda: formats.polygons(np.ones((1, 4, 4), bool)), r"mask: bool \(1, 4, 4\); give one mask"),
        (lambda: formats.polygons(np.ones((0, 4), bool)), r"mask: bool \(0, 4\)"),
        (lambda: formats.box(torch.rand(4, 4)), r"mask: float32 \(4, 4\)"),
        (lambda: formats.polygons(EMPTY, -1), "tolerance: -1; give a number of pixels"),
        (lambda: formats.polygons(EMPTY, float("nan")), "tolerance: nan"),
        (lambda: annotate(EMPTY, form="polygon"), r"form: polygon; did you mean polygons\?"),
        (lambda: formats.voc_mask(EMPTY, 254), "class_index: 254; a palette holds classes 0 to 253"),
        (lambda: formats.voc_xml(EMPTY, "a.jpg", 4, 6, "x"), r"mask: \(4, 6\); give one of the picture's size, \(6, 4"),
        (lambda: formats.voc_xml((3, 0, 4, 1), "a.jpg", 6, 4, "x"), r"box: \(3, 0, 4, 1\); give .* inside of 6x4"),
        (lambda: formats.cutout(np.ones((6, 4, 3), np.uint8), EMPTY), r"picture: uint8 \(6, 4, 3\); give uint8 RGB"),
    ],
)
def test_what_is_wrong_is_refused(call, message):
    with pytest.raises(ClearwingError, match=message):
        call()
