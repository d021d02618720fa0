"""Threshold curves, PxAP and MaxBoxAcc against loops over the thresholds."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_fill_holes
from skimage.measure import label, regionprops

from clearwing.measure import overlap
from clearwing.measure.curves import Curve, max_box_accuracy, threshold_curve
from clearwing.measure.overlap import box_of, iou
from clearwing.types import ClearwingError


def _maps(seed, n=5, size=(9, 7)):
    return torch.rand(n, *size, generator=torch.Generator().manual_seed(seed))


def _truth(seed, n=5, size=(9, 7)):
    truth = (_maps(seed, n, size) < 0.4).byte()
    truth[_maps(seed + 100, n, size) < 0.1] = 255
    return truth


def _scaled(maps):
    """Each map from 0 to 1, in float64."""
    maps = maps.double()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


def slow_curve(scores, truth, thresholds):
    """IoU (N, T), precision and recall (T,) of s >= tau, from the definitions: Choe et al. 2020, sec. 4."""
    ious, precision, recall = [], [], []
    seen, wanted = truth != 255, truth == 1
    for tau in thresholds:
        mask = (scores >= tau) & seen
        both, either = (mask & wanted).sum((1, 2)).double(), (mask | wanted).sum((1, 2)).double()
        ious.append(torch.where(either > 0, both / either, 1.0))
        precision.append(float(both.sum() / mask.sum()) if mask.any() else 1.0)
        recall.append(float(both.sum() / wanted.sum()))
    return torch.stack(ious, 1), precision, recall


@pytest.mark.parametrize("bins", [1, 7, 100, 1000])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_curve_is_that_of_a_loop_over_thresholds(bins, normalise):
    maps, truth = _maps(0), _truth(1)
    truth[3][truth[3] == 1] = 0  # no object
    raw = maps * 7 - 3 if normalise else maps
    scores = _scaled(raw) if normalise else maps.double()
    curve = threshold_curve(raw, truth, bins=bins, normalise=normalise)
    thresholds = [k / bins for k in range(bins + 1)]
    ious, precision, recall = slow_curve(scores, truth, thresholds)
    assert curve.thresholds.tolist() == thresholds
    assert torch.allclose(curve.iou.double(), ious, rtol=0, atol=1e-7)
    assert torch.allclose(curve.mean_iou, ious.mean(0), rtol=0, atol=1e-7)
    assert curve.precision.tolist() == pytest.approx(precision)
    assert curve.recall.tolist() == pytest.approx(recall)
    steps = reversed(range(bins + 1))
    before = [*recall[1:], 0.0]
    assert curve.pxap == pytest.approx(sum(precision[k] * (recall[k] - before[k]) for k in steps))
    best = int(ious.mean(0).argmax())
    assert curve.peak == (pytest.approx(ious.mean(0)[best].item()), best / bins)


def test_a_case_worked_out_by_hand():
    maps = torch.tensor([[[0.9, 0.6, 0.2, 0.0]], [[0.5, 1.0, 0.5, 0.25]]])
    truth = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 255]]], dtype=torch.uint8)
    curve = threshold_curve(maps, truth, bins=4)  # at 0, 1/4, 1/2, 3/4 and 1
    assert curve.claimed.tolist() == [[4, 2, 2, 1, 0], [3, 3, 3, 1, 1]]
    assert curve.both.tolist() == [[2, 2, 2, 1, 0], [1, 1, 1, 0, 0]]
    assert curve.true.tolist() == [2, 1]
    assert torch.allclose(curve.iou, torch.tensor([[2 / 4, 1, 1, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3, 0, 0]]))
    assert curve.precision.tolist() == pytest.approx([3 / 7, 3 / 5, 3 / 5, 1 / 2, 0])
    assert curve.recall.tolist() == pytest.approx([1, 1, 1, 1 / 3, 0])
    assert curve.pxap == pytest.approx(1 / 2 * 1 / 3 + 3 / 5 * 2 / 3)
    assert curve.peak == (pytest.approx(2 / 3), 0.25)  # the lowest of equals
    assert curve.at(0.5).tolist() == curve.at(0.45).tolist() == [1.0, pytest.approx(1 / 3)]
    assert curve.at(1).tolist() == [0.0, 0.0]


def test_a_point_of_the_curve_is_the_iou_of_the_mask():
    maps, truth = _maps(2), _truth(3)
    curve = threshold_curve(maps, truth, bins=64)
    for k in (0, 13, 32, 64):
        assert torch.equal(curve.at(k / 64), iou(maps >= k / 64, truth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [10, 100, 200, 1000])
def test_scores_at_the_thresholds_reach_them(bins, dtype):
    """However k / bins is rounded, and scaling rounds it; and what lies a little below does not."""
    steps = torch.arange(bins + 1, dtype=torch.float64)
    scores = steps / bins
    expected = [bins + 1 - k for k in range(bins + 1)]
    truth = torch.ones(1, 1, bins + 1)
    for maps, normalise in ((scores, False), (scores * 0.3, True), (steps * 7 - 300, True)):
        curve = threshold_curve(maps.to(dtype)[None, None], truth, bins=bins, normalise=normalise)
        assert curve.claimed[0].tolist() == expected
    below = (scores - 1e-5).clamp(min=0)
    curve = threshold_curve(below.to(dtype)[None, None], truth, bins=bins)
    assert curve.claimed[0].tolist() == [bins + 1, *expected[2:], 0]


def test_average_precision_of_a_ranking():
    """Where every score is a threshold of its own, PxAP is the mean of the precision at each object pixel's rank."""
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    truth = (_maps(1, 1, (1, 100)) < 0.3).int()
    ranked = truth[0, 0][order.argsort(descending=True)].tolist()
    hits = [sum(ranked[: i + 1]) / (i + 1) for i in range(100) if ranked[i]]
    curve = threshold_curve((order.float() / 100)[None, None], truth, bins=100)
    assert curve.pxap == pytest.approx(sum(hits) / len(hits))


def test_pxap_of_perfect_and_empty_maps():
    truth = (_maps(0) < 0.3).byte()
    assert threshold_curve(truth.float(), truth).pxap == 1.0
    assert threshold_curve(torch.zeros(5, 9, 7), truth).pxap == pytest.approx(truth.double().mean().item())
    nothing = threshold_curve(_maps(0), torch.zeros(5, 9, 7))
    assert nothing.peak == (1.0, np.ceil(_maps(0).max().item() * 1000) / 1000)  # where nothing is claimed any more
    with pytest.raises(ClearwingError, match="truth: no pixel is foreground; PxAP needs an object"):
        _ = nothing.pxap


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.5, 3e38, float("nan"), float("inf"), -float("inf")])
def test_maps_without_evidence_count_as_zeros(value, normalise):
    maps, truth = _maps(0), _truth(1)
    zeroed = maps.clone()
    maps[2], zeroed[2] = value, 0
    if not np.isfinite(value):
        maps[2] = _maps(9)[0]
        maps[2, 4, 3] = value
    curve, expected = (threshold_curve(m, truth, bins=20, normalise=normalise) for m in (maps, zeroed))
    assert torch.equal(curve.both, expected.both)
    assert torch.equal(curve.claimed, expected.claimed)
    assert curve.claimed[2].tolist() == [(truth[2] != 255).sum().item()] + [0] * 20
    boxes = torch.tensor([[0, 0, 5, 5]] * 5)
    found, wanted = (max_box_accuracy(m, boxes, steps=10, normalise=normalise) for m in (maps, zeroed))
    assert torch.equal(found.best, wanted.best)
    assert found.best[2].tolist() == [25 / 63] + [0.0] * 9


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30])
def test_ranges_of_any_size_are_scaled(factor):
    maps = (torch.arange(63.0).view(1, 9, 7) - 20) * factor
    truth = torch.ones(1, 9, 7)
    curve = threshold_curve(maps, truth, bins=62, normalise=True)
    assert curve.claimed[0].tolist() == list(range(63, 0, -1))


def test_lists_of_different_sizes_equal_one_by_one():
    a, b = _maps(0, n=2), _maps(1, n=1, size=(5, 12))
    t, u = _truth(2, n=2), _truth(3, n=1, size=(5, 12))
    maps, truth = [a[0], a[1].numpy(), b[0]], [t[0].numpy(), t[1], u[0]]
    curve = threshold_curve(maps, truth, bins=30)
    alone = [threshold_curve(a, t, bins=30), threshold_curve(b[0], u[0], bins=30)]
    for name in ("both", "claimed", "true"):
        assert torch.equal(getattr(curve, name), torch.cat([getattr(one, name) for one in alone]))
    beside = threshold_curve(list(a), t, bins=30)  # a list beside a stack
    assert torch.equal(beside.iou, alone[0].iou)
    boxes = [box_of(t)[0], box_of(t)[1], box_of(u)]
    found = max_box_accuracy(maps, boxes)
    assert torch.equal(found.best[:2], max_box_accuracy(a, box_of(t)).best)
    assert torch.equal(found.largest[2:], max_box_accuracy(b, box_of(u)).largest)


def test_looking_at_few_maps_together_changes_nothing(monkeypatch):
    maps, truth = _maps(0, n=7), _truth(1, n=7)
    whole, boxes = threshold_curve(maps, truth, bins=20), max_box_accuracy(maps, box_of(truth))
    for pixels in (1, 2 * 63, 5 * 63):
        monkeypatch.setattr(overlap, "PIXELS", pixels)
        curve = threshold_curve(maps, truth, bins=20)
        assert torch.equal(curve.both, whole.both)
        assert torch.equal(curve.claimed, whole.claimed)
        assert torch.equal(max_box_accuracy(maps, box_of(truth)).largest, boxes.largest)


def test_what_is_given_stays_as_it_is():
    maps, truth = _maps(0).requires_grad_(), _truth(1)
    before = maps.detach().clone(), truth.clone()
    for normalise in (False, True):
        threshold_curve(maps, truth, normalise=normalise)
        max_box_accuracy(maps, box_of(truth), normalise=normalise)
    assert torch.equal(maps, before[0])
    assert torch.equal(truth, before[1])
    half = threshold_curve(maps.bfloat16(), truth, bins=20)
    assert torch.equal(half.both, threshold_curve(maps.bfloat16().float(), truth, bins=20).both)


def slow_boxes(scores, wanted, thresholds):
    """IoU of the largest piece's box and the best of all boxes at each threshold: two (T,)."""
    largest, best = [], []
    for tau in thresholds:
        pieces = regionprops(label(scores >= tau, connectivity=2))
        ious = []
        for piece in pieces:
            y0, x0, y1, x1 = piece.bbox
            width, height = min(x1, wanted[2]) - max(x0, wanted[0]), min(y1, wanted[3]) - max(y0, wanted[1])
            both = max(0, width) * max(0, height)
            areas = (x1 - x0) * (y1 - y0), (wanted[2] - wanted[0]) * (wanted[3] - wanted[1])
            ious.append(both / (sum(areas) - both))
        sizes = [binary_fill_holes(np.pad(piece.image, 1)).sum() for piece in pieces]
        largest.append({iou for iou, size in zip(ious, sizes, strict=True) if size == max(sizes)} or {0.0})
        best.append(max(ious, default=0.0))
    return largest, best


@pytest.mark.parametrize("smooth", [0, 2, 5])
def test_boxes_are_those_of_scikit_images_pieces(smooth):
    maps = _maps(smooth, n=3, size=(24, 30))
    if smooth:
        maps = torch.nn.functional.avg_pool2d(maps[:, None], 2 * smooth + 1, 1, smooth)[:, 0]
    boxes = [[3, 4, 20, 15], [0, 0, 9, 24], [10, 10, 30, 20]]
    found = max_box_accuracy(maps, torch.tensor(boxes), steps=20, normalise=True)
    for i, scores in enumerate(_scaled(maps).numpy()):
        largest, best = slow_boxes(scores, boxes[i], [k / 20 for k in range(20)])
        assert found.best[i].tolist() == pytest.approx(best)
        for value, allowed in zip(found.largest[i].tolist(), largest, strict=True):
            assert any(value == pytest.approx(one) for one in allowed)  # any of the largest, where some are as large
    for level, row in zip((0.3, 0.5, 0.7), found.accuracy, strict=True):
        assert torch.equal(row, (found.best >= level).double().mean(0))
    assert found.v1 == max((found.largest[:, k] >= 0.5).double().mean().item() for k in range(20))
    assert found.v2 == pytest.approx(sum(max(row) for row in found.accuracy.tolist()) / 3)


def test_max_box_accuracy_worked_out_by_hand():
    maps = torch.zeros(2, 10, 10)
    maps[0, 1:9, 1:9] = 0.3  # around the object, and something of as high a score beside it
    maps[0, 2:6, 2:6] = 0.6
    maps[0, 7:9, 7:9] = 1.0
    maps[1, :6, :6] = 0.5  # more than the object
    boxes = torch.tensor([[2, 2, 6, 6], [0, 0, 6, 4]])
    maps[1, 9, 9] = 1.0
    found = max_box_accuracy(maps, boxes, steps=10)
    whole, object_, corner = 16 / 100, 1.0, 0.0
    first = [whole, *[16 / 64] * 3, *[object_] * 3, *[corner] * 3]
    second = [24 / 100, *[24 / 36] * 5, *[0.0] * 4]
    assert found.largest[0].tolist() == pytest.approx(first)
    assert found.largest[1].tolist() == pytest.approx(second)
    assert torch.equal(found.best, found.largest)
    assert found.accuracy[1].tolist() == [0, 0.5, 0.5, 0.5, 1, 1, 0.5, 0, 0, 0]
    assert (found.v1, found.v1_threshold) == (1.0, pytest.approx(0.4))
    assert found.v2 == pytest.approx((1 + 1 + 0.5) / 3)
    assert found.v2_thresholds == pytest.approx((0.4, 0.4, 0.4))


def test_the_box_of_a_smaller_piece_counts_for_v2_alone():
    maps = torch.zeros(1, 10, 10)
    maps[0, :2, :2] = 1  # the object
    maps[0, 4:, 4:] = 1
    found = max_box_accuracy(maps, [[0, 0, 2, 2]], steps=4)
    assert found.largest.tolist() == [[4 / 100, 0, 0, 0]]
    assert found.best.tolist() == [[4 / 100, 1, 1, 1]]
    assert (found.v1, found.v2) == (0.0, 1.0)
    either = max_box_accuracy(maps, [[[0, 0, 2, 2], [4, 4, 10, 10]]], steps=4)  # one of two objects is enough
    assert (either.v1, either.v1_threshold) == (1.0, 0.25)


def test_pieces_with_holes_and_pieces_within_them():
    maps = torch.zeros(1, 20, 20)
    maps[0, 2:12, 2:12] = 1  # a ring of 36 pixels, 100 with its hole
    maps[0, 3:11, 3:11] = 0
    maps[0, 6:8, 6:8] = 1  # inside of it
    maps[0, 14:20, 8:16] = 1  # 48 pixels
    found = max_box_accuracy(maps, [[6, 6, 8, 8]], steps=2)
    assert found.best[0, 1] == 1.0
    assert found.largest[0, 1] == pytest.approx(4 / 100)  # the ring's
    lines = torch.zeros(1, 5, 9)
    lines[0, 0, :7] = 1  # a line of 7 pixels, which encloses no area
    lines[0, 3:5, 0:3] = 1  # 6 pixels
    assert max_box_accuracy(lines, [[0, 0, 7, 1]], steps=2).largest[0, 1] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: threshold_curve(_maps(0) * 2, _truth(1)), r"maps: scores from .* to 1.99; .*normalise=True"),
        (lambda: threshold_curve(_maps(0) - 1, _truth(1)), r"maps: scores from -0.99.*; .*normalise=True"),
        (lambda: threshold_curve(_maps(0)[:3], _truth(1)), "maps: 3 maps for 5 truths; give one for every truth"),
        (lambda: threshold_curve(_maps(0, size=(3, 3)), _truth(1)), "maps: map and truth of sizes 3x3 and 9x7"),
        (lambda: threshold_curve(_maps(0)[:, None], _truth(1)), r"maps: \(5, 1, 9, 7\); give maps \(N, H, W\)"),
        (lambda: threshold_curve(_truth(0), _truth(1)), "maps: torch.uint8; give floating scores"),
        (lambda: threshold_curve([], []), r"maps: \[\]; give at least one map"),
        (lambda: threshold_curve(_maps(0), _truth(1) * 3), "truth: holds 3"),
        (lambda: threshold_curve(_maps(0), _truth(1), bins=0), "bins: 0; give a whole number"),
        (lambda: threshold_curve(_maps(0), _truth(1), bins=0.01), "bins: 0.01; give a whole number"),
        (lambda: threshold_curve(_maps(0), _truth(1)).at(80), "threshold: 80; give a threshold from 0 to 1"),
        (lambda: max_box_accuracy(_maps(0), box_of(_truth(1)), steps=-1), "steps: -1"),
        (lambda: max_box_accuracy(_maps(0), box_of(_truth(1)), levels=(50,)), r"levels: \(50,\); give levels of IoU"),
        (lambda: max_box_accuracy(_maps(0), box_of(_truth(1))[:4]), "boxes: 4 for 5 maps"),
        (lambda: max_box_accuracy(_maps(0), torch.zeros(5, 4)), r"boxes: \[\[0.*of picture 0; .*without an object"),
        (lambda: max_box_accuracy(_maps(0), torch.zeros(5, 3)), r"boxes: \(1, 3\) for picture 0"),
        (lambda: max_box_accuracy(_maps(0) * 2, box_of(_truth(1))), "maps: scores from .*normalise=True"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ClearwingError, match=message):
        call()


def test_a_curve_is_frozen():
    curve = threshold_curve(_maps(0), _truth(1), bins=2)
    assert isinstance(curve, Curve)
    with pytest.raises(AttributeError):
        curve.true = curve.both
