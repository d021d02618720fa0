"""What masks have to beat: everything, a Gaussian, a cut from a box, and the picture's edges."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from clearwing.masks.baselines import centre_box, centre_gaussian, edge_map, everything
from clearwing.masks.pipeline import segment_with
from clearwing.types import ClearwingError


def test_everything_is_all_of_it():
    masks = everything(torch.zeros(2, 3, 5, 7))
    assert (masks.shape, masks.dtype) == ((2, 5, 7), torch.bool)
    assert masks.all()


def test_the_gaussian_lies_on_the_centre():
    bump = centre_gaussian(torch.zeros(2, 3, 20, 40))
    assert bump.shape == (2, 20, 40)
    torch.testing.assert_close(bump, bump.flip(1, 2))
    # the standard deviation is 10 of the 40 columns; the centres of columns 30 and 20 lie 10.5 and 0.5 from the middle
    torch.testing.assert_close(bump[0, 9, 30] / bump[0, 9, 20], torch.tensor(math.exp(-(10.5**2 - 0.5**2) / 200)))
    area = segment_with("classic", bump, torch.zeros(2, 3, 20, 40)).masks.float().mean()
    assert 0.2 < area < 0.4


def test_a_cut_from_a_box_finds_an_object_in_the_centre():
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    truth = torch.stack([(y - 24 - i) ** 2 + (x - 24 + 2 * i) ** 2 < 144 for i in range(2)])
    images = torch.tensor([[0.2, 0.5, 0.3], [0.8, 0.3, 0.2]])[truth.long()].permute(0, 3, 1, 2)
    images = (images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    masks, fell_back = centre_box(images)
    assert not fell_back.any()
    assert (masks & truth).sum() / (masks | truth).sum() > 0.9
    with pytest.raises(ClearwingError, match=r"share: 1\.5"):
        centre_box(images, 1.5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (3, 1, 8, 8)])
def test_edges_are_scipys_sobel(shape, layout):
    images = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = edge_map(images.to(memory_format=layout))
    assert found.shape == (shape[0], *shape[2:])
    for got, picture in zip(found.numpy(), images.numpy(), strict=True):
        sides = [[ndimage.sobel(c, axis, mode="nearest") / 8 for axis in (0, 1)] for c in picture]
        np.testing.assert_allclose(got, max_of([np.hypot(*side) for side in sides]), atol=1e-12)


def max_of(maps):
    return np.max(np.stack(maps), 0)


def test_a_flat_picture_has_no_edges_and_no_border():
    assert edge_map(torch.full((1, 3, 6, 6), 0.7)).max() < 1e-6
    ramp = torch.arange(8.0).expand(1, 1, 5, 8) / 8
    torch.testing.assert_close(edge_map(ramp)[0, :, 1:-1], torch.full((5, 6), 1 / 8))  # the slope, per pixel
