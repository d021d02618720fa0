"""IoU, Dice, mIoU, boundary F, boxes and their conventions; bootstrap intervals."""

import itertools
import math

import numpy as np
import pytest
import torch
from skimage.measure import regionprops
from skimage.morphology import dilation, disk
from skimage.segmentation import find_boundaries

from clearwing.measure import overlap
from clearwing.measure.overlap import (
    bootstrap_interval,
    boundary_f,
    box_of,
    contour,
    dice,
    iou,
    mean_class_iou,
    paired_interval,
    surely_best,
)
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


def test_looking_at_few_pictures_together_changes_nothing(monkeypatch):
    masks, truth = _masks(0, n=7), _masks(1, n=7).byte()
    truth[_masks(2, n=7, share=0.1)] = 255
    scores = iou, dice, mean_class_iou, boundary_f
    whole = [score(masks, truth) for score in scores]
    for pixels in (1, 2 * 63, 5 * 63):
        monkeypatch.setattr(overlap, "PIXELS", pixels)
        assert all(torch.equal(score(masks, truth), one) for score, one in zip(scores, whole, strict=True))
        with pytest.raises(ClearwingError, match="masks: holds 7; give 0, 1 or bool"):
            iou(torch.cat([masks.byte()[:6], torch.full((1, 9, 7), 7)]), truth)  # in the last of them


def test_iou_and_boxes_are_those_of_coco():
    coco = pytest.importorskip("pycocotools.mask")
    masks, truth = _masks(0), _masks(1)
    encoded = [coco.encode(np.asfortranarray(side.permute(1, 2, 0).byte().numpy())) for side in (masks, truth)]
    ious = coco.iou(*encoded, [0] * len(truth))  # every mask with every truth
    assert iou(masks, truth).tolist() == pytest.approx(np.diag(ious).tolist())
    x, y, width, height = coco.toBbox(encoded[0]).T
    assert box_of(masks).tolist() == np.stack([x, y, x + width, y + height], 1).tolist()


def test_mean_class_iou_is_the_mean_of_both_classes():
    masks, truth = _masks(0), _masks(1).byte()
    truth[_masks(2)] = 255
    swapped = torch.where(truth == 255, truth, 1 - truth)
    expected = [
        (slow_iou(m, t) + slow_iou(~m, s)) / 2 for m, t, s in zip(masks, truth, swapped, strict=True)
    ]  # slow_iou knows one class
    assert mean_class_iou(masks, truth).tolist() == pytest.approx(expected)
    assert torch.allclose(mean_class_iou(~masks, swapped), mean_class_iou(masks, truth))


def test_mean_class_iou_of_perfect_opposite_and_empty_masks():
    a = _masks(0)
    none = torch.zeros_like(a)
    assert mean_class_iou(a, a).tolist() == mean_class_iou(none, none).tolist() == [1.0] * 4
    assert mean_class_iou(a, ~a).tolist() == mean_class_iou(none, ~none).tolist() == [0.0] * 4
    assert mean_class_iou(torch.tensor([[[0, 0, 0, 0]]]), torch.tensor([[[1, 0, 0, 0]]])).tolist() == [0.375]  # 0, 3/4
    assert mean_class_iou(a[:1], torch.full_like(a[:1], 255, dtype=torch.uint8)).tolist() == [1.0]


def slow_contour(mask):
    """Pixel by pixel: what differs from its neighbour to the right, below, or below to the right."""
    height, width = mask.shape
    return [
        (y, x)
        for y in range(height)
        for x in range(width)
        if any(
            y + dy < height and x + dx < width and mask[y][x] != mask[y + dy][x + dx]
            for dy, dx in ((0, 1), (1, 0), (1, 1))
        )
    ]


def slow_boundary_f(mask, truth, radius):
    """F from the distances of every pixel of one contour to every pixel of the other."""
    ignored = truth == 255
    sides = [slow_contour((side == 1) & ~ignored) for side in (mask, truth)]
    if not all(sides):
        return None
    matched = [
        sum(min(math.dist(p, q) for q in there) <= radius for p in here) / len(here)
        for here, there in (sides, sides[::-1])
    ]
    return 2 * matched[0] * matched[1] / sum(matched) if any(matched) else 0.0


@pytest.mark.parametrize("tolerance", [0.0, 0.0075, 0.1, 0.2])
def test_boundary_f_against_all_distances(tolerance):
    masks, truth = _masks(0, n=3, size=(17, 13), share=0.1), _masks(1, n=3, size=(17, 13), share=0.05).byte()
    truth[_masks(2, n=3, size=(17, 13), share=0.1)] = 255
    radius = {0.0: 1, 0.0075: 1, 0.1: 3, 0.2: 5}[tolerance]  # of a diagonal of 21.4
    expected = [slow_boundary_f(m, t, radius) for m, t in zip(masks, truth, strict=True)]
    assert boundary_f(masks, truth, tolerance).tolist() == pytest.approx(expected)
    assert boundary_f(list(masks), list(truth), tolerance).tolist() == pytest.approx(expected)
    assert radius > 3 or max(expected) < 1  # there is something to miss


def test_boundary_f_is_that_of_dilation_by_a_disk():
    """As the DAVIS code has it: what of one contour lies in the other's dilation."""
    masks, truth = (torch.zeros(1, 90, 120, dtype=torch.bool) for _ in range(2))
    masks[:, 20:70, 30:80] = True
    truth[:, 22:75, 28:83] = True
    a, b = (contour(side)[0].numpy() for side in (masks, truth))
    precision = (dilation(b, disk(2)) & a).sum() / a.sum()
    recall = (dilation(a, disk(2)) & b).sum() / b.sum()
    assert 0.3 < precision < 0.9
    assert 0.3 < recall < 0.9
    found = boundary_f(masks, truth, 0.0075)  # 1.1 pixels, so 2
    assert found.tolist() == pytest.approx([2 * precision * recall / (precision + recall)])


def test_contours_lie_on_the_boundaries():
    masks = _masks(0, n=2, size=(30, 30)).int().cumsum(1).cumsum(2) % 40 > 20  # with some inside
    edges = contour(masks)
    assert edges.any()
    for mask, edge in zip(masks.numpy(), edges.numpy(), strict=True):
        thick = find_boundaries(mask, connectivity=2, mode="thick")
        assert not (edge & ~thick).any()
        assert not (thick & ~dilation(edge, np.ones((3, 3)))).any()
    square = torch.zeros(1, 5, 5, dtype=torch.bool)
    square[:, 2:4, 2:4] = True
    expected = [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert contour(square)[0].int().tolist() == expected
    assert not contour(~torch.zeros(1, 5, 5, dtype=torch.bool)).any()  # the border of the picture is none


def test_boundary_f_of_perfect_shifted_and_empty_masks():
    truth = torch.zeros(1, 64, 64, dtype=torch.bool)
    truth[:, 16:48, 16:48] = True
    none = torch.zeros_like(truth)
    assert boundary_f(truth, truth).tolist() == boundary_f(truth.roll(1, 2), truth).tolist() == [1.0]
    assert boundary_f(truth.roll(9, 2), truth).item() < 0.6  # two sides lie beside the truth's
    assert boundary_f(truth.roll(9, 2), truth, 0.1).tolist() == [1.0]
    assert boundary_f(~truth, truth).tolist() == [1.0]  # it looks at contours alone
    assert boundary_f(none, truth).tolist() == boundary_f(truth, none).tolist() == [0.0]
    assert boundary_f(none, none).tolist() == boundary_f(~none, ~none).tolist() == [1.0]
    assert boundary_f(none, ~none).tolist() == boundary_f(~none, none).tolist() == [0.0]
    far = torch.zeros_like(truth)
    far[:, :2, :2] = True
    assert boundary_f(far, truth).tolist() == [0.0]


def test_boundary_f_leaves_out_pixels_to_ignore():
    truth = torch.zeros(1, 40, 40, dtype=torch.uint8)
    truth[:, 10:30, 10:30] = 1
    band = torch.zeros(1, 40, 40, dtype=torch.bool)
    band[:, 8:32, 8:32] = True
    band[:, 12:28, 12:28] = False
    inside, outside = (truth == 1) & ~band, (truth == 1) | band
    truth[band] = 255
    for mask in (inside, outside, inside | (band & _masks(0, n=1, size=(40, 40)))):
        assert boundary_f(mask, truth).tolist() == [1.0]
    assert boundary_f(outside.roll(5, 1), truth).item() < 0.9


def test_boxes_are_those_of_scikit_image():
    masks = _masks(0, n=20, share=0.03)
    masks[3] = False
    masks[4] = True
    for mask, box in zip(masks, box_of(masks).tolist(), strict=True):
        regions = regionprops(mask.int().numpy())
        y0, x0, y1, x1 = regions[0].bbox if regions else (0, 0, 0, 0)
        assert box == [x0, y0, x1, y1]
    assert box_of(masks[4:5]).tolist() == [[0, 0, 7, 9]]
    assert box_of([masks[0], _masks(1, n=1, size=(3, 12))[0]]).shape == (2, 4)
    ignored = torch.tensor([[[255, 1, 255], [0, 1, 0]]], dtype=torch.uint8)
    assert box_of(ignored).tolist() == [[1, 0, 2, 2]]
    assert box_of(ignored).dtype == torch.int64


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


def test_one_way_against_another_is_the_sign_flip_test():
    scores = torch.rand(2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gains = (scores[1] - scores[0]).tolist()
    if sum(gains) < 0:
        scores, gains = scores.flip(0), [-gain for gain in gains]
    signs = list(itertools.product((1, -1), repeat=8))
    as_large = sum(sum(s * g for s, g in zip(sign, gains, strict=True)) >= sum(gains) - 1e-12 for sign in signs)
    best, p = surely_best(scores, level=1.0)
    assert best == 1
    assert p == as_large / len(signs)
    assert surely_best(scores, level=p)[0] == 1
    assert surely_best(scores, level=p - 1e-6)[0] == 0


def test_of_several_ways_the_clearest_gain_counts_against_all_of_them():
    scores = torch.rand(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[0] -= 0.3  # most are better, by chance or not
    gains = scores[1:] - scores[0]
    flips = torch.tensor(list(itertools.product((1.0, -1.0), repeat=7)), dtype=torch.float64)
    flipped = flips[:, None] * gains
    clear = (flipped.sum(2) / flipped.square().sum(2).sqrt()).amax(1)
    own = gains.sum(1) / gains.square().sum(1).sqrt()
    expected = [float((clear >= one - 1e-12).double().mean()) for one in own]
    best, p = surely_best(scores, level=1.0)
    assert best == 1 + int(gains.mean(1).argmax())
    assert p == pytest.approx(expected[best - 1])
    assert p > surely_best(scores[[0, best]], level=1.0)[1]  # alone it would look surer
    assert surely_best(scores, level=1e-3) == (0, pytest.approx(min(expected)))


def test_a_way_that_is_far_worse_does_not_drown_a_steady_gain():
    base = torch.linspace(0.6, 0.9, 25)
    noise = 0.01 * torch.randn(25, generator=torch.Generator().manual_seed(0))
    best, p = surely_best(torch.stack([base, 0 * base, base + 0.05 + noise, base - 0.5 - noise]))
    assert best == 2
    assert p < 1e-3
    rows = [[0.5, 0.6, 0.4, 0.5, 0.6, 0.5], [0.6, 0.7, 0.6, 0.7, 0.7, 0.6], [0.9, 0.9, 0.1, 0.1, 0.2, 0.1]]
    assert surely_best(rows) == (1, 0.03125)


def test_blocks_of_flips_are_all_flips(monkeypatch):
    scores = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    whole = surely_best(scores, level=1.0)
    assert 0 < whole[1] < 1
    monkeypatch.setattr(overlap, "FLIPS", 1000)  # 83 of 4,096 at a time
    assert surely_best(scores, level=1.0) == whole


def test_ways_that_are_no_better_are_seldom_chosen():
    generator = torch.Generator().manual_seed(0)
    chosen = 0
    for _ in range(400):
        base = torch.rand(20, generator=generator)
        same = base + 0.1 * (torch.randn(20, 20, generator=generator) + torch.randn(20, generator=generator))
        chosen += surely_best(torch.cat([base[None], same]), n=1000)[0] > 0
    assert 4 <= chosen <= 36  # 5 % of 400, give or take


def test_a_steady_gain_is_chosen_and_a_worse_or_equal_way_is_not():
    base = torch.linspace(0.3, 0.9, 30)
    noise = 0.02 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    best, p = surely_best(torch.stack([base, base - 0.05, base + 0.03 + noise, base]))
    assert best == 2
    assert p < 0.01
    assert surely_best(torch.stack([base, base - 0.05, base])) == (0, 1.0)
    assert surely_best(torch.stack([base, base]), level=1.0) == (0, 1.0)
    assert surely_best(base[None]) == (0, 1.0)
    assert surely_best(torch.stack([base[:4], base[:4] + 0.5])) == (0, 1 / 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: surely_best([0.5, 0.6]), r"scores: \(2,\); give finite numbers, as \(ways, pictures\)"),
        (lambda: surely_best([[0.5], [float("nan")]]), "scores: "),
        (lambda: surely_best([[0.5], [0.6]], level=0), "level: 0"),
        (lambda: surely_best([[0.5], [0.6]], n=0), "n: 0"),
        (lambda: bootstrap_interval([]), "values: .*at least one finite number"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "values: .*at least one finite number"),
        (lambda: bootstrap_interval([1.0], level=95), "level: 95"),
        (lambda: bootstrap_interval([1.0], n=0), "n: 0"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), r"b: \(2,\); give as many scores as a has, \(1,\)"),
        (lambda: boundary_f(_masks(0), _masks(1), 2), "tolerance: 2; give a share of the picture's diagonal"),
        (lambda: boundary_f(_masks(0), _masks(1)[:3]), "masks: 4 masks for 3 truths"),
        (lambda: mean_class_iou(_masks(0).byte() * 255, _masks(1)), "masks: holds 255"),
        (lambda: box_of(_masks(0).float() / 2), "masks: holds 0.5; give 0, 1, 255 or bool"),
    ],
)
def test_wrong_scores_are_refused(call, message):
    with pytest.raises(ClearwingError, match=message):
        call()
