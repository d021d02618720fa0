"""IoU, Dice and their conventions; bootstrap intervals."""

import numpy as np
import pytest
import torch

from clearwing.measure.overlap import bootstrap_interval, dice, iou, paired_interval
from clearwing.types import ClearwingError


def _masks(seed, n=4, size=(9, 7), share=0.4):
    return torch.rand(n, *size, generator=torch.Generator().manual_seed(seed)) < share


def slow_iou(mask, truth):
    """Pixel by pixel, from the definition."""
    both = either = 0
    for p, t in zip(mask.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if t == 255:
            continue
        both += bool(p) and bool(t)
        either += bool(p) or bool(t)
    return both / either if either else 1.0


def test_against_the_definition_with_pixels_to_ignore():
    masks, truth = _masks(0), _masks(1).byte()
    truth[_masks(2)] = 255
    expected = [slow_iou(m, t) for m, t in zip(masks, truth, strict=True)]
    assert iou(masks, truth).tolist() == pytest.approx(expected)
    assert torch.equal(iou(masks.byte(), truth), iou(masks, truth))
    assert torch.equal(iou(masks.float(), truth.numpy()), iou(masks, truth))
    torch.testing.assert_close(dice(masks, truth), 2 * iou(masks, truth) / (1 + iou(masks, truth)))


def test_perfect_disjoint_and_empty():
    a = _masks(0)
    none = torch.zeros_like(a)
    assert iou(a, a).tolist() == [1.0] * 4
    assert iou(a, ~a).tolist() == [0.0] * 4
    assert iou(none, none).tolist() == dice(none, none).tolist() == [1.0] * 4
    assert iou(a, none).tolist() == iou(none, a).tolist() == [0.0] * 4
    everywhere_ignored = torch.full_like(a, 255, dtype=torch.uint8)[:1]
    assert iou(a[:1], everywhere_ignored).tolist() == [1.0]


def test_lists_of_different_sizes_equal_one_by_one():
    a, b = _masks(0, n=2), _masks(1, n=1, size=(5, 12))
    t, u = _masks(2, n=2), _masks(3, n=1, size=(5, 12))
    expected = torch.cat([iou(a, t), iou(b, u)])
    assert torch.equal(iou([a[0], a[1], b[0]], [t[0], t[1], u[0]]), expected)
    assert torch.equal(iou([a[0].numpy(), a[1].numpy(), b[0].numpy()], [t[0], t[1], u[0]]), expected)
    assert torch.equal(iou([a[0], a[1]], t), expected[:2])  # a list beside a stack
    assert torch.equal(iou(a[0], t[0]), expected[:1])  # one picture


@pytest.mark.parametrize(
    ("masks", "truth", "message"),
    [
        (torch.ones(1, 4, 5), torch.ones(1, 5, 5), "masks: mask and truth of sizes 4x5 and 5x5"),
        ([torch.ones(4, 5), torch.ones(3, 3)], [torch.ones(4, 5), torch.ones(3, 4)], "sizes 3x3 and 3x4"),
        (torch.ones(2, 4, 5), torch.ones(3, 4, 5), "masks: 2 masks for 3 truths"),
        (torch.ones(1, 4, 5) * 255, torch.ones(1, 4, 5), "masks: holds 255.0; .*read_mask"),
        ([np.full((2, 2), 255, np.uint8)], [np.ones((2, 2))], "masks: holds 255; .*read_mask"),
        (torch.full((1, 2, 2), 0.3), torch.ones(1, 2, 2), "masks: holds 0.3.*threshold a map first"),
        (torch.ones(1, 2, 2), torch.full((1, 2, 2), 7), "truth: holds 7; give 0, 1, 255 or bool"),
        (torch.ones(2, 2), torch.ones(1, 1, 2, 2), r"truth: \(1, 1, 2, 2\); give masks"),
        ([], [], r"masks: \[\]; give at least one mask"),
        (torch.ones(2, 1, 2), torch.tensor([[[0, 255]], [[255, 0]]]), "truth: holds 0 and 255 alone; .*read_mask"),
    ],
)
def test_what_is_wrong_is_named(masks, truth, message):
    with pytest.raises(ClearwingError, match=message):
        iou(masks, truth)


def test_bootstrap_is_near_the_normal_interval_and_repeats():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.15 * half)
    assert bootstrap_interval(values.tolist()) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_draws_in_parts_when_there_are_many_values():
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values, n=100)  # forty draws a part
    assert 0.49 < low < values.double().mean() < high < 0.51


def test_bootstrap_of_one_value_or_equal_values_has_no_width():
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


def test_paired_interval_sees_a_small_steady_gain():
    generator = torch.Generator().manual_seed(0)
    b = torch.rand(50, generator=generator)
    a = b + 0.02 + 0.01 * torch.randn(50, generator=generator)
    low, high = paired_interval(a, b)
    assert 0 < low < 0.02 < high < 0.03
    assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]  # apart, the intervals overlap


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "values: .*at least one finite number"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "values: .*at least one finite number"),
        (lambda: bootstrap_interval([1.0], level=95), "level: 95"),
        (lambda: bootstrap_interval([1.0], n=0), "n: 0"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), r"b: \(2,\); give as many scores as a has, \(1,\)"),
    ],
)
def test_wrong_scores_are_refused(call, message):
    with pytest.raises(ClearwingError, match=message):
        call()
