"""Boxes of pictures at the network's size: torchvision's antialiased resize, the whole batch at once."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from clearwing.data.resample import resample

BOXES = torch.tensor([[0, 0, 24, 31], [3, 4, 9, 20], [23, 30, 1, 1], [0, 5, 24, 7], [10, 0, 13, 31], [1, 1, 22, 2]])


def levels(count=6, channels=3, height=24, width=31):  # uint8 pictures of noise: the hardest to resize
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [5, 13, (9, 31), 40])
def test_floating_pictures_become_what_torchvision_makes_of_them(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 24, 31, generator=generator)
    got = resample(images, BOXES, size)
    target = [size, size] if isinstance(size, int) else list(size)
    for image, (top, left, height, width), mine in zip(images, BOXES.tolist(), got, strict=True):
        wanted = TF.resize(image[:, top : top + height, left : left + width], target, antialias=True)
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)


def test_resample_takes_channels_last_and_flips_each_picture_by_itself():
    images = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[2.0, 3.0, 7.0, 8.0]]).expand(3, 4)
    plain = resample(images, boxes, 6)
    turned = resample(
        images.contiguous(memory_format=torch.channels_last), boxes, 6, flip=torch.tensor([True, False, True])
    )
    torch.testing.assert_close(turned[0], plain[0].flip(-1))
    torch.testing.assert_close(turned[1], plain[1])


def test_resample_of_a_constant_is_constant_for_boxes_of_fractions():
    boxes = torch.tensor([[0.3, 1.7, 5.2, 3.9], [2.5, 2.5, 0.4, 0.4]])
    torch.testing.assert_close(resample(torch.full((2, 1, 8, 8), 0.7), boxes, 5), torch.full((2, 1, 5, 5), 0.7))


@pytest.mark.parametrize("size", [5, 13, (9, 31), 40])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_uint8_pictures_become_what_torchvision_makes_of_them_in_0_to_1(size, channels, layout):
    images, flip = levels(channels=channels), torch.tensor([False, True, False, True, True, False])
    got = resample(images.contiguous(memory_format=layout), BOXES.float(), size, flip)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    target = [size, size] if isinstance(size, int) else list(size)
    for image, (top, left, height, width), turned, mine in zip(images, BOXES.tolist(), flip, got, strict=True):
        crop = image[:, top : top + height, left : left + width]
        wanted = TF.resize(crop, target, antialias=True)
        wanted = (wanted.flip(-1) if turned else wanted) / 255
        torch.testing.assert_close(mine, wanted, atol=1.001 / 255, rtol=0)
        own = F.interpolate(crop[None], target, mode="bilinear", antialias=True)[0]  # the kernel itself: to the bit
        assert torch.equal(mine, (own.flip(-1) if turned else own) / 255)


@pytest.mark.parametrize("size", [5, 13, (9, 31), 40])
def test_uint8_pictures_by_products_agree_to_one_level(size):
    flip = torch.tensor([False, True, False, True, True, False])
    images = levels().contiguous(memory_format=torch.channels_last)
    inner = torch.cat([BOXES[:2], BOXES[3:5]]).float() + torch.tensor([1e-4, 1e-4, -2e-4, -2e-4])  # no whole pixels
    which = [0, 1, 3, 4]
    got = resample(images[which], inner, size, flip[which])
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, resample(images, BOXES, size, flip)[which], atol=1.1 / 255, rtol=0)


def test_uint8_pictures_are_the_same_for_any_number_of_threads_and_left_as_they_were():
    images = levels(4, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    before, boxes = images.clone(), torch.tensor([[0, 0, 96, 96], [5, 6, 80, 70], [1, 0, 95, 96], [9, 9, 64, 64]])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(resample(images, boxes, 64))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.equal(images, before)


def test_no_picture_gives_none():
    for images in (levels(0), levels(0).float()):
        assert resample(images, torch.zeros(0, 4), 5).shape == (0, 3, 5, 5)
