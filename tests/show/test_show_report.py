"""The report is one sound file: it loads nothing, escapes everything, and says gently what is missing."""

import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report_values import full_report

from clearwing.cli import parse
from clearwing.config import ReportConfig
from clearwing.data.sources import Sample
from clearwing.jobs import report as job
from clearwing.masks.formats import voc_mask
from clearwing.measure.failures import CAUSES
from clearwing.show import report as R
from clearwing.show.draw import save_png
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


# --- what the job makes of segmentation.json -------------------------------------------------------------------


def recipe(**change):
    how = {"method": "hires-cam", "threshold": "otsu", "pool": 1, "refine": "grabcut"} | change
    return {"how": how["threshold"], "value": None, "layers": ["layer1", "layer3"], "recipe": how}


def result_of(pipeline="refine", per_image=None, **change):
    """What `segment` writes, of two pictures."""
    per_image = {"a.png": 0.2, "b.png": 0.9} if per_image is None else per_image
    mean = sum(per_image.values()) / len(per_image) if per_image else None
    result = {
        "split": "val",
        "pipeline": pipeline,
        "per_image": per_image,
        "mean_iou": mean,
        "ci95": None,
        "n": 2,
        "files": {key: key for key in ("a.png", "b.png")},
        "threshold": recipe(),
        "masks_used_for_calibration": False,
        "format": "png",
        "options": {},
        "baselines": {},
        "differences": {},
        "baseline_ci95": {},
        "notes": [],
        "fell_back": 1,
        "no_evidence": 0,
        "metrics": {"miou": {"mean": 0.5, "ci95": [0.4, 0.6]}, "iou": {"mean": 0.55, "ci95": None}},
        "failures": {"empty map": [], "too small": ["a.png"]},
        "wrong_reason": ["a.png"],
        "curve": None,
    }
    return result | change


def part_of(tmp_path, *given, **change):
    return job.Part(tmp_path, result_of(*given, **change))


DECODER = {
    "how": "probability",
    "value": 0.5,
    "layers": ["layer3"],
    "recipe": recipe()["recipe"],
    "decoder": {"pictures": 1200, "without_mask": 3, "masks_used": 0},
}


def test_the_headline_is_scored_free_and_the_best_practice(tmp_path):
    parts = [
        part_of(tmp_path, "decoder", {}, mean_iou=None),
        part_of(tmp_path, "decoder", masks_used_for_calibration=8),
        part_of(tmp_path, "classic"),
        part_of(tmp_path, "refine (changed)"),
        part_of(tmp_path, "refine"),
        part_of(tmp_path, "decoder"),
    ]
    names = [(part.name, bool(part.per_image)) for part in sorted(parts, key=lambda part: part.rank)]
    assert names == [
        ("decoder", True),
        ("refine", True),
        ("refine (changed)", True),
        ("classic", True),
        ("decoder, calibrated", True),
        ("decoder", False),
    ]


def test_differences_are_taken_from_the_first_on_the_same_pictures(tmp_path):
    baselines = {"everything": 0.3, "edge-map": 0.4}
    gains = {name: {"mean": 0.1, "ci95": [0.0, 0.2]} for name in baselines}
    more = {"differences": gains, "baseline_ci95": dict.fromkeys(baselines), "best_baseline": "edge-map"}
    first = part_of(tmp_path, "decoder", baselines=baselines, threshold=DECODER, **more)
    other = part_of(tmp_path, "refine", {"a.png": 0.1, "b.png": 0.4})
    fewer = part_of(tmp_path, "classic", {"b.png": 0.4}, threshold=recipe(refine="none"))
    rows = {row.name: row for row in job.pipelines([first, other, fewer])}
    assert [(row.name, row.kind, row.best) for row in rows.values()] == [
        ("decoder", "first", False),
        ("refine", "other", False),
        ("classic", "other", False),
        ("everything", "baseline", False),
        ("edge-map", "baseline", True),
    ]
    assert rows["decoder"].difference is None
    assert rows["refine"].difference.value == pytest.approx((0.1 + 0.5) / 2)
    assert rows["classic"].difference is None
    assert rows["classic"].about.endswith("; scored on other pictures than decoder, n = 1")
    assert rows["everything"].difference == R.Estimate(0.1, 0.0, 0.2)
    assert rows["edge-map"].about == "the refine pipeline on the picture's edges; no network"
    assert job.pipelines([other])[0].kind == "first"


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (recipe(), "HiResCAM at layer1 + layer3, Otsu, GrabCut"),
        (recipe(method="rise", threshold="mean", refine="none"), "rise at layer1 + layer3, mean"),
        (
            recipe(method="saliency", pool=5, refine="none")
            | {"how": "percentile:80", "value": 80.0, "layers": [], "chosen_on": {"masks": 8, "tried": 37}},
            "input gradient, percentile 80, 5x5 max-pool, chosen among 37 on 8 drawn masks",
        ),
        (
            DECODER,
            "a decoder on the network's features, one forward pass, "
            "taught by 1,197 pictures' masks from the network alone",
        ),
    ],
)
def test_a_pipeline_in_a_few_words(threshold, said):
    assert job.about_pipeline({"threshold": threshold}) == said


def test_the_command_makes_the_masks_anew(tmp_path):
    assert job.segment_options(part_of(tmp_path)) == " --split val"
    given = {"masks_used_for_calibration": 20, "format": "coco", "options": {"layers": "a b,c"}}
    (tmp_path / "manifest-0.jsonl").write_text('{"settings": {"limit": 60, "seed": 0, "masks": "the truth"}}\n{}\n')
    options = shlex.split(job.segment_options(part_of(tmp_path, "classic (changed)", split="test", **given)))
    _, config = parse(["segment", "RUN", "DATA", "--out", "OUT", *options])
    assert (config.split, config.pipeline, config.format, config.calibrate) == ("test", "classic", "coco", 20)
    assert (config.layers, config.limit, config.masks) == ("a b,c", 60, "the truth")
    assert "--seed" not in options


def sampled(tmp_path, monkeypatch, label=0):
    """Two pictures with true masks, of which a left half is foreground, and their masks below `tmp_path`."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    for name in ("a.png", "b.png"):
        save_png(np.full((8, 8, 3), 90, np.uint8), tmp_path / "pictures" / name)
        for folder in ("truth", "."):
            save_png(mask, tmp_path / folder / name)
    samples = {
        name: Sample(name, tmp_path / "pictures" / name, label, tmp_path / "truth" / name)
        for name in ("a.png", "b.png")
    }
    monkeypatch.setattr(job, "samples_by_key", lambda run, part, config: samples)


def made(part, seen=None):
    return job.segmentation(None, [part], seen, ReportConfig(run="x"))


def test_masks_that_missed_are_drawn_by_cause(tmp_path, monkeypatch):
    sampled(tmp_path, monkeypatch)
    found = made(part_of(tmp_path))
    assert [item.key for item in found.gallery] == ["b.png", "a.png"]
    assert [(cause.name, cause.n, [item.key for item in cause.pictures]) for cause in found.causes] == [
        ("empty map", 0, []),
        ("too small", 1, ["a.png"]),
    ]
    assert (found.wrong_reason.n, found.wrong_reason.pictures[0].iou) == (1, 0.2)
    assert found.metrics == (R.Metric("mIoU", R.Estimate(0.5, 0.4, 0.6), found.metrics[0].about),)
    assert (found.fell_back, found.no_evidence, found.masks_used_for_calibration) == (1, 0, 0)
    assert made(part_of(tmp_path, threshold=DECODER, pipeline="decoder")).fell_back is None
    assert made(part_of(tmp_path, threshold=recipe(refine="none"))).fell_back is None
    sampled(tmp_path, monkeypatch, label=None)
    assert made(part_of(tmp_path)).wrong_reason is None  # who cannot say what is right finds no wrong reason


@pytest.mark.parametrize("files", [{}, {"a.png": "a.geojson", "b.png": "b.geojson"}, {"a.png": "gone.png"}])
def test_masks_in_no_png_file_are_counted_but_not_drawn(tmp_path, monkeypatch, files):
    sampled(tmp_path, monkeypatch)
    (tmp_path / "a.geojson").write_text("{}")
    found = made(part_of(tmp_path, files=files))
    assert found.gallery == ()
    assert [(cause.n, cause.pictures) for cause in found.causes] == [(0, ()), (1, ())]
    assert (found.wrong_reason.n, found.wrong_reason.pictures) == (1, ())
    text = words(page_of(tmp_path, R.Report("x", segmentation=found)))
    assert "No outlines are drawn" in text
    assert "1 of 2 masks has an IoU under 0.5." in text


def test_beside_a_wrong_reason_stands_where_the_network_looked(tmp_path, monkeypatch):
    sampled(tmp_path, monkeypatch)
    overlays = {0: np.zeros((8, 8, 3), np.uint8), 1: np.ones((8, 8, 3), np.uint8)}
    seen = SimpleNamespace(
        pictures=SimpleNamespace(keys=["b.png", "a.png"]),
        overlays=lambda indices, method: [overlays[i] for i in indices],
        named=lambda i: f"class {i}",
    )
    (item,) = made(part_of(tmp_path), seen).wrong_reason.pictures
    assert (item.key, item.about, int(item.looked.max())) == ("a.png", "class 1", 1)
    seen.pictures.keys = ["b.png", "other.png"]
    (item,) = made(part_of(tmp_path), seen).wrong_reason.pictures
    assert (item.key, item.about, item.looked) == ("a.png", "", None)


def test_palette_masks_are_read(tmp_path):
    mask = torch.zeros(6, 6, dtype=torch.uint8)
    mask[:, :2] = 1
    voc_mask(mask, 4).save(tmp_path / "a.png")
    assert torch.equal(part_of(tmp_path, format="voc").mask("a.png"), mask)


def test_masks_without_truth_have_no_scores(tmp_path, monkeypatch):
    sampled(tmp_path, monkeypatch)
    none = {"metrics": {}, "failures": {}}
    result = {
        key: value for key, value in result_of("refine", {}, **none).items() if key not in ("curve", "wrong_reason")
    }
    found = made(job.Part(tmp_path, result))
    assert (found.pipelines, found.metrics, found.curve, found.causes, found.wrong_reason) == ((), (), None, None, None)
    assert [item.key for item in found.gallery] == ["a.png", "b.png"]


def test_every_cause_is_explained():
    assert tuple(job.CAUSES) == CAUSES


def test_evenly_takes_both_ends():
    assert job.evenly(list("abcdefgh"), 3) == ["a", "e", "h"]
    assert job.evenly(list("ab"), 3) == ["a", "b"]
    assert [job.evenly(list("ab"), most) for most in (1, 0)] == [["a"], []]
