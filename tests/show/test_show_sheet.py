"""An Explanation as a picture: what is drawn of it, what is said of it, and that it shows itself."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import clearwing as cw
from clearwing.show import draw, sheet
from clearwing.types import ClearwingError, Explanation, Status


def explanation(n=2, m=1, size=(24, 20), channels=3, **changes):
    generator = torch.Generator().manual_seed(0)
    made = Explanation(
        maps=torch.rand(n, m, *size, generator=generator),
        classes=torch.arange(m).expand(n, m),
        logits=torch.zeros(n, 4),
        method="grad-cam",
        layer="layer3",
        status=torch.zeros(n, m, dtype=torch.uint8),
        keys=tuple(f"val/ant/{i}.png" for i in range(n)),
        class_names=("ant", "bee", "cat", "dog"),
        images=torch.rand(n, channels, *size, generator=generator),
    )
    return replace(made, **changes)


@pytest.fixture
def drawn(monkeypatch):
    """What is set on the sheet: (picture, caption) of every tile, and the words around."""
    seen = {"tiles": [], "words": ()}
    montage, framed = sheet.montage, sheet._framed

    def watched(tiles, captions, columns, **settings):
        seen["tiles"], seen["columns"] = list(zip(tiles, captions, strict=True)), columns
        return montage(tiles, captions, columns, **settings)

    def around(page, *words):
        seen["words"] = words
        return framed(page, *words)

    monkeypatch.setattr(sheet, "montage", watched)
    monkeypatch.setattr(sheet, "_framed", around)
    return seen


def captions(drawn):
    return [caption for _, caption in drawn["tiles"]]


def test_a_row_holds_the_picture_and_the_overlay_of_each_class(drawn):
    e = explanation(m=3)
    page = cw.draw_explanation(e)
    assert page.dtype == np.uint8
    assert page.ndim == 3
    assert page.shape[2] == 3
    assert drawn["columns"] == 4
    assert captions(drawn)[:4] == ["0.png", "ant, 25%", "bee, 25%", "cat, 25%"]
    pictures = [tile for tile, _ in drawn["tiles"]]
    assert np.array_equal(pictures[0], draw.to_rgb(e.images[0]))
    assert np.array_equal(pictures[6], draw.overlay(e.images[1], e.maps[1, 1]))
    assert drawn["words"] == ("grad-cam at layer3", "each map scaled by itself", "")


def test_without_pictures_the_maps_stand_alone(drawn):
    e = explanation(images=None, keys=(), class_names=(), layer=None, method="saliency")
    cw.draw_explanation(e)
    assert captions(drawn) == ["class 0, 25%"] * 2
    assert np.array_equal(drawn["tiles"][1][0], draw.heatmap(e.maps[1, 0]))
    assert drawn["words"][0] == "saliency"


def test_signed_maps_are_red_and_blue_all_of_them(drawn):
    e = explanation(m=2)
    e.maps[0, 0] *= -1  # the only one with values below zero
    cw.draw_explanation(e)
    for i, m, at in ((0, 0, 1), (0, 1, 2), (1, 1, 5)):
        assert np.array_equal(drawn["tiles"][at][0], draw.overlay(e.images[i], e.maps[i, m], signed=True))
    assert "blue against" in drawn["words"][1]


def test_captions_name_the_contrast_the_function_and_what_holds_no_evidence(drawn):
    codes = torch.tensor([[Status.OK], [Status.ZERO], [Status.CONSTANT], [Status.NONFINITE]])
    e = explanation(n=4, status=codes.byte(), against=torch.full((4, 1), 3))
    e.maps[3] = float("nan")
    cw.draw_explanation(e)
    said = [caption for caption in captions(drawn) if "ant" in caption]
    assert said[0] == "ant, 25%\nvs dog, 25%"
    assert [caption.split("\n")[2] for caption in said[1:]] == [sheet._STATUS[code] for code in list(Status)[1:]]
    cw.draw_explanation(explanation(classes=torch.full((2, 1), -1)))
    assert captions(drawn)[1] == "function of the logits"


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_pictures_of_any_channels_and_values_are_seen(drawn, channels):
    e = explanation(channels=channels)
    cw.draw_explanation(e)
    inside = drawn["tiles"][0][0]
    assert np.array_equal(inside, draw.to_rgb(e.images[0].mean(0, keepdim=True)))
    cw.draw_explanation(replace(e, images=(e.images - 0.45) / 0.225))
    outside = drawn["tiles"][0][0]
    assert outside.min() == 0
    assert outside.max() == 255
    assert np.corrcoef(inside.flatten(), outside.flatten())[0, 1] > 0.99


def test_more_pictures_than_most_are_counted(drawn):
    cw.draw_explanation(explanation(n=5), most=2)
    assert captions(drawn) == ["0.png", "ant, 25%", "1.png", "ant, 25%"]
    assert drawn["words"][2] == "3 of 5 pictures are not shown"


def test_a_dictionary_is_drawn_method_by_method(drawn):
    e = explanation()
    cw.draw_explanation({"grad-cam@layer3": e, "saliency": replace(e, method="saliency", images=None)})
    assert captions(drawn)[:3] == ["0.png", "grad-cam\nat layer3\nant, 25%", "saliency\nant, 25%"]
    assert drawn["words"][0] == "2 explanations"


@pytest.mark.parametrize(("n", "m", "size"), [(1, 1, (1, 1)), (1, 20, (24, 20)), (8, 1, (30, 300)), (3, 2, (300, 20))])
def test_the_sheet_fits_a_notebook(drawn, n, m, size):
    e = explanation(n=n, m=m, size=size, classes=torch.zeros(n, m, dtype=torch.int64))
    page = cw.draw_explanation(e)
    assert page.shape[1] <= sheet.WIDTH
    assert captions(drawn).count("ant, 25%") == n * m
    assert (page < 128).any()


def test_it_shows_itself_in_a_notebook():
    e = explanation()
    with Image.open(io.BytesIO(e._repr_png_())) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), cw.draw_explanation(e))


@pytest.mark.parametrize(
    ("given", "most", "line"),
    [
        ({}, 8, "explanation: {}; give at least one"),
        ("grad-cam", 8, "explanation: str; give an Explanation, or a dict"),
        ({"a": 1}, 8, "explanation: int; give an Explanation, or a dict"),
        (explanation(), 0, "most: 0; give how many"),
        ({"a": explanation(1), "b": explanation(2)}, 8, "explanation: 1 pictures of 24 x 20 and 2 pictures of 24 x 20"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given, most, line):
    with pytest.raises(ClearwingError) as caught:
        cw.draw_explanation(given, most)
    assert str(caught.value).startswith(line)
