"""Thresholds against NumPy and scikit-image, their ties, and maps without evidence."""

import math

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu

from clearwing.masks.threshold import binarize, informative, mean, otsu, otsu_threshold, percentile, quantiles
from clearwing.types import ClearwingError


def _maps(n=6, size=(17, 23), dtype=torch.float64, seed=0):
    """Maps of several kinds: noise, two humps, rectified, few levels, shifted far from zero, tiny."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *size, generator=generator, dtype=dtype)
    noise[1] += 4 * (noise[1] > 0.3)
    noise[2] = noise[2].relu()
    noise[3] = noise[3].round()
    noise[4] = noise[4] * 5 + 1000
    noise[5] *= 1e-6
    return noise


def test_quantiles_are_numpys():
    maps = _maps()
    got = quantiles(maps, (0.0, 0.37, 0.8, 1.0))[:, :, 0, 0]
    expected = np.quantile(maps.flatten(1).numpy(), (0.0, 0.37, 0.8, 1.0), axis=1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_percentile_is_above_numpys_percentile():
    maps = _maps(n=3 + 3)[[0, 1, 4]]
    expected = np.stack([m > np.percentile(m, 80) for m in maps.numpy()])
    assert (percentile(maps, 80).numpy() == expected).all()
    assert abs(percentile(maps[:1], 80).double().mean().item() - 0.2) < 0.01


def test_percentile_keeps_the_maximum_where_it_is_more_than_the_share():
    maps = torch.zeros(1, 4, 5)
    maps[0, :, :3] = 2.0  # 60 % of the map
    assert torch.equal(percentile(maps, 80), maps > 0)


def test_percentile_of_a_sparse_map_is_what_is_positive():
    maps = torch.zeros(1, 10, 10)
    maps[0, 2, 3:6] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(percentile(maps, 80), maps > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_otsu_is_scikit_images(dtype):
    maps = torch.cat([_maps(dtype=dtype, seed=seed) for seed in range(5)])
    expected = np.array([threshold_otsu(m) for m in maps.double().numpy()])  # in float32 its sums are inexact
    error = np.abs(otsu_threshold(maps).numpy() - expected) / np.ptp(maps.numpy(), (1, 2))  # as a share of the range
    assert error.max() < (1e-12 if dtype == torch.float64 else 1e-4)  # a bin is 4e-3 wide
    assert torch.equal(otsu(maps), maps > torch.from_numpy(expected).to(dtype)[:, None, None])


def test_otsu_of_a_constant_map_is_its_value_as_in_scikit_image():
    assert otsu_threshold(torch.full((1, 3, 3), 7.0)).item() == threshold_otsu(np.full((3, 3), 7.0)) == 7


def test_mean_and_number_and_share_of_the_maximum():
    maps = torch.tensor([[[0.0, 1.0], [2.0, 9.0]]])
    assert mean(maps).tolist() == [[[False, False], [False, True]]]
    assert binarize(maps, 1).tolist() == [[[False, False], [True, True]]]
    assert binarize(maps, "max:0.1").tolist() == [[[False, True], [True, True]]]


def test_names_give_the_functions():
    maps = _maps()
    assert torch.equal(binarize(maps, "otsu"), otsu(maps))
    assert torch.equal(binarize(maps, "mean"), mean(maps))
    assert torch.equal(binarize(maps, "percentile:65"), percentile(maps, 65))
    assert torch.equal(binarize(maps, "percentile"), percentile(maps, 80))


@pytest.mark.parametrize("how", ["percentile:80", "otsu", "mean", "max:0.2", -1.0])
def test_maps_without_evidence_give_empty_masks_and_leave_the_others_alone(how):
    maps = _maps(dtype=torch.float32)
    alone = binarize(maps, how)
    maps[0], maps[1], maps[2, 0, 0], maps[3, 1, 1] = 0, 3, math.nan, math.inf
    assert informative(maps).tolist() == [False, False, False, False, True, True]
    masks = binarize(maps, how)
    assert masks.shape == maps.shape
    assert masks.dtype == torch.bool
    assert not masks[:4].any()
    assert torch.equal(masks[4:], alone[4:])


@pytest.mark.parametrize("how", ["percentile:80", "otsu", "mean"])
def test_scale_and_batch_do_not_count(how):
    maps = _maps()[:4]
    masks = binarize(maps, how)
    assert torch.equal(binarize(maps * 64, how), masks)  # a power of two: exact
    assert torch.equal(torch.cat([binarize(m[None], how) for m in maps]), masks)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("ostu", "threshold: ostu; did you mean otsu?"),
        ("percentile:x", "threshold: percentile:x; write a number after the colon"),
        ("percentile:101", "q: 101.0; give a percentile between 0 and 100"),
        ("max:2", "threshold: max:2; give a share"),
        (None, "threshold: None; choose one of"),
    ],
)
def test_wrong_thresholds_are_named(how, message):
    with pytest.raises(ClearwingError, match=message.replace("?", r"\?")):
        binarize(torch.rand(1, 4, 4), how)


def test_maps_of_other_shapes_are_refused():
    with pytest.raises(ClearwingError, match=r"maps: \(1, 1, 4, 4\); give a tensor of maps \(N, H, W\)"):
        percentile(torch.rand(1, 1, 4, 4))
