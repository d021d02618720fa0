"""The causes of failures against the rule in plain Python, on every small mask."""

import itertools

import pytest
import torch

from clearwing.measure.failures import CAUSES, causes, wrong_reason
from clearwing.measure.overlap import iou
from clearwing.types import ClearwingError


def _row(*pixels):
    return torch.tensor([[pixels]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("mask", "truth", "cause"),
    [
        (_row(1, 1, 0, 0, 0, 0, 0, 0), _row(1, 1, 0, 0, 0, 0, 0, 0), None),
        (_row(1, 1, 0, 0, 0, 0, 0, 0), _row(1, 1, 1, 1, 0, 0, 0, 0), None),  # an IoU of the limit is no failure
        (_row(1, 1, 1, 1, 1, 1, 0, 0), _row(1, 1, 0, 0, 0, 0, 0, 0), "too big"),
        (_row(1, 0, 0, 0, 0, 0, 0, 0), _row(1, 1, 1, 1, 0, 0, 0, 0), "too small"),
        (_row(0, 0, 0, 0, 1, 1, 0, 0), _row(1, 1, 0, 0, 0, 0, 0, 0), "off the object"),
        (_row(0, 1, 1, 1, 1, 1, 0, 0), _row(1, 1, 0, 0, 0, 0, 0, 0), "too big"),  # half of the object, 1/5 of the mask
        (_row(0, 0, 0, 0, 0, 0, 0, 0), _row(1, 1, 0, 0, 0, 0, 0, 0), "too small"),
        (_row(1, 0, 0, 0, 0, 0, 0, 0), _row(0, 0, 0, 0, 0, 0, 0, 0), "too big"),
        (_row(0, 0, 0, 0, 0, 0, 0, 0), _row(0, 0, 0, 0, 0, 0, 0, 0), None),
        (_row(1, 1, 1, 0, 0, 0, 0, 0), _row(1, 0, 255, 255, 0, 0, 0, 0), None),  # 1/2 of what counts
        (_row(1, 1, 1, 1, 0, 0, 0, 0), _row(1, 0, 0, 255, 0, 0, 0, 0), "too big"),
    ],
)
def test_causes_worked_out_by_hand(mask, truth, cause):
    assert causes(mask, truth) == [cause]


def test_areas_as_large_and_half_off_are_too_small():
    """Precision and recall of 3/5 each: no side is larger, and the rule has a last word."""
    mask, truth = _row(0, 0, 1, 1, 1, 1, 1, 0), _row(1, 1, 1, 1, 1, 0, 0, 0)
    assert causes(mask, truth) == ["too small"]
    assert causes(mask, truth, limit=0.4) == [None]  # an IoU of 3/7


def slow_cause(mask, truth, right, empty, limit):
    """The rule, picture by picture."""
    both = sum(m and t for m, t in zip(mask, truth, strict=True))
    either = sum(m or t for m, t in zip(mask, truth, strict=True))
    if not either or both / either >= limit:
        return None
    if empty:
        return "empty map"
    if right is False:
        return "wrong class"
    precision = both / sum(mask) if any(mask) else 1
    recall = both / sum(truth) if any(truth) else 1
    if precision < 0.5 and recall < 0.5:
        return "off the object"
    return "too big" if precision < recall else "too small"


@pytest.mark.parametrize("limit", [0.5, 0.7, 1.0])
def test_every_failure_has_one_cause(limit):
    every = list(itertools.product((0, 1), repeat=5))
    cases = list(itertools.product(every, every, (True, False), (True, False)))
    masks, truth = (torch.tensor([case[i] for case in cases])[:, None] for i in (0, 1))
    right, empty = ([case[i] for case in cases] for i in (2, 3))
    found = causes(masks, truth, right_class=right, empty_map=torch.tensor(empty), limit=limit)
    assert found == [slow_cause(*case, limit) for case in cases]
    failed = (iou(masks, truth) < limit).tolist()
    assert [cause in CAUSES for cause in found] == failed
    assert set(found) == {None, *CAUSES}


def test_what_is_not_known_is_no_cause():
    masks, truth = _row(0, 0, 1).expand(3, 1, 3), _row(1, 0, 0).expand(3, 1, 3)
    assert causes(masks, truth) == ["off the object"] * 3
    assert causes(masks, truth, right_class=[True, False, False]) == ["off the object", "wrong class", "wrong class"]
    both = causes(masks, truth, right_class=[True, False, False], empty_map=[True, True, False])
    assert both == ["empty map", "empty map", "wrong class"]
    assert causes(list(masks), list(truth)) == ["off the object"] * 3


def test_wrong_reason_is_a_right_class_with_a_low_iou():
    scores, right = torch.tensor([0.1, 0.1, 0.3, 0.29, 0.8, 0.0]), [True, False, True, True, True, True]
    assert wrong_reason(scores, right).tolist() == [True, False, False, True, False, True]
    assert wrong_reason(scores.tolist(), torch.tensor(right), limit=0.05).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causes(_row(1, 0), _row(1, 0), right_class=[True, True]), r"right_class: torch.bool \(2,\); .*\(1,\)"),
        (lambda: causes(_row(1, 0), _row(1, 0), empty_map=[2]), r"empty_map: torch.int64 \(1,\); give one bool"),
        (lambda: causes(_row(1, 0), _row(1, 0), limit=50), "limit: 50; give an IoU from 0 to 1"),
        (lambda: causes(_row(1, 0), _row(1, 0, 0)), "masks: mask and truth of sizes 1x2 and 1x3"),
        (lambda: wrong_reason([0.1, 30.0], [True, True]), r"iou: \(2,\); give one IoU from 0 to 1 a picture"),
        (lambda: wrong_reason([0.1], [True], limit=-1), "limit: -1"),
        (lambda: wrong_reason([0.1], [True, False]), r"right_class: torch.bool \(2,\)"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ClearwingError, match=message):
        call()
