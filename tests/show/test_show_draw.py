"""Pictures for the eye: what is blank stays blank, the caller's values stay raw, and files are whole."""

import numpy as np
import pytest
import torch
from PIL import Image

from clearwing.show import draw
from clearwing.types import ClearwingError


@pytest.fixture
def images():
    return torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def maps():
    return torch.rand(2, 24, 20, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("value", [0.0, 0.37, -2.0, float("nan"), float("inf")])
def test_a_map_without_evidence_stays_blank(value, images):
    flat = torch.full((2, 24, 20), value)
    assert not draw.normalise(flat).any()
    assert len(np.unique(draw.heatmap(flat).reshape(-1, 3), axis=0)) == 1
    faint = draw.overlay(images, flat)
    assert np.array_equal(faint, draw.overlay(images, torch.zeros(2, 24, 20)))


def test_normalise_is_for_the_eye_only(maps):
    before = maps.clone()
    scaled = draw.normalise(maps)
    assert torch.equal(maps, before)
    assert scaled.min() >= 0
    assert scaled.max() == 1
    assert np.allclose(draw.normalise(maps * 1e-9), scaled, atol=1e-5)  # the scale does not matter
    order = maps[0].flatten().argsort()
    assert (np.diff(scaled[0].flatten()[order]) >= 0).all()


def test_a_batch_is_scaled_map_by_map(maps):
    maps[1] *= 1000
    assert np.array_equal(draw.normalise(maps)[0], draw.normalise(maps[0]))


def test_one_pixel_of_evidence_is_seen():
    spike = torch.zeros(100, 100)
    spike[3, 4] = 0.2
    assert draw.normalise(spike)[3, 4] == 1
    assert draw.normalise(spike).sum() == 1


def test_signed_maps_are_symmetric_about_zero(maps):
    signed = maps - 0.5
    assert np.allclose(draw.normalise(signed), -draw.normalise(-signed))
    assert draw.normalise(torch.tensor([[-1.0, 0.0, 0.5]]), clip=100).tolist() == [[-1.0, 0.0, 0.5]]
    red, _, blue = draw.heatmap(torch.tensor([[-1.0, 1.0]]), signed=True)[0, 1]
    assert red > blue


def test_rounding_below_zero_is_no_sign():
    assert draw.normalise(torch.tensor([[-1e-9, 1.0]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("function", [draw.overlay, draw.edges])
def test_overlay_and_edges_keep_shape_and_type(function, images, maps):
    batch = function(images, maps)
    assert batch.shape == (2, 24, 20, 3)
    assert batch.dtype == np.uint8
    assert np.array_equal(function(images[0], maps[0]), batch[0])
    assert np.array_equal(function((images * 255).round().byte(), maps), batch)
    assert function(images[:, :1], maps).shape == (2, 24, 20, 3)  # grey


def test_overlay_shows_the_picture_where_there_is_no_evidence(images):
    half = torch.zeros(2, 24, 20)
    half[:, :, 10:] = torch.linspace(0.5, 1, 24)[:, None]
    drawn = draw.overlay(images, half).astype(int)
    other = draw.overlay(images.flip(0), half).astype(int)
    assert np.abs(drawn - other)[:, :, :10].mean() > 2 * np.abs(drawn - other)[:, :, 10:].mean()
    assert np.array_equal(draw.overlay(images, half, alpha=0)[0, 0], draw.overlay(images, half * 0)[0, 0])


def test_edges_draws_lines_where_the_picture_has_them():
    image = torch.zeros(3, 32, 32)
    image[:, 8:24, 8:24] = 1
    drawn = draw.edges(image, torch.zeros(32, 32))
    assert drawn[6:10, 12:20].max() > 100
    assert drawn[14:18, 14:18].max() < 10


def drawn_in(picture, colour):
    """Is there a pixel of this colour?"""
    return bool((picture == colour).all(-1).any())


def test_outline_draws_mask_and_truth_and_leaves_the_inside():
    picture = torch.full((1, 3, 64, 64), 0.5)
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 10:40, 10:40] = 1
    truth = torch.zeros_like(mask)
    truth[:, 24:60, 24:60] = 1
    both, alone = draw.outline(picture, mask, truth), draw.outline(picture, mask.bool())
    assert drawn_in(both, draw.PREDICTION)
    assert drawn_in(both, draw.TRUTH)
    assert drawn_in(alone, draw.PREDICTION)
    assert not drawn_in(alone, draw.TRUTH)
    assert (alone[0, 20:30, 20:30] == 128).all()
    assert (draw.outline(picture, torch.full_like(mask, 255)) == 128).all()  # ignored pixels are no foreground
    assert np.array_equal(draw.outline(picture[0], mask[0], truth[0]), both[0])


def test_montage_has_the_size_of_its_grid():
    tiles = [np.full((40, 60, 3), 90, np.uint8)] * 5
    plain = draw.montage(tiles, columns=3, size=100)
    assert plain.shape == (8 + 2 * 108, 8 + 3 * 108, 3)
    captioned = draw.montage(tiles, ["a name far too long for its place in the sheet\nb"] * 5, columns=3, size=100)
    assert captioned.shape[0] > plain.shape[0]
    assert captioned.shape[1] == plain.shape[1]
    assert draw.montage(tiles[:1], columns=4, size=100).shape == (116, 116, 3)
    assert draw.montage(tiles, columns=3, size=(50, 100)).shape == (8 + 2 * 58, 8 + 3 * 108, 3)
    assert draw.montage(np.stack(tiles)).dtype == np.uint8
    assert (captioned[-20:] < 128).any()  # the caption is inked


def test_fit_keeps_the_ratio_and_whole_blocks():
    wide = np.zeros((50, 100, 3), np.uint8)
    assert draw.fit(wide, 40).shape == (20, 40, 3)
    assert draw.fit(wide, 400) is wide
    tiny = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert np.array_equal(draw.fit(tiny, 32, enlarge=True), tiny.repeat(4, 0).repeat(4, 1))


def test_save_png_comes_back_as_it_was(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    path = draw.save_png(picture, tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]  # no temporary file stays


def test_curves_confusion_and_bars_are_written(tmp_path):
    rows = [{"epoch": e, "train_loss": 1 / e, "val_loss": None, "val_accuracy": 1 - 1 / e} for e in (1, 2, 3)]
    rows[-1]["test_accuracy"] = 0.5
    names = ["cost $5$", "a_b", "Ünlü"]
    paths = [
        draw.curves(rows, tmp_path / "curves.png"),
        draw.confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 7]]), names, tmp_path / "confusion.png"),
        draw.bars(names, [0.2, 0.9, 0.5], tmp_path / "bars.png", low=[0.1, 0.8, 0.4], high=[0.3, 1.0, 0.6]),
    ]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 150
    assert "<svg" in draw.curves(rows, tmp_path / "curves.svg").read_text()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_confusion_matrix_of_many_classes_is_still_a_picture(tmp_path):
    path = draw.confusion(np.eye(40, dtype=int), [f"class {i}" for i in range(40)], tmp_path / "c.png")
    with Image.open(path) as picture:
        assert max(picture.size) < 4000


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: draw.overlay(torch.rand(1, 3, 8, 8), torch.rand(1, 4, 4)), "maps: shape (1, 4, 4); give (1, 8, 8)"),
        (lambda: draw.outline(torch.rand(3, 8, 8), torch.ones(4, 4)), "masks: shape (4, 4); give (8, 8)"),
        (lambda: draw.overlay(torch.rand(3, 8, 8), torch.ones(8, 8), alpha=2), "alpha: 2; give an opacity"),
        (lambda: draw.to_rgb(torch.rand(5, 8, 8)), "images: shape (5, 8, 8); give (N, C, H, W)"),
        (lambda: draw.to_rgb(np.zeros((3, 8, 8))), "images: array (3, 8, 8) float64; give uint8"),
        (lambda: draw.heatmap(torch.rand(8)), "maps: shape (8,); give (H, W)"),
        (lambda: draw.montage([]), "tiles: []; give at least one"),
        (lambda: draw.montage([np.zeros((8, 8, 3), np.uint8)], ["a", "b"]), "captions: 2 for 1 pictures"),
        (lambda: draw.montage([np.zeros((8, 8, 3), np.uint8)], columns=0), "columns: 0; give 1 or more"),
        (lambda: draw.save_png(np.zeros((8, 8)), "a.png"), "picture: array (8, 8) float64; give uint8"),
        (lambda: draw.curves([], "a.png"), "metrics: 0 rows; give rows"),
        (lambda: draw.curves([{"epoch": 1, "val_loss": 1.0}], "a.pdf"), "path: a.pdf; give a file that ends"),
        (lambda: draw.confusion([[1]], ["a", "b"], "a.png"), "matrix: shape (1, 1); give (2, 2)"),
        (lambda: draw.bars(["a"], [], "a.png"), "values: 0 for 1 names"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, line):
    with pytest.raises(ClearwingError) as caught:
        call()
    assert str(caught.value).startswith(line)
