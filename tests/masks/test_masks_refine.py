"""Blur and dilation against SciPy, seeds, GrabCut at one size and two and its fallback, the clean-up."""

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from clearwing.masks import refine
from clearwing.masks.refine import blur, clean, dilate, grabcut, likely_seeds, seeds
from clearwing.masks.threshold import percentile
from clearwing.types import ClearwingError


def scene(n=3, size=48, channels=3, seed=0):
    """Discs of one colour on a ground of another, both noisy: images (N, C, H, W) and their truth bool (N, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images, truth = [], []
    for i in range(n):
        disc = (y - size // 2 - i) ** 2 + (x - size // 2 + 2 * i) ** 2 < (size // 4) ** 2
        colours = torch.tensor([[0.8, 0.3, 0.2], [0.2, 0.5, 0.3]])[:, :channels]
        picture = torch.where(disc, colours[0][:, None, None], colours[1][:, None, None])
        images.append((picture + 0.05 * torch.randn(channels, size, size, generator=generator)).clamp(0, 1))
        truth.append(disc)
    return torch.stack(images), torch.stack(truth)


def rough(truth, sigma=4.0):
    """A map like a CAM's: the truth blurred and shifted by three pixels."""
    return blur(truth.roll((3, -3), (1, 2)).float(), sigma)


def overlap(masks, truth):
    return ((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))).tolist()


def test_dilate_is_scipys():
    masks = torch.rand(3, 20, 15, generator=torch.Generator().manual_seed(0)) > 0.95
    expected = np.stack([ndimage.binary_dilation(m, np.ones((5, 5))) for m in masks.numpy()])
    assert (dilate(masks, 5).numpy() == expected).all()
    assert torch.equal(dilate(masks, 1), masks)
    with pytest.raises(ClearwingError, match="size: 4; give an odd number"):
        dilate(masks, 4)


@pytest.mark.parametrize("sigma", [0.8, 2.5, 12.0])  # the last reaches over both borders
def test_blur_is_scipys(sigma):
    maps = torch.randn(3, 20, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.stack([ndimage.gaussian_filter(m, sigma, mode="nearest") for m in maps.numpy()])
    np.testing.assert_allclose(blur(maps, sigma).numpy(), expected, atol=1e-12)
    assert torch.equal(blur(maps, 0), maps)


def test_seeds_follow_the_ranks():
    maps = torch.arange(100.0).view(1, 10, 10)
    codes = seeds(maps, percentile(maps, 80), sure_foreground=0.95, sure_background=0.3)
    assert codes.dtype == torch.uint8
    counts = torch.bincount(codes.flatten().long(), minlength=4).tolist()
    assert counts[refine.SURE_FOREGROUND] == 5
    assert counts[refine.PROBABLE_FOREGROUND] == 15
    assert counts[refine.SURE_BACKGROUND] == 30
    assert counts[refine.PROBABLE_BACKGROUND] == 50
    grown = seeds(7 * maps - 3, percentile(maps, 80), sure_foreground=0.95, sure_background=0.3)
    assert torch.equal(grown, codes)


def test_ties_are_never_sure():
    maps = torch.zeros(1, 10, 10)
    maps[0, :2] = 1.0
    codes = seeds(maps, maps > 0, sure_foreground=0.9, sure_background=0.5)
    assert set(codes.unique().tolist()) == {refine.PROBABLE_BACKGROUND, refine.PROBABLE_FOREGROUND}


def test_likely_seeds_follow_the_probability():
    probability = torch.tensor([[[0.0, 0.19, 0.2, 0.5], [0.51, 0.99, 0.995, 1.0]]])
    codes = likely_seeds(probability)
    background, foreground = refine.PROBABLE_BACKGROUND, refine.PROBABLE_FOREGROUND
    assert codes.dtype == torch.uint8
    assert codes[0, 0].tolist() == [refine.SURE_BACKGROUND] * 2 + [background] * 2
    assert codes[0, 1].tolist() == [foreground] * 2 + [refine.SURE_FOREGROUND] * 2
    assert not (likely_seeds(probability, sure_foreground=1.0, sure_background=0.0) % 2 != codes % 2).any()
    doubtful = likely_seeds(probability, sure_foreground=1.0, sure_background=0.0)
    assert set(doubtful.unique().tolist()) == {background, foreground}
    with pytest.raises(ClearwingError, match=r"seeds: sure_foreground=0\.4, sure_background=0\.2; give the"):
        likely_seeds(probability, sure_foreground=0.4)


def test_grabcut_mends_a_shifted_map():
    images, truth = scene()
    maps = rough(truth)
    region = percentile(maps, 80)
    masks, fell_back = grabcut(images, seeds(maps, region, sure_foreground=0.95, sure_background=0.4))
    assert masks.dtype == torch.bool
    assert fell_back.tolist() == [False] * 3
    assert max(overlap(region, truth)) < 0.85
    assert min(overlap(masks, truth)) > 0.95


def test_grabcut_of_grey_pictures_is_that_of_three_equal_channels():
    images, truth = scene(channels=1)
    codes = seeds(rough(truth), truth, sure_foreground=0.95, sure_background=0.4)
    masks, _ = grabcut(images, codes)
    assert torch.equal(masks, grabcut(images.repeat(1, 3, 1, 1), codes)[0])
    assert min(overlap(masks, truth)) > 0.9


def test_a_batch_equals_one_by_one_in_any_order_and_number_of_threads():
    images = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))  # noise: the starts matter
    maps = blur(torch.rand(5, 24, 24, generator=torch.Generator().manual_seed(2)), 3)
    codes = seeds(maps, percentile(maps, 70), sure_foreground=0.95, sure_background=0.2)
    whole, _ = grabcut(images, codes, workers=3)
    alone = torch.cat([grabcut(images[i : i + 1], codes[i : i + 1], workers=1)[0] for i in range(5)])
    assert torch.equal(whole, alone)
    assert torch.equal(grabcut(images.flip(0), codes.flip(0))[0].flip(0), whole)


# Pictures that are finer than the codes.


def uint8(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def test_a_small_picture_gets_opencvs_own_cut():
    images, truth = scene()
    codes = seeds(rough(truth), truth, sure_foreground=0.95, sure_background=0.4)
    masks, _ = grabcut(images, codes, iterations=2)
    for i, picture in enumerate(uint8(images)):
        expected, background, foreground = codes[i].numpy().copy(), np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)
        cv2.grabCut(picture, expected, None, background, foreground, 2, cv2.GC_INIT_WITH_MASK)
        assert (masks[i].numpy() == (expected & 1).astype(bool)).all()


def test_the_colours_of_a_large_picture_are_guessed_on_a_small_copy_and_fitted_to_all_pixels():
    images, truth = scene(size=96)
    codes = seeds(rough(truth), truth, sure_foreground=0.95, sure_background=0.4)
    masks, fell_back = grabcut(images, codes, colours=24)
    assert not fell_back.any()
    assert min(overlap(masks, truth)) > 0.97
    for i, picture in enumerate(uint8(images)):
        small = cv2.resize(picture, (24, 24), interpolation=cv2.INTER_AREA)
        guess = cv2.resize(codes[i].numpy(), (24, 24), interpolation=cv2.INTER_NEAREST)
        expected, models = codes[i].numpy().copy(), (np.zeros((1, 65)), np.zeros((1, 65)))
        cv2.setRNGSeed(0)
        cv2.grabCut(small, guess, None, *models, 0, cv2.GC_INIT_WITH_MASK)
        cv2.grabCut(picture, expected, None, *models, 1, cv2.GC_EVAL)
        assert (masks[i].numpy() == (expected & 1).astype(bool)).all()


def test_seeds_that_the_small_copy_loses_are_guessed_from_on_the_picture_itself():
    images, truth = scene(n=1, size=96)
    codes = torch.full(truth.shape, refine.SURE_BACKGROUND, dtype=torch.uint8)
    codes[truth] = refine.PROBABLE_BACKGROUND
    codes[0, 40:52, 40:52] = refine.PROBABLE_FOREGROUND  # 144 pixels: four at a sixth of the size, which is too few
    masks, fell_back = grabcut(images, codes, colours=16)
    assert not fell_back.any()
    assert torch.equal(masks, grabcut(images, codes, colours=96)[0])


def test_a_batch_of_large_pictures_equals_one_by_one():
    images = torch.rand(5, 3, 53, 70, generator=torch.Generator().manual_seed(1))
    maps = blur(torch.rand(5, 53, 70, generator=torch.Generator().manual_seed(2)), 3)
    codes = seeds(maps, percentile(maps, 70), sure_foreground=0.95, sure_background=0.2)
    whole, fell_back = grabcut(images, codes, colours=20, workers=3)
    assert not fell_back.any()
    alone = torch.cat([grabcut(images[i : i + 1], codes[i : i + 1], colours=20, workers=1)[0] for i in range(5)])
    assert torch.equal(whole, alone)
    assert torch.equal(grabcut(images.flip(0), codes.flip(0), colours=20)[0].flip(0), whole)


def test_the_arguments_stay_as_they_were():
    images, truth = scene(n=1)
    codes = seeds(rough(truth), truth, sure_foreground=0.95, sure_background=0.4)
    before = codes.clone()
    grabcut(images, codes)
    assert torch.equal(codes, before)


def test_too_few_seeds_fall_back_to_them():
    images, truth = scene(n=3)
    codes = torch.full(truth.shape, refine.PROBABLE_BACKGROUND, dtype=torch.uint8)
    codes[0, 5, 5:8] = refine.PROBABLE_FOREGROUND  # three pixels
    codes[1] = refine.SURE_FOREGROUND  # nothing left for the background
    codes[2][truth[2]] = refine.PROBABLE_FOREGROUND
    masks, fell_back = grabcut(images, codes)
    assert fell_back.tolist() == [True, True, False]
    assert torch.equal(masks[:2], (codes[:2] & 1).bool())


def test_an_empty_or_whole_result_falls_back():
    images = torch.full((1, 3, 16, 16), 0.4)  # one colour: nothing to cut along
    codes = torch.full((1, 16, 16), refine.PROBABLE_BACKGROUND, dtype=torch.uint8)
    codes[0, 4:9, 4:9] = refine.PROBABLE_FOREGROUND
    masks, fell_back = grabcut(images, codes)
    assert fell_back.tolist() == [True]
    assert torch.equal(masks, (codes & 1).bool())

    images, truth = scene(n=1)
    codes = seeds(rough(truth), truth, sure_foreground=0.95, sure_background=0.4)
    assert grabcut(images, codes, most=0.1)[1].tolist() == [True]


def test_clean_drops_what_the_map_does_not_support_and_fills_holes():
    masks = torch.zeros(2, 12, 12, dtype=torch.bool)
    masks[0, 2:7, 2:7] = True
    masks[0, 4, 4] = False  # a hole
    masks[0, 9:11, 9:11] = True  # a piece with little mass
    masks[1, :3, :3] = True
    masks[1, 0, 0] = False  # a bay at the border, not a hole
    maps = torch.full((2, 12, 12), 0.01)
    maps[0, 2:7, 2:7] = 1.0
    cleaned = clean(masks, maps, share=0.5)
    expected = masks.clone()
    expected[0, 4, 4], expected[0, 9:11, 9:11] = True, False
    assert torch.equal(cleaned, expected)
    assert torch.equal(clean(masks, maps, share=0, fill=False), masks)


def test_clean_keeps_everything_where_the_map_supports_nothing():
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 5, 5] = True
    assert torch.equal(clean(masks, -torch.ones(1, 8, 8), share=1.0), masks)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 8, 9), r"images: \(1, 3, 8, 9\); give as many and as large as the maps, \(1, 8, 8\)"),
        (torch.rand(2, 3, 8, 8), "give as many and as large as the maps"),
        (torch.rand(1, 2, 8, 8), "one or three channels"),
        (torch.rand(1, 3, 8, 8) * 255, r"images: values .* give pictures in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), r"images: values nan"),
        (torch.ones(1, 3, 8, 8, dtype=torch.uint8), "give floating pictures"),
    ],
)
def test_wrong_pictures_are_refused(images, message):
    with pytest.raises(ClearwingError, match=message):
        grabcut(images, torch.zeros(1, 8, 8, dtype=torch.uint8))


def test_wrong_quantiles_are_refused():
    maps = torch.rand(1, 8, 8)
    with pytest.raises(ClearwingError, match=r"seeds: sure_foreground=0.2, sure_background=0.4; give shares"):
        seeds(maps, maps > 0.5, sure_foreground=0.2, sure_background=0.4)


def test_what_is_no_seed_map_is_refused():
    images, truth = scene(n=1)
    with pytest.raises(ClearwingError, match=r"codes: torch.bool up to True; give the codes that seeds makes"):
        grabcut(images, truth)
