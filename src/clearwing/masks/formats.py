"""Masks as annotation tools take them: boxes, polygons, COCO, GeoJSON, PASCAL VOC and transparent cut-outs.

Everything here is of one mask (H, W), 0 background and 1 foreground, in the original picture's pixels: the one object
of its picture, in perhaps several pieces and with holes. Coordinates are those of pixel edges, x to the right and y
down: the first pixel lies between (0, 0) and (1, 1), the whole picture between (0, 0) and (W, H).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_length
from torch import Tensor

from clearwing.types import IGNORE, ClearwingError, near

Mask = Tensor | NDArray[Any]
"""(H, W), bool or 0 and 1."""
Box = tuple[int, int, int, int]
"""x, y, width, height in pixels; (0, 0, 1, 1) is the first pixel."""
Ring = NDArray[np.float64]
"""(P, 2): x and y of the corners in their order, the first not repeated at the end."""
Polygon = list[Ring]
"""One piece: its outer ring, then those of its holes."""

TOLERANCE = 0.5
"""How far, in pixels, a simplified outline may stray: less than a pixel, for about half as many corners."""
FORMS = ("rle", "polygons")
"""How COCO may hold a mask: run lengths are exact, polygons can be edited by hand."""

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def box(mask: Mask) -> Box | None:
    """The smallest box that holds the foreground of (H, W); None where there is none."""
    x, y, width, height = cv2.boundingRect(_pixels(mask))
    return (x, y, width, height) if width else None


def polygons(mask: Mask, tolerance: float = TOLERANCE) -> list[Polygon]:
    """The outlines of the pieces of (H, W), the topmost first; none where there is no foreground.

    A piece is what hangs together along pixel edges: pixels that touch at a corner alone are two pieces, so no ring
    meets itself. The area of a ring, the sum of (x dy - y dx) / 2, is positive for an outer ring, negative for a hole.

    Args:
        mask: (H, W), bool or 0 and 1.
        tolerance: in pixels. 0 follows the pixel edges, and filling the rings gives the mask back. Otherwise staircases
            are cut through the middles of their steps, and simplified as far as the tolerance allows (Douglas and
            Peucker 1973). Rings that would vanish, cross or touch stay closer to the pixel edges, so that pieces of one
            pixel survive; only above 1.4 may an outline leap over a neighbour that is smaller than the tolerance.

    Raises ClearwingError for what is no mask, and for a tolerance that is negative or not finite.

    >>> [[outer, hole]] = polygons(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]]), tolerance=0)
    >>> outer.tolist()
    [[3.0, 0.0], [3.0, 3.0], [0.0, 3.0], [0.0, 0.0]]
    """
    if not 0 <= tolerance < float("inf"):
        raise ClearwingError("tolerance", tolerance, "give a number of pixels; 0 follows the pixel edges")
    traced = _trace(_pixels(mask))
    if tolerance == 0 or not traced:
        return traced
    simple = iter(_simplify([ring for polygon in traced for ring in polygon], tolerance))
    return [[next(simple) for _ in polygon] for polygon in traced]


def coco_annotation(
    mask: Mask, *, id: int, image_id: int, category_id: int, form: str = "rle", tolerance: float = TOLERANCE
) -> dict[str, Any] | None:
    """The annotation of (H, W) for `coco_document`; None where there is no foreground.

    Args:
        mask: (H, W), bool or 0 and 1.
        id: of the annotation, from 1 (the COCO evaluation takes 0 for "not matched").
        image_id: of its `coco_image`.
        category_id: class index + 1, as `coco_document` numbers the categories.
        form: "rle", the exact mask in compressed run lengths; or "polygons", a list of x, y, x, y, ... for each piece.
            COCO's polygons have no holes: a hole is joined to its outer ring by a cut of no width, there and back along
            the same line, which fills as a hole does.
        tolerance: of `polygons`; its area and box are still those of the pixels.

    Raises ClearwingError for what is no mask, and for an unknown form.
    """
    if form not in FORMS:
        raise ClearwingError("form", form, near(str(form), FORMS))
    pixels = _pixels(mask)
    bounds = box(pixels)
    if bounds is None:
        return None
    segmentation: Any
    if form == "rle":
        segmentation = run_length.encode(np.asfortranarray(pixels))
        segmentation["counts"] = segmentation["counts"].decode("ascii")
    else:
        segmentation = [_join_holes(polygon).ravel().tolist() for polygon in polygons(pixels, tolerance)]
    about = {"id": id, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
    return about | {"area": int(pixels.sum()), "bbox": list(bounds), "segmentation": segmentation}


def coco_image(*, id: int, file_name: str, width: int, height: int) -> dict[str, Any]:
    """The entry of a picture for `coco_document`."""
    return {"id": id, "file_name": file_name, "width": width, "height": height}


def coco_document(
    images: Sequence[Mapping[str, Any]],
    annotations: Iterable[Mapping[str, Any] | None],
    categories: Sequence[str],
    info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A COCO data set of entries from `coco_image` and `coco_annotation`; annotations that are None are left out.

    The categories are class names: that with index k gets the id k + 1. Raises ClearwingError for an annotation of an
    image or a category that is not there.
    """
    kept = [annotation for annotation in annotations if annotation is not None]
    known = {"image_id": {image["id"] for image in images}, "category_id": set(range(1, len(categories) + 1))}
    for annotation in kept:
        for name, ids in known.items():
            if annotation[name] not in ids:
                mend = f"its {name} {annotation[name]} is not among the document's {len(ids)}"
                raise ClearwingError("annotations", f"id {annotation['id']}", mend)
    return {
        "info": dict(info or {}),
        "licenses": [],
        "images": list(images),
        "annotations": kept,
        "categories": [{"id": k, "name": name, "supercategory": ""} for k, name in enumerate(categories, 1)],
    }


def geojson_feature(
    mask: Mask, properties: Mapping[str, Any] | None = None, tolerance: float = TOLERANCE
) -> dict[str, Any] | None:
    """The Feature (RFC 7946) of (H, W): a Polygon, or a MultiPolygon of several pieces; None where there is none.

    Two things are not the letter of the RFC. The coordinates are pixels, as QuPath and other viewers of large images
    take them, not degrees. And "counterclockwise" is meant of the numbers, as if y pointed up: an outer ring's area is
    positive (see `polygons`), and on the screen, where y points down, it runs clockwise.

    >>> geojson_feature(mask, {"objectType": "annotation", "classification": {"name": "monarch"}})
    """
    shapes = [[np.concatenate([ring, ring[:1]]).tolist() for ring in polygon] for polygon in polygons(mask, tolerance)]
    if not shapes:
        return None
    geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": shapes}
    if len(shapes) == 1:
        geometry = {"type": "Polygon", "coordinates": shapes[0]}
    return {"type": "Feature", "geometry": geometry, "properties": dict(properties or {})}


def geojson_document(features: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The FeatureCollection of one picture; features that are None are left out."""
    return {"type": "FeatureCollection", "features": [feature for feature in features if feature is not None]}


def voc_xml(mask_or_box: Mask | Box | None, filename: str, width: int, height: int, name: str) -> str:
    """The PASCAL VOC annotation of a picture with one object `name`; with none where the mask is empty or None.

    VOC counts pixels from 1 and includes the last: the first pixel alone has xmin = xmax = 1, so `x, y, w, h` becomes
    xmin = x + 1, xmax = x + w. `segmented` is 1 for a mask, 0 for a box. Characters that XML cannot hold are written as
    Python escapes them.

    Raises ClearwingError for a mask that is not (height, width), and a box that is not inside the picture.
    """
    bounds = mask_or_box
    if not isinstance(mask_or_box, tuple | None):
        pixels = _pixels(mask_or_box)
        if pixels.shape != (height, width):
            raise ClearwingError("mask", pixels.shape, f"give one of the picture's size, ({height}, {width})")
        bounds = box(pixels)
    elif mask_or_box is not None:
        x, y, w, h = mask_or_box
        if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
            raise ClearwingError("box", mask_or_box, f"give x, y, width, height inside of {width}x{height} pixels")

    root = ElementTree.Element("annotation")
    _add(root, folder="", filename=filename)
    _add(ElementTree.SubElement(root, "source"), database="Unknown")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=int(not isinstance(mask_or_box, tuple | None)))
    if bounds is not None:
        x, y, w, h = bounds
        thing = ElementTree.SubElement(root, "object")
        _add(thing, name=name, pose="Unspecified", truncated=0, difficult=0)
        _add(ElementTree.SubElement(thing, "bndbox"), xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def voc_mask(mask: Mask, class_index: int) -> Image.Image:
    """(H, W) as PASCAL VOC keeps masks: a palette picture of class numbers in the colours of VOC.

    0 is background and `class_index` + 1 the object; 255, void, is not used. `clearwing.read_mask` reads it back.

    Raises ClearwingError for a class index whose number does not fit below 255.
    """
    if not 0 <= class_index < IGNORE - 1:
        raise ClearwingError("class_index", class_index, f"a palette holds classes 0 to {IGNORE - 2}")
    picture = Image.fromarray(_pixels(mask) * np.uint8(class_index + 1))
    picture.putpalette(voc_palette().tobytes())
    return picture


def voc_palette() -> NDArray[np.uint8]:
    """The colours of PASCAL VOC by class number: uint8 (256, 3).

    The bits of the number, from the lowest, are dealt to red, green and blue in turn, the highest bit of each first.
    """
    number = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((number >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def cutout(picture: NDArray[np.uint8], mask: Mask, *, crop: bool = False) -> NDArray[np.uint8]:
    """The object alone: uint8 (H, W, 3) and its mask (H, W) to RGBA (H, W, 4), transparent elsewhere.

    The background's colours are gone, not only hidden. `crop` cuts to the mask's box; an empty mask gives the whole
    size, all transparent. Raises ClearwingError where the two do not fit together.
    """
    pixels = _pixels(mask)
    if picture.dtype != np.uint8 or picture.shape != (*pixels.shape, 3):
        value = f"{picture.dtype} {picture.shape}"
        raise ClearwingError("picture", value, f"give uint8 RGB of the mask's size, {(*pixels.shape, 3)}")
    cut = np.dstack([picture, np.full_like(pixels, 255)]) * pixels[..., None]
    bounds = box(pixels) if crop else None
    if bounds is None:
        return cut
    x, y, width, height = bounds
    return cut[y : y + height, x : x + width].copy()


def _pixels(mask: Mask) -> NDArray[np.uint8]:
    """0 and 1 as contiguous uint8 (H, W), or an error."""
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "bui":
        raise ClearwingError("mask", f"{values.dtype} {values.shape}", "give one mask (H, W), bool or 0 and 1")
    if values.min() < 0 or values.max() > 1:
        mend = "give 0 and 1: mask > 127 of black and white, mask == 1 where 255 is ignore"
        raise ClearwingError("mask", f"values {values.min()} to {values.max()}", mend)
    return np.ascontiguousarray(values, np.uint8)


def _trace(pixels: NDArray[np.uint8]) -> list[Polygon]:
    """The pixel edges round the pieces of uint8 (H, W), corners alone.

    A contour of OpenCV goes through the centres of the foreground's outermost pixels. Of a picture drawn twice as large
    it passes every pixel edge on the inner side, at 2x behind the edge x and at 2x - 1 before it, and both are x when
    halved and rounded up; it cuts an inner corner by a diagonal step, both ends of which are that corner.
    """
    found = []
    n, labels, places, _ = cv2.connectedComponentsWithStats(pixels, connectivity=4)
    for k, (x, y, width, height, _) in enumerate(places[1:n], 1):
        piece = (labels[y : y + height, x : x + width] == k).astype(np.uint8)
        contours, parents = cv2.findContours(
            piece.repeat(2, 0).repeat(2, 1), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(2 * int(x), 2 * int(y))
        )
        polygon: Polygon = []
        for contour, (_, _, _, parent) in zip(contours, parents[0], strict=True):
            ring = (contour[:, 0] + 1) // 2
            ring = ring[(ring != np.roll(ring, 1, 0)).any(1)]
            before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
            ring = ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]].astype(np.float64)
            outer = parent < 0
            polygon.insert(0 if outer else len(polygon), ring if (_area(ring) > 0) == outer else ring[::-1])
        found.append(polygon)
    return found


def _simplify(traced: list[Ring], tolerance: float) -> list[Ring]:
    """Rings of pixel edges with fewer corners; edges that would meet get back what they cut off, a point at a time.

    It ends because rings with all their points do not meet, but for corners of pixels that two of them share.
    """
    points, kept = zip(*(_thin(ring, tolerance) for ring in traced), strict=True)
    while True:
        rings = [p[k] for p, k in zip(points, kept, strict=True)]
        if not sum(map(_give_back, points, kept, _meeting(rings))):
            return rings


def _thin(ring: Ring, tolerance: float) -> tuple[Ring, NDArray[np.bool_]]:
    """One ring of pixel edges with its staircases cut through the middles of their steps, and which points it keeps.

    A straight line drawn in pixels has steps of one pixel in one of the two directions, so a corner between two longer
    steps is the object's own and stays. A ring that has nothing left stays as it was.
    """
    run = np.roll(ring, -1, 0) - ring  # from each corner to the next, along one axis
    half, length = np.sign(run) / 2, np.abs(run).sum(1)
    own = (length > 1) & (np.roll(length, 1) > 1)
    points = np.stack([ring, ring + half, ring + run - half], 1)  # (P, 3, 2): the corner, the first middle, the last
    points = points[np.stack([own, np.ones_like(own), length > 1], 1)]
    thin = cv2.approxPolyDP(points.astype(np.float32)[:, None], tolerance, True)[:, 0].astype(np.float64)
    if len(thin) < 3 or _area(thin) * _area(ring) <= 0:
        return ring, np.ones(len(ring), bool)
    return points, np.isin(_complex(points), _complex(thin))


def _give_back(points: Ring, kept: NDArray[np.bool_], edges: NDArray[np.int64]) -> int:
    """Keep the farthest of the points that each of these edges cuts off; how many there were."""
    places = np.flatnonzero(kept)
    given = 0
    for start, end in zip(places[edges], np.roll(places, -1)[edges], strict=True):
        between = np.arange(start + 1, end if end > start else end + len(points)) % len(points)
        if len(between):
            distance = np.abs(_cross((points[end] - points[start])[None], points[between] - points[start]))
            kept[between[distance.argmax()]] = True
            given += 1
    return given


def _meeting(rings: list[Ring]) -> list[NDArray[np.int64]]:
    """The edges of each ring that meet another anywhere but at the joint of the two, by the index of their start.

    A sweep along x: the edges in the order of their left ends, each against its k-th follower, until none is reached.
    """
    ring = np.repeat(np.arange(len(rings)), [len(points) for points in rings])
    a = np.concatenate(rings)  # (E, 2): where each edge begins, and where it ends
    b = np.concatenate([np.roll(points, -1, 0) for points in rings])
    order = np.minimum(a[:, 0], b[:, 0]).argsort(kind="stable")
    a, b, ring = a[order], b[order], ring[order]
    low, high = np.minimum(a, b), np.maximum(a, b)
    found = np.zeros(len(a), bool)
    reaching = np.arange(len(a))
    for k in range(1, len(a)):
        reaching = reaching[reaching < len(a) - k]
        reaching = reaching[low[reaching + k, 0] <= high[reaching, 0]]
        if not len(reaching):
            break
        i = reaching[(low[reaching + k, 1] <= high[reaching, 1]) & (low[reaching, 1] <= high[reaching + k, 1])]
        j = i + k
        u, v = b[i] - a[i], b[j] - a[j]
        between_j = _cross(u, a[j] - a[i]) * _cross(u, b[j] - a[i]) <= 0  # the line of one parts the ends of the other
        between_i = _cross(v, a[i] - a[j]) * _cross(v, b[i] - a[j]) <= 0
        joint = (ring[i] == ring[j]) & ((a[i] == b[j]).all(1) | (b[i] == a[j]).all(1))
        meet = between_i & between_j & ~joint  # where an edge returns along the one before, the next one meets that
        found[order[i[meet]]] = found[order[j[meet]]] = True
    parts = np.split(found, np.cumsum([len(points) for points in rings])[:-1])
    return [np.flatnonzero(part) for part in parts]


def _join_holes(polygon: Polygon) -> Ring:
    """One ring that encloses what the polygon does: from the left, each hole is cut open to the nearest corner."""
    joined, *holes = polygon
    for hole in sorted(holes, key=lambda ring: float(ring[:, 0].min())):
        start = int(hole[:, 0].argmin())
        at = int(((joined - hole[start]) ** 2).sum(1).argmin())
        hole = np.roll(hole, -start, 0)
        joined = np.concatenate([joined[: at + 1], hole, hole[:1], joined[at:]])
    return joined


def _complex(points: NDArray[np.float64]) -> NDArray[np.complex128]:
    """(P, 2) as (P,) numbers x + iy, so that points can be looked up."""
    return points[:, 0] + 1j * points[:, 1]


def _cross(u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]


def _area(ring: Ring) -> float:
    """Signed: positive where x turns to y."""
    return float(_cross(ring, np.roll(ring, -1, 0)).sum() / 2)


def _add(parent: ElementTree.Element, **children: object) -> None:
    for tag, value in children.items():
        text = _NOT_XML.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(value))
        ElementTree.SubElement(parent, tag).text = text
