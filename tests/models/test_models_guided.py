"""The guided filter: against a slow reference from the paper, and what it must keep."""

import pytest
import torch

from clearwing.models.guided import guided_filter

DTYPES = (torch.float32, torch.float64)


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


def disc(height, width, row, column, radius):
    """A disc (height, width), places and radius as shares of the height and the width."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return ((y - row) ** 2 + (x - column) ** 2 < radius**2).float()


@pytest.mark.parametrize("size", [(96, 80), (75, 111), (48, 40)])
def test_what_is_found_on_small_pictures_is_taken_of_fine_ones(size):
    """Two discs of other colours, of which the map means the one: it comes out as sharp as the fine picture is."""

    def pictures(height, width):
        left, right = disc(height, width, 0.3, 0.25, 0.15), disc(height, width, 0.6, 0.75, 0.2)
        return torch.stack([left, right, 0.3 + 0.5 * (left + right)])[None], left[None]

    images, wanted = pictures(48, 40)
    blurred = torch.nn.functional.avg_pool2d(wanted[:, None], 5, stride=1, padding=2)[:, 0]
    fine, truth = pictures(*size)
    found = guided_filter(blurred, images, fine=fine) > 0.5
    assert found.shape == truth.shape
    assert (found & truth.bool()).sum() / (found | truth.bool()).sum() > 0.97


@pytest.mark.parametrize("epsilon", [1e-3, 1e-4])
def test_a_grey_picture_of_three_channels_loses_no_digits(epsilon):
    grey = torch.where(disc(40, 40, 0.4, 0.5, 0.3) > 0, 0.9, 0.1).expand(1, 3, 40, 40).contiguous()
    maps = disc(40, 40, 0.4, 0.45, 0.3)[None]
    found, expected = (guided_filter(maps.to(dtype), grey.to(dtype), epsilon=epsilon) for dtype in DTYPES)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    one = guided_filter(maps.double(), grey.double()[:, :1], epsilon=epsilon / 3)  # three times one colour
    torch.testing.assert_close(expected, one, rtol=0, atol=1e-8)


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
