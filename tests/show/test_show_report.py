"""The report is one sound file: it loads nothing, escapes everything, and says gently what is missing."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from report_values import full_report

from clearwing.show import report as R
from clearwing.types import ClearwingError
from pages import Page, words


def page_of(tmp_path, report):
    path = R.write_report(tmp_path / "deep" / "report.html", report)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_the_whole_report_holds_together(tmp_path):
    page = page_of(tmp_path, full_report())
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a")}
    assert targets <= set(ids)
    for name in ("data", "training", "accuracy", "mistakes", "attention", "timeline", "masks", "skipped", "reproduce"):
        assert name in ids
        assert name in targets  # the navigation leads to it
    assert len(page.all("img")) == 3 + 3 * 3 + 2 * 4 + 2 * 4 + 5 + 2 + 6 + 3
    assert all(a["alt"] and a["src"].startswith("data:image/") and a["width"] for a in page.all("img"))
    text = words(page)
    for said in (
        "90.0 %",
        "76.2 to 96.1 %",
        "0.786",
        "0.765 to 0.806",
        "masks used for calibration: none",
        "Best baseline 0.703 (GrabCut from a centre box).",
        "1 min 23 s",
    ):
        assert said in text
    assert "val is a stratified 20 % slice of train" in text
    assert "clearwing train DATA --out RUN" in text
    assert "truncated JPEG" in text
    assert "GrabCut from a centre box" in text
    assert "+0.083" in text
    assert (text.count("best baseline"), text.count("Best baseline")) == (1, 1)


def test_it_loads_nothing_from_elsewhere(tmp_path):
    report = replace(full_report(), title="http://example.org/x.png")
    page = page_of(tmp_path, report)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, name, value)
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_strings_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&<b>"
    report = full_report(names=(evil, "b", "c"), key=evil)
    report = replace(
        report,
        title=evil,
        when=evil,
        commands=(evil,),
        environment={evil: evil, "device": evil},
        facts={evil: evil},
        skipped=((evil, evil),),
        summary=evil,
        data=R.DataFacts(evil, (evil,), {evil: 3}, (evil,)),
    )
    page = page_of(tmp_path, report)
    assert len(page.all("script")) == 2
    assert page.all("b", "") != []
    assert page.text.count("alert(1)") > 12
    assert "alert(1)</script>" not in (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")


def test_an_empty_report_says_so_gently(tmp_path):
    text = words(page_of(tmp_path, R.Report("Nothing yet")))
    for said in ("Nothing yet", "no accuracy to show", "No masks were made", "clearwing evaluate RUN DATA"):
        assert said in text
    assert "None" not in text
    assert "Skipped" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"segmentation": None}, "No masks were made in this run."),
        ({"evaluations": ()}, "No labelled pictures were scored"),
        ({"training": None}, "not trained here"),
        ({"training": R.Training((), 3.0)}, "not trained here"),
        ({"methods": ()}, "No attribution maps were drawn."),
        ({"mistakes": None}, "were not looked at"),
        ({"mistakes": ()}, "Not one picture was misclassified."),
        ({"data": None}, "Nothing is known about the pictures"),
        ({"segmentation": R.Segmentation("val", 5)}, "no IoU is given"),
        ({"commands": (), "environment": {}}, "were not kept"),
    ],
)
def test_every_part_may_be_missing(tmp_path, change, said):
    assert said in words(page_of(tmp_path, replace(full_report(), **change)))


def test_parts_without_intervals_or_pictures(tmp_path):
    half = R.Evaluation("test", 8, R.Estimate(0.5))
    bare = R.Mistake("k", "a", "b", 0.5, np.zeros((8, 8, 3), np.uint8))
    seg = R.Segmentation("test", 8, (R.Pipeline("p", "first", R.Estimate(0.5)),), 3, "its threshold")
    page = page_of(tmp_path, R.Report("x", evaluations=(half,), mistakes=(bare,), segmentation=seg))
    text = words(page)
    assert "95 % interval" not in text.replace("95 % interval p gains", "")
    assert "masks used for calibration: 3" in text
    assert "3 drawn masks were used to choose its threshold; their pictures are not scored." in text
    assert "after seeing 3 of them" in text
    assert "No drawn mask was used" not in text
    for part in ("By other measures", "at every threshold", "Why masks miss", "Right for the wrong reason"):
        assert part not in text
    assert page.all("img")[0]["class"] == "pixels"


def test_many_classes_are_folded(tmp_path):
    K = 100
    counts = np.eye(K, dtype=int) * 9
    counts[7, 8], counts[50, 51] = 5, 1
    names = tuple(f"a_rather_long_name_of_class_{i}" for i in range(K))
    scores = tuple(R.ClassScore(n, 9, R.Estimate(i / K, 0.0, 1.0)) for i, n in enumerate(names))
    rows = tuple(tuple(int(v) for v in row) for row in counts)
    ev = R.Evaluation("val", 906, R.Estimate(0.9), per_class=scores, confusion=rows, class_names=names)
    page = page_of(tmp_path, R.Report("x", evaluations=(ev,)))
    assert len(page.all("details")) == 2
    assert len(page.all("td", "right")) <= 15
    assert len(page.all("rect")) == K + 2  # only cells that hold something
    text = words(page)
    assert "Shown are the 15 of 100 classes" in text
    assert "5 of 14 a rather long name of class 7 taken for a rather long name of class 8" in text


def test_the_timeline_tells_epochs_probabilities_and_iou(tmp_path):
    text = words(page_of(tmp_path, full_report()))
    assert "The same 2 pictures, chosen before training" in text
    assert "picture epoch 0 0 % epoch 6 30 % epoch 12 60 %" in text
    assert "Epoch 0 is the network before training." in text
    assert "Mean IoU over 40 pictures with a drawn mask. Otsu's threshold." in text
    assert "Grad-CAM 0.5 centre 0.4" in text


def test_a_timeline_may_lack_pictures_or_masks(tmp_path):
    whole = full_report().timeline
    maps = page_of(tmp_path, R.Report("x", timeline=replace(whole, mask_iou={}, masked=0, baseline=None)))
    assert "drawn mask" not in words(maps)
    assert len(maps.all("img")) == 8
    curve = page_of(tmp_path, R.Report("x", timeline=replace(whole, rows=(), baseline=None)))
    assert "The pictures are not there any more" in words(curve)
    assert len(curve.all("figure", "chart")) == 1
    assert "timeline" not in {a.get("id") for a in page_of(tmp_path, R.Report("x")).all("section")}


def test_a_long_timeline_is_capped_and_says_so(tmp_path):
    whole = full_report().timeline
    page = page_of(tmp_path, R.Report("x", timeline=replace(whole, rows=whole.rows * 20)))
    assert f"{R.TIMELINE_SHOWN} of 40 pictures, chosen before training" in words(page)
    assert len(page.all("img")) == 4 * R.TIMELINE_SHOWN


def test_the_curve_marks_its_peak_as_an_oracle(tmp_path):
    page = page_of(tmp_path, R.Report("x", segmentation=full_report().segmentation))
    (maps,) = [a["points"].split() for a in page.all("polyline", "train")]
    (dot,) = page.all("circle", "oracle")
    assert len(maps) == 11
    assert min(maps, key=lambda point: float(point.partition(",")[2])) == maps[3]
    assert maps[3] == f"{dot['cx']},{dot['cy']}"
    (level,) = [{point.partition(",")[2] for point in a["points"].split()} for a in page.all("polyline", "baseline")]
    assert len(level) == 1  # the masks themselves, by their own threshold
    assert float(level.pop()) < float(dot["cy"])
    text = words(page)
    assert "oracle: chosen on these masks 0.610 at 0.3" in text
    assert "cut at one threshold for all 40 pictures" in text
    assert "threshold 0.3: maps alone, one threshold for all 0.61, refine, as scored above 0.786" in text
    assert "threshold 0.9: maps alone, one threshold for all 0.1, refine, as scored above 0.786" in text
    for said in ("0.610 at the threshold 0.30", "PxAP 0.712 ", "MaxBoxAcc oracle 82.5 %", "MaxBoxAccV2 oracle 65.4 %"):
        assert said in text


def test_a_curve_may_lack_boxes_and_scored_masks(tmp_path):
    curve = R.ThresholdCurve((0.0, 0.5, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0), 3)
    page = page_of(tmp_path, R.Report("x", segmentation=R.Segmentation("val", 3, curve=curve)))
    assert len(page.all("polyline")) == 2
    assert not re.search("PxAP|MaxBoxAcc", words(page))


def test_the_other_measures_stand_with_their_intervals(tmp_path):
    text = words(page_of(tmp_path, full_report()))
    assert "Dice 0.861 0.840 to 0.880" in text
    assert "Boundary F outlines 0.700" in text


def test_failures_are_counted_by_cause(tmp_path):
    page = page_of(tmp_path, full_report())
    text = words(page)
    assert "11 of 40 masks have an IoU under 0.5." in text
    rest = text.partition("11 of 40 masks")[2].partition("Right for the wrong reason")[0]
    assert rest.index("wrong class 2 another class") < rest.index("too big 9 more pixels")
    assert "0 empty map, too small" in rest
    assert len(re.findall("IoU 0.40", rest)) == R.FAILURES_SHOWN
    widths = [a["style"] for t, a in page.elements if t == "i" and a.get("style") in ("width:18.2%", "width:81.8%")]
    assert widths == ["width:18.2%", "width:81.8%"]


def test_what_is_right_for_the_wrong_reason_is_shown_and_counted(tmp_path):
    page = page_of(tmp_path, full_report())
    text = words(page).partition("Right for the wrong reason")[2]
    assert "3 of 40 pictures are named rightly while the mask covers the object with an IoU under 0.3." in text
    assert "went astray: the map beside the outlines tells which. 2 of them are shown." in text
    assert "outlines Grad-CAM IoU 0.11 Pieris rapae (91%)" in text
    looked = [a for a in page.all("img") if a["alt"].startswith("Where the network looked")]
    assert len(looked) == 1


def test_where_no_mask_misses_one_line_says_so(tmp_path):
    whole = full_report().segmentation
    clean = replace(whole, causes=(R.Cause("too big", 0), R.Cause("too small", 0)), wrong_reason=R.WrongReason(0))
    page = page_of(tmp_path, R.Report("x", segmentation=clean))
    text = words(page)
    assert "Not one of 40 masks has an IoU under 0.5." in text
    assert "None: no picture is named rightly while its mask" in text
    assert len(page.all("img")) == 5
    gone = replace(whole, wrong_reason=R.WrongReason(1))
    text = words(page_of(tmp_path, R.Report("x", segmentation=gone)))
    assert "1 of 40 pictures is named rightly" in text
    assert "went astray. None of them are shown." in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "2 masks fell back to the bare map, for the refinement gave nothing usable; every picture gave evidence."),
        ({"fell_back": 0, "no_evidence": 1}, "No mask fell back to the bare map; 1 picture gave no evidence, so"),
        ({"fell_back": None, "no_evidence": 3}, "they only score. 3 pictures gave no evidence, so that the mask is"),
        ({"fell_back": None}, "they only score. Every picture gave evidence."),
        (
            {"masks_used_for_calibration": 1, "chosen": "the cut"},
            "1 drawn mask was used to choose the cut; its picture",
        ),
        ({"pipelines": (), "per_image": ()}, "40 masks of val . 2 masks fell back"),
        ({"gallery": ()}, "No outlines are drawn: the masks are not in PNG files"),
    ],
)
def test_what_became_of_the_masks_is_said(tmp_path, change, said):
    segmentation = replace(full_report().segmentation, **change)
    assert said in words(page_of(tmp_path, R.Report("x", segmentation=segmentation)))


def test_galleries_are_capped_and_say_so(tmp_path):
    report = full_report()
    tile = np.zeros((16, 16, 3), np.uint8)
    masks = tuple(R.MaskPicture(f"k{i}", tile, i / 99) for i in range(100))
    mistakes = tuple(R.Mistake(f"m{i}", "a", "b", 0.5, tile) for i in range(40))
    report = replace(
        report,
        mistakes=mistakes,
        mistakes_total=77,
        segmentation=replace(report.segmentation, gallery=masks, n=300),
    )
    page = page_of(tmp_path, report)
    text = words(page)
    assert f"{R.MISTAKES_SHOWN} of 77 misclassified" in text
    assert f"{R.MASKS_SHOWN} of 300 pictures" in text
    shown = [float(v) for v in re.findall(r"IoU (\d\.\d\d)", text.partition("Why masks miss")[0])]
    assert len(shown) == R.MASKS_SHOWN
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == 1.0
    assert shown[-1] == 0.0


def test_large_pictures_are_made_small(tmp_path):
    photo = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8)
    report = R.Report("x", mistakes=(R.Mistake("k", "a", "b", 0.5, photo),))
    picture = page_of(tmp_path, report).all("img")[0]
    assert (picture["width"], picture["height"]) == ("256", "192")


def test_what_does_not_fit_is_refused(tmp_path):
    ev = R.Evaluation("val", 2, R.Estimate(0.5), confusion=((1, 0), (1, 0)), class_names=("a",))
    with pytest.raises(ClearwingError, match="confusion: 2 rows; give 1 x 1 for 1 class names"):
        R.write_report(tmp_path / "r.html", R.Report("x", evaluations=(ev,)))
    with pytest.raises(ClearwingError, match="give the name of a file"):
        R.write_report(tmp_path, R.Report("x"))
    assert list(tmp_path.iterdir()) == []


def test_charts_survive_odd_metrics(tmp_path):
    rows = ({"epoch": 1, "train_loss": math.nan, "lr": 0.1}, {"epoch": 2, "train_loss": None, "val_accuracy": 0.5})
    page = page_of(tmp_path, R.Report("x", training=R.Training(rows)))
    assert len(page.all("figure", "chart")) == 2  # accuracy and learning rate; no finite loss
    points = [float(v) for a in page.all("polyline") for v in re.split("[ ,]", a["points"])]
    assert points
    assert all(map(math.isfinite, points))
