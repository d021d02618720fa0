"""The report is one sound file: it loads nothing, escapes everything, and says gently what is missing."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from report_values import full_report

from clearwing.show import report as R
from clearwing.types import ClearwingError

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects the elements and their text; raises where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += " " + data

    def all(self, tag, part=""):
        return [a for t, a in self.elements if t == tag and part in [*(a.get("class") or "").split(), ""]]


def page_of(tmp_path, report):
    path = R.write_report(tmp_path / "deep" / "report.html", report)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def words(page):
    return " ".join(page.text.split())


def test_the_whole_report_holds_together(tmp_path):
    page = page_of(tmp_path, full_report())
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a")}
    assert targets <= set(ids)
    for name in ("data", "training", "accuracy", "mistakes", "attention", "timeline", "masks", "skipped", "reproduce"):
        assert name in ids
        assert name in targets  # the navigation leads to it
    assert len(page.all("img")) == 3 + 3 * 3 + 2 * 4 + 2 * 4 + 5
    assert all(a["alt"] and a["src"].startswith("data:image/") and a["width"] for a in page.all("img"))
    text = words(page)
    for said in (
        "90.0 %",
        "76.2 to 96.1 %",
        "0.786",
        "0.765 to 0.806",
        "masks used for calibration: none",
        "1 min 23 s",
    ):
        assert said in text
    assert "val is a stratified 20 % slice of train" in text
    assert "clearwing train DATA --out RUN" in text
    assert "truncated JPEG" in text
    assert "GrabCut from a centre box" in text
    assert "+0.083" in text


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
    seg = R.Segmentation("test", 8, (R.Pipeline("p", "default", R.Estimate(0.5)),), True)
    page = page_of(tmp_path, R.Report("x", evaluations=(half,), mistakes=(bare,), segmentation=seg))
    text = words(page)
    assert "95 % interval" not in text.replace("95 % interval Default gains", "")
    assert "masks used for calibration: yes" in text
    assert "Drawn masks were used to choose the threshold." in text
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
    shown = [float(v) for v in re.findall(r"IoU (\d\.\d\d)", text)]
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
