"""The built-in data set: it repeats, its masks are exact, and every species can be told by its own marks."""

import cv2
import numpy as np
import pytest
from numpy.random import PCG64, Generator

from clearwing.data import synthetic
from clearwing.data.synthetic import CLASS_NAMES, SPLITS, draw_one, draw_split
from clearwing.types import ClearwingError

EXPECTED_COARSE = [
    [81, 98, 63, 70, 82, 38, 102, 114, 72, 88, 87, 49],
    [100, 89, 92, 109, 77, 56, 94, 75, 61, 86, 79, 48],
    [72, 96, 87, 73, 92, 67, 88, 104, 131, 95, 98, 119],
    [103, 87, 98, 82, 95, 115, 67, 78, 86, 83, 105, 119],
]  # 2 x 2 pixels, RGB
EXPECTED_SHARE = [0.3669, 0.2322, 0.1514, 0.3306]


def rng(*seed):
    return Generator(PCG64(seed))


def test_shapes_and_balance():
    images, labels, masks = draw_split("val", n=20, size=32)
    assert images.shape == (20, 32, 32, 3)
    assert images.dtype == np.uint8
    assert masks.shape == (20, 32, 32)
    assert set(np.unique(masks)) == {0, 1}
    assert labels.dtype == np.int64
    assert np.bincount(labels, minlength=len(CLASS_NAMES)).tolist() == [2] * 10


def test_names_and_splits():
    assert len(CLASS_NAMES) >= 8
    assert list(CLASS_NAMES) == sorted(set(CLASS_NAMES))
    assert all(count % len(CLASS_NAMES) == 0 for count in SPLITS.values())


def test_a_picture_depends_on_seed_split_and_index_alone():
    few, _, few_masks = draw_split("train", n=3, seed=4, size=32)
    many, _, many_masks = draw_split("train", n=12, seed=4, size=32)
    np.testing.assert_array_equal(few, many[:3])
    np.testing.assert_array_equal(few_masks, many_masks[:3])
    for other in (draw_split("val", n=3, seed=4, size=32), draw_split("train", n=3, seed=5, size=32)):
        assert all((a != b).mean() > 0.5 for a, b in zip(few, other[0], strict=True))


def test_same_picture_on_every_machine():
    """Coarse means, within what rounding may change."""
    images, _, masks = draw_split("train", n=4, size=64)
    coarse = np.stack([cv2.resize(image, (2, 2), interpolation=cv2.INTER_AREA) for image in images])
    expected = np.array(EXPECTED_COARSE)
    np.testing.assert_allclose(coarse.reshape(4, 12), expected, atol=2)
    np.testing.assert_allclose(masks.mean((1, 2)), EXPECTED_SHARE, atol=0.005)


def test_size_of_the_insects():
    share = draw_split("train", n=100, size=32)[2].mean((1, 2))
    assert 0.12 < np.median(share) < 0.25
    assert share.min() > 0.01
    assert share.max() < 0.5


def bare_canvas(monkeypatch):
    monkeypatch.setattr(synthetic, "_light", lambda rng, image: image[..., :3])
    monkeypatch.setattr(synthetic, "_cast_shadow", lambda rng, layer, insect, pose: layer)


@pytest.mark.parametrize("species", CLASS_NAMES)
def test_mask_is_where_the_insect_shows(monkeypatch, species):
    """Without light, noise and shadow, only the insect tells a picture from the same place without it."""
    bare_canvas(monkeypatch)
    insect = synthetic._insect
    shown, mask = draw_one(rng(1), species, 64)
    monkeypatch.setattr(synthetic, "_insect", lambda *args: np.zeros_like(insect(*args)))
    without, empty = draw_one(rng(1), species, 64)
    assert not empty.any()
    changed = np.abs(shown.astype(int) - without).max(-1) > 8
    assert changed[mask == 1].mean() > 0.9  # the rest has the colour of what is behind it
    assert (changed & (cv2.dilate(mask, np.ones((3, 3), np.uint8)) == 0)).mean() < 0.03  # antennae


def test_what_is_in_front_is_no_foreground(monkeypatch):
    bare_canvas(monkeypatch)

    def half(rng, pose, side):
        layer = np.zeros((side, side, 4), np.uint8)
        layer[:, : side // 2] = 255
        return layer

    monkeypatch.setattr(synthetic, "_front", half)
    image, mask = draw_one(rng(3), "monarch", 64)
    assert not mask[:, :32].any()
    assert mask[:, 32:].any()
    assert (image[:, :32] == 255).all()


def test_no_network_solves_it():
    """A centre Gaussian, everything, and GrabCut from a centre box all stay under 0.6."""
    images, _, masks = draw_split("train", n=40, size=64)
    truth = masks.astype(bool)
    y, x = np.mgrid[:64, :64] - 31.5
    distance = x**2 + y**2
    boxes = []
    for image in images:
        found, models = np.zeros((64, 64), np.uint8), np.zeros((2, 1, 65))
        cv2.grabCut(image, found, (11, 11, 42, 42), models[0], models[1], 5, cv2.GC_INIT_WITH_RECT)
        boxes.append(found % 2 == 1)
    for guess in (distance < np.percentile(distance, 20), np.True_, np.stack(boxes)):
        assert ((guess & truth).sum((1, 2)) / (guess | truth).sum((1, 2))).mean() < 0.6


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"split": "tset"}, "split: tset; did you mean test?"),
        ({"split": "val", "n": 0}, "n: 0; draw at least one picture"),
        ({"split": "val", "n": 2, "size": 4}, "size: 4; draw at least 16 pixels a side"),
        ({"split": "val", "n": 2, "seed": -1}, "seed: -1; give a seed that is not negative"),
    ],
)
def test_wrong_calls(arguments, line):
    with pytest.raises(ClearwingError) as caught:
        draw_split(**arguments)
    assert str(caught.value) == line


def test_unknown_species():
    with pytest.raises(ClearwingError, match="species: monach; did you mean monarch"):
        draw_one(rng(0), "monach", 32)


def test_odd_size():
    image, mask = draw_one(rng(0), "monarch", 33)
    assert image.shape == (33, 33, 3)
    assert mask.shape == (33, 33)
