"""The tally: means, intervals and differences against plain arithmetic, and curves of blocks that add up."""

import csv
import io
import json

import pytest
import torch

from clearwing.jobs.tally import BINS, Tally, added, curve_figures, curve_sums, scores_of
from clearwing.measure.curves import max_box_accuracy, threshold_curve
from clearwing.measure.overlap import bootstrap_interval, boundary_f, box_of, dice, iou, mean_class_iou
from clearwing.run import plain


def record(key, value, **more):
    """A scored picture; the rival `centre` has half its IoU, `all` a fixed one."""
    scores = {"iou": value, "miou": value / 2, "dice": value / 3, "boundary_f": value / 4}
    found = {"key": key, "height": 4, "width": 6, "box": (1, 2, 3, 4), "share": 0.5, "file": f"{key}.png"}
    found |= {"fell_back": False, "empty": False, "class": 1, "probability": 0.75} | scores
    return found | {"rivals": {"centre": value / 2, "all": 0.3}, "right": True, "cause": None} | more


def filled(*blocks, rivals=("centre", "all")):
    tally = Tally(rivals)
    for one in blocks:
        tally.add(one)
    return tally


VALUES = {"c": 0.9, "a": 0.1, "b": 0.5, "d": 0.8}
ORDER = {key: at for at, key in enumerate("abcd")}


@pytest.fixture
def summary():
    records = [record(key, value) for key, value in VALUES.items()]
    records[1] |= {"cause": "too big", "fell_back": True}
    records[2] |= {"right": None, "empty": True}
    blocks = {"pictures": records[:2], "unscored": []}, {"pictures": [*records[2:], {"key": "x", "skipped": "why"}]}
    return filled(*blocks).summary(3, ORDER)


def scenes(n=5, seed=0):
    """Maps and truths of n pictures of different sizes; one truth is empty, and a larger piece may be elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    maps, truths = [], []
    for i in range(n):
        y, x = torch.meshgrid(torch.arange(20 + i), torch.arange(24 - i), indexing="ij")
        disc = (y - 9) ** 2 + (x - 8 - i) ** 2 < 25
        shown = disc.roll((1, -2), (0, 1)).float()
        shown[16:] = 1.5 * (i % 2)
        maps.append(2 * shown + torch.randn(disc.shape, generator=generator) / 4)
        truths.append(disc.byte() * (i != 3))
    return maps, truths


# The summary.


def test_means_are_those_of_the_pictures_in_the_order_of_the_data(summary):
    assert summary["mean_iou"] == pytest.approx(0.575)
    assert list(summary["per_image"].items()) == [("a", 0.1), ("b", 0.5), ("c", 0.9), ("d", 0.8)]
    assert (summary["scored"], summary["n"], summary["skipped"]) == (4, 4, 1)
    assert summary["skipped_pictures"] == [["x", "why"]]
    assert summary["files"] == {key: f"{key}.png" for key in "abcd"}
    means = {name: summary["metrics"][name]["mean"] for name in ("iou", "miou", "dice", "boundary_f")}
    assert means == pytest.approx({"iou": 0.575, "miou": 0.575 / 2, "dice": 0.575 / 3, "boundary_f": 0.575 / 4})
    json.dumps(summary, allow_nan=False)


def test_intervals_are_the_bootstraps(summary):
    own = torch.tensor([0.1, 0.5, 0.9, 0.8], dtype=torch.float64)
    assert summary["ci95"] == list(bootstrap_interval(own, seed=3))
    assert summary["metrics"]["dice"]["ci95"] == pytest.approx(list(bootstrap_interval(own / 3, seed=3)))
    assert summary["baseline_ci95"]["centre"] == pytest.approx(list(bootstrap_interval(own / 2, seed=3)))
    assert summary["differences"]["all"]["ci95"] == pytest.approx(list(bootstrap_interval(own - 0.3, seed=3)))
    assert summary["differences"]["all"]["ci95"][0] < 0.275 < summary["differences"]["all"]["ci95"][1]


def test_baselines_stand_beside_it(summary):
    assert summary["baselines"] == pytest.approx({"centre": 0.2875, "all": 0.3})
    assert summary["best_baseline"] == "all"
    assert summary["differences"]["centre"]["mean"] == pytest.approx(0.2875)
    assert summary["differences"]["all"]["mean"] == pytest.approx(0.275)
    assert summary["baseline_per_image"]["centre"] == pytest.approx({"a": 0.05, "b": 0.25, "c": 0.45, "d": 0.4})


def test_failures_are_listed_by_their_cause(summary):
    assert summary["failures"]["too big"] == ["a"]
    assert sum(map(len, summary["failures"].values())) == 1
    assert summary["wrong_reason"] == ["a"]  # rightly named, an IoU of 0.1
    assert (summary["fell_back"], summary["fell_back_pictures"]) == (1, ["a"])
    assert (summary["no_evidence"], summary["no_evidence_pictures"]) == (1, ["b"])


def test_a_picture_whose_class_is_not_known_is_not_right_for_a_wrong_reason():
    pictures = [record("a", 0.1, right=None), record("b", 0.1, right=False), record("c", 0.1)]
    assert filled({"pictures": pictures}).summary(0, ORDER)["wrong_reason"] == ["c"]


def test_one_picture_has_no_interval():
    found = filled({"pictures": [record("a", 0.4)]}).summary(0, ORDER)
    assert found["mean_iou"] == 0.4
    assert found["ci95"] is found["metrics"]["iou"]["ci95"] is found["differences"]["all"]["ci95"] is None


def test_without_true_masks_there_are_no_scores():
    bare = {key: value for key, value in record("a", 0.4).items() if key not in ("iou", "rivals")}
    found = filled({"pictures": [bare], "unscored": [["a", "no mask for this picture"]]}).summary(0, ORDER)
    assert (found["mean_iou"], found["ci95"], found["scored"], found["n"]) == (None, None, 0, 1)
    assert found["baselines"] == found["differences"] == found["metrics"] == found["per_image"] == {}
    assert found["unscored"] == []  # a folder without masks has no gaps
    known = {"pictures": [bare, record("b", 0.5)], "unscored": [["a", "no mask for this picture"]]}
    assert filled(known).summary(0, ORDER)["unscored"] == [["a", "no mask for this picture"]]


def test_a_picture_that_is_there_twice_counts_once():
    maps, truths = scenes(2)
    skipped = {"key": "x", "skipped": "why"}
    block = {"pictures": [record("a", 0.2), record("b", 0.4), skipped], "unscored": [["b", "torn"]]}
    block["curve"] = curve_sums(maps, truths)
    again = {"pictures": [record("b", 0.9), record("c", 0.6), skipped], "unscored": [["b", "torn"], ["c", "torn"]]}
    once, twice = filled(block).summary(0, ORDER), filled(block, block).summary(0, ORDER)
    assert once == twice
    both = filled(block, again).summary(0, ORDER)
    assert both["per_image"] == {"a": 0.2, "b": 0.4, "c": 0.6}  # what came first stands
    assert both["skipped"] == 1
    assert both["unscored"] == [["b", "torn"], ["c", "torn"]]


# Curves.


def test_the_sums_of_two_blocks_are_those_of_all():
    maps, truths = scenes()
    parts = added(curve_sums(maps[:2], truths[:2]), curve_sums(maps[2:], truths[2:]))
    figures, whole = curve_figures(parts), curve_figures(curve_sums(maps, truths))
    assert figures.keys() == whole.keys()
    for name in ("thresholds", "mean_iou"):
        assert figures[name] == pytest.approx(whole[name])
    assert figures["pxap"] == pytest.approx(whole["pxap"])

    curve = threshold_curve(maps, truths, bins=BINS, normalise=True)
    assert figures["mean_iou"] == pytest.approx(curve.mean_iou.tolist())
    assert figures["thresholds"] == pytest.approx(curve.thresholds.tolist())
    peak, at = curve.peak
    assert figures["peak_iou_oracle"] == pytest.approx({"value": peak, "threshold": at})
    assert figures["pxap"] == pytest.approx(curve.pxap)
    there = [i for i, truth in enumerate(truths) if truth.any()]
    assert len(there) == parts["boxes"] == 4
    boxes = torch.cat([box_of(truths[i][None]) for i in there])
    found = max_box_accuracy([maps[i] for i in there], boxes, steps=BINS, normalise=True)
    assert figures["max_box_acc_oracle"] == pytest.approx(found.v1)
    assert figures["max_box_acc_v2_oracle"] == pytest.approx(found.v2)


def test_sums_go_through_json_and_the_tally():
    maps, truths = scenes()
    parts = [json.loads(json.dumps(plain(curve_sums(maps[i : i + 1], truths[i : i + 1])))) for i in range(5)]
    blocks = [{"pictures": [record(str(i), 0.5)], "curve": part} for i, part in enumerate(parts)]
    found = filled(*blocks, {"pictures": [record("none", 0.5)]}).summary(0, {})
    assert found["curve"]["n"] == 5
    curve = threshold_curve(maps, truths, bins=BINS, normalise=True)
    assert found["curve"]["mean_iou"] == pytest.approx(curve.mean_iou.tolist())


def test_a_block_without_an_object_has_no_boxes():
    maps, truths = scenes()
    alone = curve_sums(maps[3:4], truths[3:4])
    assert "pxap" not in curve_figures(alone)
    for sums in (added(alone, curve_sums(maps[:3], truths[:3])), added(curve_sums(maps[:3], truths[:3]), alone)):
        figures = curve_figures(sums)
        there = curve_figures(curve_sums(maps[:3], truths[:3]))
        assert figures["max_box_acc_oracle"] == there["max_box_acc_oracle"]
        assert figures["n"] == 4


def test_pixels_to_ignore_count_nowhere_in_a_curve():
    maps, truths = scenes(1)
    ignored = truths[0].clone()
    ignored[:5] = 255
    cut = curve_sums([maps[0].clone()], [ignored])
    curve = threshold_curve([maps[0]], [ignored], bins=BINS, normalise=True)
    assert cut["iou"] == pytest.approx(curve.iou[0].tolist())


# Scores of a block, and what else is made of its records.


def test_scores_are_those_of_the_metrics():
    generator = torch.Generator().manual_seed(0)
    masks = {name: [(torch.rand(6, 8, generator=generator) > 0.5).byte() for _ in range(3)] for name in ("masks", "r")}
    truths = {k: (torch.rand(6, 8, generator=generator) > 0.5).byte() for k in (0, 2, 5)}  # positions in the block
    right = [True, None, False, None, None, None]
    found = scores_of(masks, truths, right, [False, False, True])
    true = list(truths.values())
    for name, metric in (("iou", iou), ("miou", mean_class_iou), ("dice", dice), ("boundary_f", boundary_f)):
        assert [one[name] for one in found] == pytest.approx(metric(masks["masks"], true).tolist())
    assert [one["rivals"]["r"] for one in found] == pytest.approx(iou(masks["r"], true).tolist())
    assert [one["right"] for one in found] == [True, False, None]
    assert found[1]["cause"] == "wrong class"
    assert found[2]["cause"] == "empty map"
    assert found[0]["cause"] not in ("wrong class", "empty map")


def test_boxes_are_a_table_by_picture():
    pictures = [record("b", 0.5), record("a", 0.4, **{"class": 7}), record("c", 0.1, box=None, probability=None)]
    del pictures[2]["class"]
    lines = list(csv.reader(io.StringIO(filled({"pictures": pictures}).boxes_csv(ORDER, ("moth", "bee, or not")))))
    assert lines[0] == ["key", "class", "probability", "x", "y", "width", "height", "share"]
    assert lines[1] == ["a", "7", "0.75", "1", "2", "3", "4", "0.5"]  # a class without a name
    assert lines[2] == ["b", "bee, or not", "0.75", "1", "2", "3", "4", "0.5"]
    assert lines[3] == ["c", "", "", "", "", "", "", "0.5"]


def test_coco_numbers_pictures_and_their_masks_alike():
    rle = {"id": 0, "image_id": 0, "category_id": 0, "area": 3}
    pictures = [record("b", 0.5, coco=rle), record("c", 0.4, coco=None), record("a", 0.4, coco=rle, **{"class": 0})]
    images, annotations = filled({"pictures": pictures}).coco(ORDER)
    assert [(image["id"], image["file_name"], image["width"], image["height"]) for image in images] == [
        (1, "a", 6, 4),
        (2, "b", 6, 4),
        (3, "c", 6, 4),
    ]
    numbers = [(one["id"], one["image_id"], one["category_id"], one["area"]) for one in annotations]
    assert numbers == [(1, 1, 1, 3), (2, 2, 2, 3)]  # an empty mask has none
