"""The masks in a report: which pipeline comes first, what is said of each, and which masks are drawn."""

import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clearwing.cli import parse
from clearwing.config import ReportConfig
from clearwing.data.sources import Sample
from clearwing.jobs import report_masks as job
from clearwing.masks.formats import voc_mask
from clearwing.measure.failures import CAUSES
from clearwing.show import report as R
from clearwing.show.draw import save_png
from pages import Page, words


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
    "decoder": {"pictures": 1200, "rounds": [{"without_mask": 9}, {"without_mask": 3}], "masks_used": 0},
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


def test_cut_masks_of_the_decoder_have_a_name(tmp_path, monkeypatch):
    cut = part_of(tmp_path, "decoder (changed)", threshold=DECODER | {"how": "grabcut", "value": None})
    plain = part_of(tmp_path, "decoder", threshold=DECODER)
    assert sorted([cut, plain], key=lambda part: part.rank) == [plain, cut]
    rows = job.pipelines([plain, cut])
    assert [row.name for row in rows if row.kind != "baseline"] == ["decoder", "decoder, cut"]
    assert "its masks cut by GrabCut" in rows[1].about
    assert "one forward pass" in rows[0].about
    monkeypatch.setattr(job, "samples_by_key", lambda run, part, config: {})
    assert made(cut).fell_back == 1
    assert made(plain).fell_back is None


def test_masks_of_other_data_do_not_stand_beside_the_runs_own(tmp_path, monkeypatch):
    own = part_of(tmp_path, "refine", data="photos")
    other = job.Part(tmp_path, result_of("decoder", data="elsewhere"), own=False)
    assert own.rank < other.rank
    assert [row.name for row in job.pipelines([own, other]) if row.kind != "baseline"] == ["refine"]
    sampled(tmp_path, monkeypatch)
    assert "these masks are of elsewhere" in made(other).notes
    assert made(own).notes == ()


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
            recipe() | {"chosen_on": {"masks": 8, "tried": 37, "changed": False}},
            "HiResCAM at layer1 + layer3, Otsu, GrabCut, "
            "unchanged, for nothing was surely better among 37 on 8 drawn masks",
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
    broken = '{"setti\n'  # a process that was killed while it wrote
    (tmp_path / "manifest-0.jsonl").write_text(
        broken + '{"settings": {"calibrate": 22, "limit": 60, "seed": 0, "masks": "the truth"}}\n{}\n'
    )
    options = shlex.split(job.segment_options(part_of(tmp_path, "classic (changed)", split="test", **given)))
    _, config = parse(["segment", "RUN", "DATA", "--out", "OUT", *options])
    assert (config.split, config.pipeline, config.format, config.calibrate) == ("test", "classic", "coco", 22)
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
    path = R.write_report(tmp_path / "report.html", R.Report("x", segmentation=found))
    text = words(Page(path.read_text(encoding="utf-8")))
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
    (item,) = made(job.Part(tmp_path, result_of("refine", data="elsewhere"), own=False), seen).wrong_reason.pictures
    assert (item.about, item.looked) == ("", None)  # another picture of the same name
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
