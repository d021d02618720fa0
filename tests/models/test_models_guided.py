"""The guided filter: against a slow reference from the paper, and what it must keep."""

import pytest
import torch

from clearwing.models.guided import guided_filter


def drawn(channels=3, n=2, height=10, width=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, height, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, height, width, generator=generator, dtype=torch.float64), images


def reference(p, image, radius, epsilon):
    """He, Sun and Tang 2013, eq. 19 to 21, window by window: p (H, W), image (C, H, W); the border repeats."""
    C, H, W = image.shape

    def window(x, y):
        rows = [min(max(y + d, 0), H - 1) for d in range(-radius, radius + 1)]
        columns = [min(max(x + d, 0), W - 1) for d in range(-radius, radius + 1)]
        return [(r, c) for r in rows for c in columns]

    lines = {}
    for y in range(H):
        for x in range(W):
            inside = window(x, y)
            colours = torch.stack([image[:, r, c] for r, c in inside])  # (windows, C)
            values = torch.stack([p[r, c] for r, c in inside])
            mean, mean_p = colours.mean(0), values.mean()
            sigma = colours.T @ colours / len(inside) - torch.outer(mean, mean)
            covariance = (colours * values[:, None]).mean(0) - mean * mean_p
            a = torch.linalg.solve(sigma + epsilon * torch.eye(C, dtype=p.dtype), covariance)
            lines[y, x] = (a, mean_p - a @ mean)
    q = torch.empty_like(p)
    for y in range(H):
        for x in range(W):
            inside = [lines[place] for place in window(x, y)]
            a, b = (torch.stack(values).mean(0) for values in zip(*inside, strict=True))
            q[y, x] = a @ image[:, y, x] + b
    return q


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("radius", "epsilon"), [(1, 1e-2), (2, 1e-3)])
def test_it_is_the_papers(channels, radius, epsilon):
    maps, images = drawn(channels)
    found = guided_filter(maps, images, radius, epsilon, step=1)
    assert found.dtype == torch.float64
    for p, image, q in zip(maps, images, found, strict=True):
        torch.testing.assert_close(q, reference(p, image, radius, epsilon), rtol=0, atol=1e-9)


def test_other_numbers_of_channels_are_averaged_to_one():
    maps, images = drawn(4)
    assert torch.equal(guided_filter(maps, images), guided_filter(maps, images.mean(1, keepdim=True)))


@pytest.mark.parametrize("step", [1, 2])
def test_a_linear_function_of_the_colours_is_kept(step):
    images = drawn(height=16, width=20)[1]
    maps = (torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)[:, None, None] * images).sum(1) + 3
    torch.testing.assert_close(guided_filter(maps, images, epsilon=1e-9, step=step), maps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 40), (37, 23), (16, 20)])
def test_what_is_found_on_small_pictures_is_taken_of_fine_ones(size):
    images, fine = drawn(height=16, width=20)[1], drawn(height=size[0], width=size[1], seed=1)[1]
    mix = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)[:, None, None]
    found = guided_filter((mix * images).sum(1) + 3, images, epsilon=1e-9, fine=fine)
    torch.testing.assert_close(found, (mix * fine).sum(1) + 3, rtol=0, atol=1e-5)


def test_the_same_pictures_as_fine_ones_change_nothing():
    maps, images = drawn(4)
    assert torch.equal(guided_filter(maps, images, fine=images), guided_filter(maps, images))


def test_a_flat_picture_blurs_and_a_constant_map_stays():
    maps, images = drawn(height=16, width=16)
    torch.testing.assert_close(guided_filter(torch.full_like(maps, 7.0), images), torch.full_like(maps, 7.0))
    flat = guided_filter(maps, torch.full_like(images, 0.4))
    assert flat.std() < 0.4 * maps.std()


def test_an_edge_that_is_blurred_in_the_map_comes_back():
    images = torch.zeros(1, 3, 24, 24)
    images[..., 12:] = 0.8
    blurred = torch.linspace(-1, 1, 24).expand(1, 24, 24)
    sharp = guided_filter(blurred, images)
    step = sharp[0, :, 12] - sharp[0, :, 11]
    assert step.min() > 3 * (blurred[0, 0, 12] - blurred[0, 0, 11])


def test_a_batch_equals_one_by_one_at_odd_sizes_and_gradients_flow():
    maps, images = drawn(n=3, height=11, width=7)
    maps.requires_grad_()
    whole = guided_filter(maps, images)
    assert whole.shape == maps.shape
    alone = torch.cat([guided_filter(maps[i : i + 1], images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)
    whole[0].sum().backward()
    assert maps.grad[0].abs().sum() > 0
    assert not maps.grad[1:].any()


def test_half_precision_is_computed_in_single():
    maps, images = drawn()
    found = guided_filter(maps.bfloat16(), images.bfloat16())
    assert found.dtype == torch.float32
    expected = guided_filter(maps.bfloat16().float(), images.bfloat16().float())
    assert torch.equal(found, expected)
