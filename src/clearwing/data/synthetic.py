"""The built-in data set: butterflies and moths drawn by rule on cluttered backgrounds, with exact masks.

Every layer is an RGBA uint8 array with premultiplied alpha, at twice the final size. OpenCV's antialiased polygons in
(r, g, b, 255) are then exactly the "over" operator, and blurring or warping a layer keeps its edges right.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

from clearwing.data.species import FLOWERS, SCENES, SPECIES, Band, Curve, Mark, Scene, Species, Veins, Wing
from clearwing.types import ClearwingError, near

Array = NDArray[Any]  # floating; points are (P, 2) in pixels, x before y
Layer = NDArray[Any]  # (H, W, 4) uint8, premultiplied RGBA
Field = NDArray[Any]  # (H, W) float32

CLASS_NAMES = tuple(species.name for species in SPECIES)
SIZE = 128
SPLITS = {"train": 1100, "val": 200, "test": 250}
AREA = (0.07, 0.35)  # smallest and largest share of the frame that the wings are drawn for
OVER = 2  # supersampling
STEPS = 6  # points of a curve for each of its control points
SHIFT = 4  # fractional bits of the polygons' fixed-point coordinates


# --- drawing on premultiplied layers ---------------------------------------------------------------------------


def _fixed(points: Array) -> NDArray[np.int32]:
    return np.rint(points * (1 << SHIFT)).astype(np.int32)


def _fill(layer: Layer, polygons: Array, colours: Any) -> None:
    """Fill one polygon (P, 2) or several (N, P, 2), each in its RGB colour (N, 3), antialiased."""
    fixed = _fixed(polygons).reshape(-1, *polygons.shape[-2:])
    for polygon, colour in zip(fixed, np.reshape(colours, (-1, 3)).tolist(), strict=True):
        cv2.fillPoly(layer, [polygon], (*colour, 255), cv2.LINE_AA, SHIFT)


def _line(layer: Layer, lines: Array, colour: Any, width: float) -> None:
    """Draw one line (P, 2) or several (N, P, 2) in one colour."""
    fixed = _fixed(lines).reshape(-1, *lines.shape[-2:])
    cv2.polylines(layer, list(fixed), False, (*colour, 255), max(1, round(width)), cv2.LINE_AA, SHIFT)


def _disc(layer: Layer, at: Array, radius: float, colour: Sequence[float]) -> None:
    x, y = _fixed(at).tolist()
    cv2.circle(layer, (x, y), round(radius * (1 << SHIFT)), (*colour, 255), -1, cv2.LINE_AA, SHIFT)


def _over(below: Layer, above: Layer) -> Layer:
    rest = cv2.bitwise_not(above[..., 3])
    return cv2.add(above, cv2.multiply(below, cv2.merge([rest] * 4), scale=1 / 255))


def _shade(layer: Layer, field: Field) -> Layer:
    """Multiply the colours, not the alpha, by a field (H, W)."""
    return cv2.multiply(layer, cv2.merge([field, field, field, np.ones_like(field)]), dtype=cv2.CV_8U)


def _soft(alpha: NDArray[Any], sigma: float) -> Field:
    """A blurred mask (H, W) in [0, 1], by way of a quarter of the size."""
    height, width = alpha.shape
    small = cv2.resize(alpha, (-(-width // 4), -(-height // 4)), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small.astype(np.float32) / 255, (0, 0), max(sigma / 4, 0.3))
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _field(rng: Generator, shape: Sequence[int], cells: int, low: float, high: float) -> Field:
    """A smooth random field (H, W) between about `low` and `high`."""
    coarse = rng.uniform(low, high, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def _rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _jitter(rng: Generator, colour: Sequence[float], amount: float) -> Array:
    """The colour, lighter or darker and a little off its hue."""
    light = rng.uniform(1 - amount, 1 + amount)
    return np.clip(np.array(colour) * light + rng.uniform(-90, 90, 3) * amount, 0, 255)


@lru_cache(maxsize=64)
def _smooth(outline: Curve) -> Array:
    """A closed Catmull-Rom curve through the control points, STEPS points for each, (P, 2)."""
    points = np.array(outline)
    t = np.linspace(0, 1, STEPS, endpoint=False)[:, None, None]
    before, start, end, after = (np.roll(points, k, axis=0) for k in (1, 0, -1, -2))
    curve = start + 0.5 * t * (
        end - before + t * (2 * before - 5 * start + 4 * end - after + t * (3 * (start - end) + after - before))
    )
    return curve.transpose(1, 0, 2).reshape(-1, 2)


# --- the insect ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """How an insect sits in the picture, in pixels of the supersampled canvas."""

    centre: Array  # (2,) where the wings meet the body
    unit: float  # pixels per wing length
    body: Array  # (2, 2) rotation of the body
    sides: tuple[Array, ...]  # (2, 2) each, what takes the drawn wings to the right and left side; one when closed
    turn: Array  # (2, 2) how far the forewings are drawn up


@lru_cache(maxsize=64)
def _outline(wing: Wing) -> tuple[Array, Array]:
    """The outline (P, 2) and the outer margin (Q, 2) of the wing."""
    curve, (first, last), (count, depth) = _smooth(wing.outline).copy(), wing.margin, wing.scallops
    margin = slice(first * STEPS, last * STEPS + 1)
    if count:
        along = np.linspace(0, 1, (last - first) * STEPS + 1)
        curve[margin] *= (1 - depth * np.abs(np.cos(np.pi * count * along)))[:, None]
    return curve, curve[margin]


def _sides(rng: Generator) -> tuple[Array, ...]:
    """Wings open, half folded or closed: a fold narrows a side and shears it."""
    kind, tilt = rng.random(), rng.uniform(-0.12, 0.12)
    if kind < 0.12:
        return (np.array([[1.0, 0.0], [tilt, 1.0]]),)
    low = 0.82 if kind < 0.66 else 0.38
    right, left = rng.permutation([rng.uniform(0.8, 1), rng.uniform(low, 1)])
    return (
        np.array([[right, 0.0], [tilt + 0.3 * (1 - right), 1.0]]),
        np.array([[-left, 0.0], [-tilt + 0.3 * (1 - left), 1.0]]),
    )


def _pose(rng: Generator, species: Species, side: int) -> Pose:
    """A pose whose wings cover a log-uniform share of the frame, mostly inside it, often far from its centre."""
    angle = rng.uniform(-1, 1) * rng.uniform(0.2, 1.6)
    body, turn, sides = _rotation(angle), _rotation(rng.uniform(-0.2, 0.14)), _sides(rng)
    fore, hind = _outline(species.fore)[0] @ turn.T, _outline(species.hind)[0]
    points = np.concatenate([np.concatenate([fore, hind]) @ (body @ fold).T for fold in sides])
    area = sum(abs(np.linalg.det(fold)) for fold in sides) * (_area(fore) + 0.8 * _area(hind))
    share = AREA[0] * (AREA[1] / AREA[0]) ** rng.random()
    unit = side * np.sqrt(share / area)
    low, high = points.min(0) * unit, points.max(0) * unit
    room = np.maximum(side - (high - low), 0) + 0.08 * (high - low)
    place = rng.random(2)
    centre = (side - room) / 2 + place * room - (low + high) / 2
    return Pose(centre, float(unit), body, sides, turn)


def _area(curve: Array) -> float:
    x, y = curve.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _on_wing(root: Array, margin: Array, along: Array, out: Array) -> Array:
    """Places (P, 2) at `along` (0 to 1 of the margin; beyond, it goes on straight) and `out` (0 root, 1 margin)."""
    inside, grid = np.clip(along, 0, 1), np.linspace(0, 1, len(margin))
    edge = np.stack([np.interp(inside, grid, margin[:, 0]), np.interp(inside, grid, margin[:, 1])], 1)
    edge += (along - inside)[:, None] * (margin[-1] - margin[0])
    return root + out[:, None] * (edge - root)


def _paint_mark(layer: Layer, mark: Mark, root: Array, margin: Array, unit: float, rng: Generator) -> None:
    """Paint one mark; `root` (2,) and `margin` (Q, 2) are in pixels, `unit` is pixels per wing length."""
    if isinstance(mark, Veins):
        ends = _on_wing(root, margin, np.linspace(0.02, 0.98, mark.count), np.ones(mark.count))
        _line(layer, np.stack([np.broadcast_to(root, ends.shape), ends], 1), mark.colour, mark.width * unit)
    elif isinstance(mark, Band):
        share = np.linspace(0, 1, 9)
        along = mark.along[0] + share * (mark.along[1] - mark.along[0])
        wave = rng.uniform(-0.015, 0.015, (2, 9))
        inner, outer = (
            _on_wing(root, margin, along, np.interp(share, (0, 0.5, 1), out) + shift)
            for out, shift in zip((mark.inner, mark.outer), wave, strict=True)
        )
        _fill(layer, np.concatenate([inner, outer[::-1]]), mark.colour)
    else:
        places = np.array(mark.places) + rng.uniform(-0.012, 0.012, (len(mark.places), 2))
        growth = rng.uniform(0.82, 1.18) * unit
        for place in _on_wing(root, margin, places[:, 0], places[:, 1]):
            for radius, colour in mark.rings:
                _disc(layer, place, radius * growth, colour)


def _paint_wing(layer: Layer, wing: Wing, turn: Array, root: Array, unit: float, rng: Generator) -> Layer:
    """`layer` with the wing over it."""
    curve, margin = (points @ turn.T * unit + root for points in _outline(wing))
    painted = np.empty_like(layer)
    painted[:] = (*wing.ground[-1], 255)
    out, stops = np.linspace(1, 0.1, 10), np.linspace(0, 1, len(wing.ground))
    grounds = [np.interp(out, stops, channel) for channel in zip(*wing.ground, strict=True)]
    _fill(painted, root + (curve - root) * out[:, None, None], np.stack(grounds, 1))
    for mark in wing.marks:
        _paint_mark(painted, mark, root, margin, unit, rng)
    if wing.costa:
        _line(painted, curve[: wing.margin[0] * STEPS + 1], wing.costa, 0.05 * unit)
    painted = cv2.GaussianBlur(painted, (0, 0), 0.008 * unit + 0.3)  # scales, not ink
    clip = np.zeros(layer.shape[:2], np.uint8)
    cv2.fillPoly(clip, [_fixed(curve)], 255, cv2.LINE_AA, SHIFT)
    below = _shade(layer, 1 - 0.45 * _soft(clip, 0.03 * unit))  # this wing's shadow upon the other
    return _over(below, cv2.multiply(painted, cv2.merge([clip] * 4), scale=1 / 255))


def _tint(rng: Generator, dull: float) -> Array:
    """A (4, 4) change of hue, saturation and value: how individuals of a species differ; `dull` greys it."""
    hue, saturation, value = rng.uniform(-0.12, 0.12), rng.uniform(0.78, 1.12) - dull, rng.uniform(0.84, 1.1)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turned = np.cos(hue) * np.eye(3) + (1 - np.cos(hue)) * grey + np.sin(hue) * cross
    matrix = np.eye(4)
    matrix[:3, :3] = value * (saturation * turned + (1 - saturation) * grey)
    return matrix.astype(np.float32)


def _wings(rng: Generator, species: Species, pose: Pose) -> tuple[Layer, Array]:
    """The wings of one side, drawn flat, and where their root lies in the drawing."""
    curves = np.concatenate([_outline(species.fore)[0] @ pose.turn.T, _outline(species.hind)[0]]) * pose.unit
    root = 2 - curves.min(0)
    width, height = (np.ceil(curves.max(0) + root) + 2).astype(int)
    layer = np.zeros((height, width, 4), np.uint8)
    for wing, turn in ((species.hind, np.eye(2)), (species.fore, pose.turn)):
        layer = _paint_wing(layer, wing, turn, root, pose.unit, rng)
    grain = _field(rng, layer.shape, 48, 0.94, 1.06) * _field(rng, layer.shape, 4, 0.84, 1.14)
    tint = _tint(rng, 0.25 if len(pose.sides) == 1 else 0.0)
    return cv2.transform(_shade(layer, grain), tint), root


def _body(layer: Layer, rng: Generator, species: Species, pose: Pose) -> None:
    """Antennae, abdomen with its rings, thorax, head."""

    def place(*points: tuple[float, float]) -> Array:
        return pose.centre + np.array(points) @ pose.body.T * pose.unit

    thick, length = 0.062 * species.plump, rng.uniform(0.46, 0.56)
    for sign in (-1, 1):
        reach = rng.uniform(0.16, 0.26)
        t = np.linspace(0, 1, 8)[:, None]
        start, bend, tip = np.array([[0.02, -0.26], [0.06, -0.46], [reach, -0.6 + 0.15 * species.feathered]])
        curve = ((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * tip) * (sign, 1)
        _line(layer, place(*map(tuple, curve)), species.body, 0.014 * pose.unit)
        if species.feathered:
            for k in range(1, 7):
                long = np.array([[0.03 + 0.012 * (6 - k), -0.05]]) * ((1,), (-0.8,)) * (sign, 1)
                barb = np.stack([curve[k] + long[0], curve[k], curve[k] + long[1] * (1, -1)])
                _line(layer, place(*map(tuple, barb)), species.body, 0.018 * pose.unit)
        else:
            _disc(layer, place(tuple(curve[-1]))[0], 0.022 * pose.unit, species.body)
    shape = ((0, -0.28), (0.6, -0.24), (0.7, -0.18), (1, -0.06), (0.9, 0.05), (0.72, 0.2), (0.5, 0.36), (0.1, 0.5))
    half = [(x * thick, y * (length / 0.5 if y > 0 else 1)) for x, y in shape]
    _fill(layer, place(*half, *[(-x, y) for x, y in half[::-1]]), species.body)
    for y in np.linspace(0.1, 0.4, 5):
        wide = thick * (0.84 - 1.2 * y)
        _line(layer, place((-wide, y), (wide, y)), species.stripe, 0.014 * pose.unit)
    ridge = [0.5 * c + 0.5 * d for c, d in zip(species.body, species.stripe, strict=True)]
    _line(layer, place((-0.2 * thick, -0.16), (-0.2 * thick, 0.06)), ridge, 0.03 * pose.unit)


def _insect(rng: Generator, species: Species, pose: Pose, side: int) -> Layer:
    """The insect alone on a transparent canvas."""
    flat, root = _wings(rng, species, pose)
    layer = np.zeros((side, side, 4), np.uint8)
    for fold in pose.sides:
        matrix = pose.body @ fold
        shift = pose.centre - matrix @ root
        light = np.float32(rng.uniform(0.78, 1.02) + 0.1 * (abs(fold[0, 0]) - 1))
        lit = _shade(flat, np.full(flat.shape[:2], light))
        wing = cv2.warpAffine(lit, np.column_stack([matrix, shift]), (side, side), flags=cv2.INTER_LINEAR)
        layer = _over(layer, wing)
    _body(layer, rng, species, pose)
    return layer


# --- the place -------------------------------------------------------------------------------------------------


def _leaf(layer: Layer, rng: Generator, at: Array, reach: float, scene: Scene) -> None:
    """A pointed leaf of length `reach` with a light and a dark half and veins."""
    colour = _jitter(rng, scene.leaves[rng.integers(len(scene.leaves))], 0.2)
    t = np.linspace(0, 1, 12)
    width, bend = rng.uniform(0.13, 0.26), rng.uniform(-0.25, 0.25)
    rotate = _rotation(rng.uniform(0, 2 * np.pi)).T * reach
    spine = np.stack([t - 0.5, bend * t * (1 - t)], 1)
    rim = np.stack([0 * t, width * np.sin(np.pi * t**0.8)], 1)
    halves = np.stack([np.concatenate([spine, (spine + sign * rim)[::-1]]) for sign in (1, -1)])
    _fill(layer, halves @ rotate + at, [colour, colour * rng.uniform(0.72, 0.92)])
    vein = np.minimum(colour * 1.22 + 8, 255).tolist()
    _line(layer, spine @ rotate + at, vein, 0.016 * reach)
    sides = [np.stack([spine[2:9:2], spine[4:11:2] + sign * rim[4:11:2]], 1) for sign in (0.8, -0.8)]
    _line(layer, np.concatenate(sides) @ rotate + at, vein, 1)


PETALS = (
    ((0.1, 0.0), (0.45, -0.2), (0.85, -0.26), (1.0, 0.0), (0.85, 0.26), (0.45, 0.2)),
    ((0.1, 0.0), (0.4, -0.1), (0.8, -0.11), (1.0, 0.0), (0.8, 0.11), (0.4, 0.1)),
    ((0.1, 0.0), (0.5, -0.36), (0.9, -0.34), (0.86, 0.0), (0.9, 0.34), (0.5, 0.36)),
)
HEART = ((0.26, 0.0), (0.0, 0.26), (-0.26, 0.0), (0.0, -0.26))


def _flower(layer: Layer, rng: Generator, at: Array, reach: float, scene: Scene) -> None:
    """A flower of radius `reach` on its stem, seen from above or aslant."""
    kind = int(rng.integers(3))
    count = int(rng.integers(*((6, 10), (12, 19), (5, 7))[kind]))
    foot = at + np.array([rng.uniform(-1.5, 1.5), 6]) * reach
    bow = (at + foot) / 2 + np.array([rng.uniform(-0.8, 0.8), 0]) * reach
    stem = _jitter(rng, scene.leaves[0], 0.2)
    _line(layer, np.array([at, (at + 3 * bow) / 4, bow, (foot + 3 * bow) / 4, foot]), stem, 0.09 * reach)
    view = _rotation(rng.uniform(0, np.pi)) @ np.diag([1.0, rng.uniform(0.45, 1.0)]) * reach
    angles = rng.uniform(0, np.pi) + 2 * np.pi / count * 2 * np.arange(count)
    angles[(count + 1) // 2 :] += 2 * np.pi / count * (1 - count % 2)  # every other petal lies on top
    turns = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], 1).reshape(-1, 2, 2)
    petals = _smooth(PETALS[kind])[::2] @ (view @ turns).transpose(0, 2, 1)  # (count, P, 2)
    colour = _jitter(rng, FLOWERS[rng.integers(len(FLOWERS))], 0.14)
    colours = np.minimum(colour * rng.uniform(0.76, 1.08, (count, 1)), 255)
    shapes = np.stack([petals, 0.45 * petals], 1) + at  # each with the shade of its throat
    _fill(layer, shapes.reshape(2 * count, -1, 2), np.stack([colours, 0.8 * colours], 1))
    heart = ((226, 184, 60), (116, 78, 46), (226, 218, 150))[rng.integers(3)]
    _fill(layer, _smooth(HEART)[::2] @ view.T + at, _jitter(rng, heart, 0.1))


def _blade(layer: Layer, rng: Generator, at: Array, reach: float, scene: Scene) -> None:
    """A bent blade of grass or a stem through `at`, about three times `reach` long."""
    colour = _jitter(rng, scene.leaves[rng.integers(len(scene.leaves))], 0.25)
    t, length = np.linspace(-1, 1, 10), 1.6 * reach
    spine = np.stack([rng.uniform(-0.4, 0.4) * (t**2 - 0.1), t], 1) * length
    width = np.stack([rng.uniform(0.03, 0.09) * np.sqrt(1.02 - t) * reach, 0 * t], 1)
    rotate = _rotation(rng.uniform(-0.8, 0.8)).T
    _fill(layer, np.concatenate([spine + width, (spine - width)[::-1]]) @ rotate + at, colour)
    _line(layer, spine @ rotate + at, 0.8 * colour, 1)


def _plants(layer: Layer, rng: Generator, scene: Scene, count: int, reach: tuple[float, float]) -> None:
    """`count` plants strewn over the layer, each a share `reach` of its side."""
    side = layer.shape[0]
    for kind, share, x, y in rng.random((count, 4)):
        draw = _flower if kind < scene.flowers else _leaf if kind < (1 + scene.flowers) / 2 else _blade
        draw(layer, rng, np.array([x, y]) * side, (reach[0] + share * (reach[1] - reach[0])) * side, scene)


def _background(rng: Generator, pose: Pose, side: int) -> Layer:
    """Three depths, each sharper than the one behind it, and what the insect sits on."""
    scene = SCENES[rng.integers(len(SCENES))]
    coarse = np.array(scene.far)[rng.integers(len(scene.far), size=(5, 5))] * rng.uniform(0.7, 1.2, (5, 5, 1))
    layer: Layer = np.full((-(-side // 4), -(-side // 4), 4), 255, np.uint8)
    coarse = np.clip(coarse, 0, 255).astype(np.uint8)
    layer[..., :3] = cv2.resize(coarse, layer.shape[:2], interpolation=cv2.INTER_CUBIC)
    for count, reach, blur in ((9, (0.1, 0.35), (0.8, 2.2)), (7, (0.1, 0.35), (0.3, 1.6))):
        _plants(layer, rng, scene, count, reach)
        layer = cv2.GaussianBlur(layer, (0, 0), rng.uniform(*blur))
        layer = cv2.resize(layer, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
    _plants(layer, rng, scene, int(rng.integers(2, 7)), (0.08, 0.26))
    perch = _flower if rng.random() < 0.5 else _leaf
    below = pose.centre + pose.body @ rng.uniform((-0.3, 0.1), (0.3, 0.5)) * pose.unit
    perch(layer, rng, below, rng.uniform(0.5, 1.0) * pose.unit * (1 if perch is _flower else 1.6), scene)
    layer = layer[:side, :side]
    return _shade(layer, _field(rng, layer.shape, 64, 0.95, 1.05))


def _cast_shadow(rng: Generator, layer: Layer, insect: Layer, pose: Pose) -> Layer:
    shift = np.column_stack([np.eye(2), rng.uniform(-0.12, 0.12, 2) * pose.unit])
    shadow = cv2.warpAffine(insect[..., 3], shift, layer.shape[:2])
    return _shade(layer, 1 - np.float32(rng.uniform(0.2, 0.55)) * _soft(shadow, 0.07 * pose.unit))


def _front(rng: Generator, pose: Pose, side: int) -> Layer:
    """What is before the insect: nothing in half of the pictures, else a blade, leaf or flower, sharp or blurred."""
    layer = np.zeros((side, side, 4), np.uint8)
    if rng.random() < 0.5:
        return layer
    scene = SCENES[rng.integers(len(SCENES))]
    draw = (_blade, _blade, _leaf, _flower)[rng.integers(4)]
    angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.9) * pose.unit
    at = pose.centre + away * np.array([np.cos(angle), np.sin(angle)])
    draw(layer, rng, at, pose.unit * rng.uniform(0.35, 0.7) * (2 if draw is _blade else 1), scene)
    return cv2.GaussianBlur(layer, (0, 0), rng.uniform(0.8, 3.0)) if rng.random() < 0.4 else layer


# --- the light, and the whole picture --------------------------------------------------------------------------


def _light(rng: Generator, image: Layer) -> NDArray[np.uint8]:
    """RGB as a camera gives it: exposure, cast, a gradient, a shadow's edge, blur and noise."""
    height, width = image.shape[:2]
    field = _field(rng, image.shape, 3, 0.75, 1.25)
    if rng.random() < 0.35:  # the shadow of something outside the frame
        edge = _field(rng, image.shape, 4, -1, 1)
        field *= 1 - rng.uniform(0.25, 0.5) / (1 + np.exp(-edge * np.float32(rng.uniform(4, 14))))
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9) * width / 128)
    gain = np.float32(rng.uniform(0.74, 1.24)) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    lit = image[..., :3] * (field[..., None] * gain)
    lit += rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.uniform(1, 6))
    return np.clip(np.rint(lit), 0, 255).astype(np.uint8)


def draw_one(rng: Generator, species: Species | str, size: int = SIZE) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One picture uint8 (size, size, 3) RGB of a species, and its mask uint8 (size, size) of 0 and 1.

    The mask is where the insect's antialiased coverage, less what is in front of it, exceeds one half.
    """
    if isinstance(species, str):
        if species not in CLASS_NAMES:
            raise ClearwingError("species", species, near(species, CLASS_NAMES))
        species = SPECIES[CLASS_NAMES.index(species)]
    side = OVER * size
    pose = _pose(rng, species, side)
    insect, front = _insect(rng, species, pose, side), _front(rng, pose, side)
    behind = _cast_shadow(rng, _background(rng, pose, side), insect, pose)
    whole = _over(_over(behind, insect), front)
    seen = cv2.multiply(insect[..., 3], cv2.bitwise_not(front[..., 3]), scale=1 / 255)
    whole, seen = (cv2.resize(layer, (size, size), interpolation=cv2.INTER_AREA) for layer in (whole, seen))
    return _light(rng, whole), (seen > 127).astype(np.uint8)


def draw_split(
    split: str, n: int | None = None, seed: int = 0, size: int = SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8]]:
    """The first `n` pictures of a split: images uint8 (N, H, W, 3) RGB, labels int64 (N,), masks uint8 0/1 (N, H, W).

    Classes take turns. A picture depends only on (seed, split, its index, size).

    Raises ClearwingError for an unknown split, and for an `n`, `seed` or `size` that cannot be drawn.

        images, labels, masks = draw_split("val", n=20)
    """
    if split not in SPLITS:
        raise ClearwingError("split", split, near(split, tuple(SPLITS)))
    count = SPLITS[split] if n is None else n
    if count < 1:
        raise ClearwingError("n", count, "draw at least one picture")
    if size < 16:
        raise ClearwingError("size", size, "draw at least 16 pixels a side")
    if seed < 0:
        raise ClearwingError("seed", seed, "give a seed that is not negative")
    number = tuple(SPLITS).index(split)
    labels = np.arange(count) % len(SPECIES)

    def draw(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return draw_one(Generator(PCG64((seed, number, index))), SPECIES[labels[index]], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV lets go of the interpreter's lock
        images, masks = zip(*pool.map(draw, range(count)), strict=True)
    return np.stack(images), labels, np.stack(masks)
