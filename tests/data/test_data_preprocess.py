"""Reading pictures right, fitting them, and the way back."""

import io
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from clearwing.data.preprocess import QuietPillow, fit_geometry, fit_picture, read_mask, read_picture, restore
from clearwing.types import ClearwingError, Geometry


def encoded(image, kind="PNG", **options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def scene(height=24, width=36):
    rows, columns = np.mgrid[:height, :width]
    colour = np.stack([rows * 255 // (height - 1), columns * 255 // (width - 1), 128 + 0 * rows], 2)
    return colour.astype(np.uint8)


def test_plain_pictures_are_read_to_the_bit_and_from_every_kind_of_source(tmp_path):
    array = scene()
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(array)))
    wanted = torch.from_numpy(array).permute(2, 0, 1)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), array):
        assert torch.equal(read_picture(source), wanted)


def test_jpeg_is_read_as_pillow_reads_it():
    data = encoded(Image.fromarray(scene()), "JPEG", quality=95)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(read_picture(data).permute(1, 2, 0).numpy(), wanted)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(orientation, kind):
    from PIL import ImageOps

    image = Image.fromarray(scene())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(read_picture(data).permute(1, 2, 0).numpy(), wanted)
    assert read_picture(data).shape[1:] == ((36, 24) if orientation >= 5 else (24, 36))


def test_grey_becomes_three_channels_and_colour_becomes_luma():
    grey = scene()[:, :, 0]
    assert torch.equal(read_picture(encoded(Image.fromarray(grey))), torch.from_numpy(grey).expand(3, -1, -1))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    assert np.array_equal(read_picture(encoded(image), channels=1)[0].numpy(), np.asarray(image.convert("L")))
    assert read_picture(encoded(image.convert("1")), channels=1).unique().tolist() == [0, 255]


def test_transparency_is_laid_over_white():
    array = np.zeros((1, 3, 4), np.uint8)
    array[0, :, 0] = 200
    array[0, :, 3] = 0, 255, 128
    for source in (encoded(Image.fromarray(array)), array):
        picture = read_picture(source)
        assert picture[:, 0, 0].tolist() == [255, 255, 255]
        assert picture[:, 0, 1].tolist() == [200, 0, 0]
        assert picture[1, 0, 2].item() == pytest.approx(127, abs=1)
    grey = Image.new("LA", (2, 1), (10, 0))
    assert read_picture(encoded(grey)).unique().tolist() == [255]


def test_palette_with_and_without_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert read_picture(encoded(image))[:, 0].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    clear = read_picture(encoded(image, transparency=bytes([0, 255, 255])))
    assert clear[:, 0].T.tolist() == [[255, 255, 255], [0, 255, 0], [0, 0, 255]]
    assert read_picture(encoded(image, "GIF"))[:, 0, 2].tolist() == [0, 0, 255]


def test_cmyk_is_read_as_colour_and_not_inverted():
    image = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    red, green, blue = read_picture(encoded(image, "JPEG", quality=95)).float().mean((1, 2)).tolist()
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    wide = np.array([[0, 257, 32896, 65535, 129, 128]], np.uint16)
    picture = read_picture(encoded(Image.fromarray(wide), kind), channels=1)
    assert picture[0, 0].tolist() == [0, 1, 128, 255, 1, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_picture_is_one_clear_line(tmp_path, kind):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for broken in (data[: len(data) // 2], b"", b"not a picture", data[:20]):
        (tmp_path / "b.jpg").write_bytes(broken)
        with pytest.raises(ClearwingError, match=r"picture: .*b\.jpg; cannot be read \(.+\)") as caught:
            read_picture(tmp_path / "b.jpg")
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # no address in memory: the same file gives the same line
    with pytest.raises(ClearwingError, match="cannot be read"):
        read_picture(tmp_path / "missing.jpg")


def test_float_and_32_bit_pictures_are_refused_with_the_mend():
    for image in (Image.new("F", (2, 2), 0.5), Image.fromarray(np.full((2, 2), 70_000, np.int32))):
        with pytest.raises(ClearwingError, match="save it with 8 or 16"):
            read_picture(encoded(image, "TIFF"))


def test_a_decompression_bomb_is_refused(monkeypatch):
    data = encoded(Image.new("L", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # 4096 pixels: Pillow warns, and the picture is read in peace
    assert read_picture(data).shape == (3, 64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # past twice the limit: Pillow refuses
    with pytest.raises(ClearwingError, match="exceeds limit"):
        read_picture(data)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2, 3)), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8), np.zeros(4, np.uint8)],
)
def test_arrays_that_are_no_pictures_are_refused(array):
    with pytest.raises(ClearwingError, match=r"picture: .*array of shape"):
        read_picture(array)


def test_channels_are_one_or_three():
    with pytest.raises(ClearwingError, match="channels: 4; choose 1"):
        read_picture(scene(), channels=4)


def test_warning_filters_are_as_before_when_threads_overlap():
    before = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with QuietPillow():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=hold)
    with QuietPillow():
        thread.start()
        assert inside.wait(5)
    assert warnings.filters != before  # the other thread still holds it
    leave.set()
    thread.join()
    assert warnings.filters == before


def test_masks_are_cut_at_127_and_codes_are_kept():
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert read_mask(encoded(grey)).tolist() == [[0, 0, 1, 1]]
    assert read_mask(encoded(Image.fromarray(np.array([[0, 1]], np.uint8)))).tolist() == [[0, 1]]
    assert read_mask(encoded(Image.fromarray(np.array([[0, 0]], np.uint8)))).tolist() == [[0, 0]]
    assert read_mask(np.array([[0, 1, 255]], np.uint8)).tolist() == [[0, 1, 255]]
    assert read_mask(np.array([[0, 255]], np.uint8)).tolist() == [[0, 1]]
    assert read_mask(np.array([[True, False]])).tolist() == [[1, 0]]
    assert read_mask(encoded(grey)).dtype == torch.uint8
    with pytest.raises(ClearwingError, match="mask"):
        read_mask(np.zeros((2, 2, 3), np.uint8))


def test_what_is_transparent_in_a_mask_is_background():
    array = np.zeros((1, 3, 4), np.uint8)
    array[0, 1], array[0, 2, :3] = 255, 255  # a white object, and white that cannot be seen
    assert read_mask(encoded(Image.fromarray(array))).tolist() == [[0, 1, 0]]
    assert read_picture(encoded(Image.fromarray(array)), channels=1).tolist() == [[[255, 255, 255]]]


def test_a_palette_mask_is_foreground_where_its_index_is_not_zero():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # black, dark red, dark green, as in PASCAL VOC
    assert read_mask(encoded(image)).tolist() == [[0, 1, 1]]
    image.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9])  # white stands first: no class numbers
    assert read_mask(encoded(image)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("fit", "size", "box"),
    [
        ("squash", 8, (0, 0, 24, 36)),
        ("crop", 8, (0, 6, 24, 24)),
        ("pad", 8, (-6, 0, 36, 36)),
        ("crop", (10, 40), (7, 0, 9, 36)),
        ("pad", (10, 40), (0, -30, 24, 96)),
        ("crop", (8, 12), (0, 0, 24, 36)),
        ("pad", (8, 12), (0, 0, 24, 36)),
    ],
)
def test_the_box_of_each_fit(fit, size, box):
    place = fit_geometry(24, 36, size, fit)
    assert (place.top, place.left, place.box_height, place.box_width) == box


def test_fit_is_an_antialiased_resize_of_the_box():
    picture = torch.from_numpy(scene(48, 72)).permute(2, 0, 1)
    fitted, place = fit_picture(picture, 12, "crop")
    wanted = TF.resized_crop(
        picture, place.top, place.left, place.box_height, place.box_width, [12, 12], antialias=True
    )
    assert torch.equal(fitted, wanted)
    assert torch.equal(fit_picture(picture, (48, 72), "squash")[0], picture)


def test_padding_is_filled_with_the_mean_colour():
    picture = torch.full((3, 10, 40), 90, dtype=torch.uint8)
    picture[:, :, 20:] = 110
    for picture_, side in ((picture, 1), (picture.transpose(1, 2), 2)):
        fitted, place = fit_picture(picture_, 20, "pad")
        assert fitted.shape == (3, 20, 20)
        assert fitted.select(side, 0).unique().tolist() == [100]
        assert fitted.select(side, 10).unique().numel() > 1
        assert min(place.top, place.left) == -15


def test_a_very_long_picture_is_padded_without_a_square_of_its_length():
    fitted, place = fit_picture(torch.zeros(3, 2, 200_000, dtype=torch.uint8), 8, "pad")  # the square has 4e10 pixels
    assert fitted.shape == (3, 8, 8)
    assert restore(torch.ones(1, 8, 8), [place])[0].shape == (2, 200_000)


def test_wrong_fit_and_size_are_named():
    with pytest.raises(ClearwingError, match="fit: stretch; choose one of squash, crop, pad"):
        fit_geometry(4, 4, 8, "stretch")
    with pytest.raises(ClearwingError, match="size: 0; give at least 1"):
        fit_geometry(4, 4, 0, "crop")


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (20, 30)])
def test_a_mask_survives_the_way_to_the_network_and_back(fit, flip, shape):
    mask = torch.zeros(shape, dtype=torch.uint8)
    mask[shape[0] // 3 : shape[0] * 2 // 3, shape[1] // 3 : shape[1] * 3 // 5] = 1
    fitted, place = fit_picture(mask[None] * 255, 40, fit)
    small = (fitted > 127).to(torch.uint8)
    if flip:
        small = small.flip(-1)
        place = Geometry(**{**place.__dict__, "flip": True})
    back = restore(small, [place])[0]
    assert back.shape == shape
    assert back.dtype == torch.uint8
    both, either = (back & mask).sum().item(), (back | mask).sum().item()
    assert both / either > 0.8


def test_a_map_keeps_its_place_and_is_zero_outside_the_crop():
    place = fit_geometry(30, 60, 30, "crop")  # columns 15 to 44
    values = torch.arange(900, dtype=torch.float64).reshape(1, 30, 30) + 1
    back = restore(values, [place])[0]
    assert back.dtype == torch.float64
    assert torch.equal(back[:, 15:45], values[0])
    assert back[:, :15].abs().max() == 0
    assert back[:, 45:].abs().max() == 0
    several = restore(values.expand(1, 2, 30, 30), [place])[0]
    assert several.shape == (2, 30, 60)
    assert torch.equal(several[1], back)


def test_a_smooth_map_returns_from_pad_as_interpolate_would_bring_it():
    place = fit_geometry(20, 40, 10, "pad")
    values = torch.rand(1, 10, 10, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(values[None], (40, 40), mode="bilinear", antialias=True)[0, 0, 10:30]
    torch.testing.assert_close(restore(values, [place])[0], wanted)


def test_ignore_and_bool_masks_come_back_as_they_are():
    place = fit_geometry(8, 8, 4, "squash")
    mask = torch.tensor([[0, 1, 255, 255]] * 4, dtype=torch.uint8)[None]
    assert restore(mask, [place])[0][0].tolist() == [0, 0, 1, 1, 255, 255, 255, 255]
    back = restore(mask == 1, [place])[0]
    assert back.dtype == torch.bool
    assert back[0].tolist() == [False, False, True, True, False, False, False, False]


def test_restore_names_what_does_not_fit():
    place = fit_geometry(8, 8, 4, "squash")
    with pytest.raises(ClearwingError, match="geometry: 1 entries; give one for each of 2"):
        restore(torch.zeros(2, 4, 4), [place])
    with pytest.raises(ClearwingError, match=r"values: \(5, 4\); the geometry says"):
        restore(torch.zeros(1, 5, 4), [place])
