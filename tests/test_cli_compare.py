"""`clearwing report RUN1 RUN2`: runs side by side, from run folders that are written here by hand."""

import csv
import json

import pytest

from clearwing.config import ReportConfig
from clearwing.jobs.compare import is_comparison, parties
from clearwing.measure.accuracy import mcnemar, wilson_interval
from clearwing.run import Run, write_json
from commands import failure, run

NAMES = ["species_0", "species_1", "species_2"]
MODEL = {"name": "resnet8", "num_classes": 3, "input_size": 16, "in_channels": 3, "widths": [4, 4, 8]}


def make_run(path, photos="photos", *, classes=NAMES, accuracies=(0.5, 0.75, 0.7), n=20, **train):
    """A run folder as training leaves it, without weights; None among the accuracies is an epoch without validation."""
    path.mkdir(parents=True)
    settings = {"data": str(photos), "out": str(path), "lr": None, "seed": 0, "json": False} | train
    resolved = {"size": 16, "watch": "val", "lr": settings["lr"] or 0.2, "batch_size": 4, "model": MODEL}
    data = {"name": "photos", "where": str(photos), "splits": {"train": 12, "val": n}, "notes": [], "skipped": []}
    data["used"] = {"train": 12, "watched": n}
    model = MODEL | {"num_classes": len(classes)}
    parts = {"train": settings, "model": model, "resolved": resolved, "data": data, "environment": {"torch": "2"}}
    write_json(path / "config.json", parts)
    write_json(path / "classes.json", classes)
    rows = []
    for epoch, accuracy in enumerate(accuracies, 1):
        row = {"epoch": epoch, "step": 3 * epoch, "train_loss": 1 / epoch, "train_accuracy": 0.25 * epoch, "lr": 0.1}
        row |= {"images_per_s": 10.0 * epoch, "seconds": 2.0 + epoch}
        rows.append(row | ({} if accuracy is None else {"val_loss": 2 / epoch, "val_accuracy": accuracy}))
    Run(path, parts).write_metrics(rows)
    return path


def keys_of(photos):
    return sorted(path.relative_to(photos).as_posix() for path in photos.glob("val/*/*.png"))


def evaluated(path, keys, wrong=(), *, stem="val", **more):
    """What evaluate leaves: the pictures `wrong` are taken for another class, with the probability given."""
    wrong = dict(wrong)
    (path / "evaluation").mkdir(exist_ok=True)
    with (path / "evaluation" / f"{stem}-predictions.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["picture", "predicted", "probability", "true", "correct"])
        for key in keys:
            true = key.split("/")[1]
            taken = NAMES[NAMES.index(true) - 1] if key in wrong else true
            table.writerow([key, taken, wrong.get(key, 0.9), true, int(key not in wrong)])
    right, n = len(keys) - len(wrong), len(keys)
    result = {"split": stem.partition("-")[0], "weights": "best" if stem.endswith("-best") else "last", "n": n}
    result |= {"accuracy": right / n, "ci95": wilson_interval(right, n), "loss": 0.5, "class_names": NAMES}
    write_json(path / "evaluation" / f"{stem}.json", result | more)


def compared(capsys, *argv):
    code, out, err = run(capsys, "report", *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_figures_of_two_runs(capsys, tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", accuracies=(0.5, 0.9, None), n=30)
    found = compared(capsys, a, b)
    assert found["report"] == str(a / "compare.html")
    one, two = found["runs"]
    assert (one["name"], one["run"], one["watched"], one["n"]) == ("a", str(a), "val", 20)
    assert (one["val_accuracy"], one["ci95"]) == (0.7, list(wilson_interval(14, 20)))
    assert (one["best_val_accuracy"], one["best_epoch"]) == (0.75, 2)
    assert (one["epochs"], one["steps"], one["seconds"], one["images_per_s"]) == (3, 9, 12.0, 20.0)
    assert (one["train_accuracy"], one["train_loss"]) == (0.75, 1 / 3)
    assert one["parameters"] == sum(p.numel() for p in Run.load(a).build_model().parameters())
    assert (two["val_accuracy"], two["val_epoch"], two["ci95"]) == (0.9, 2, list(wilson_interval(27, 30)))
    assert "b: its last epoch was not scored; the accuracy is that after 2" in found["notes"]
    assert any("watched different pictures" in note for note in found["notes"])
    assert found["paired"] == []
    text = (a / "compare.html").read_text()
    assert text.count("<polyline") == 16
    assert "No two of these runs were evaluated on the same pictures" in text
    code, out, _ = run(capsys, "report", a, b)
    assert code == 0
    assert out.startswith("a: accuracy on val 70.0% (95 % interval 48.1% to 85.5%), 3 epochs in 12 s\nb: ")
    assert out.endswith(f"comparison: {a / 'compare.html'}\n")


def test_only_settings_that_differ_are_given_once_each(capsys, tmp_path):
    a = make_run(tmp_path / "a", lr=0.1, new_option=None, widths=[4, 4])
    b = make_run(tmp_path / "b", lr=0.3, widths=[4, 8])
    found = compared(capsys, a, b)["settings"]
    assert found == [  # neither --out, nor what is null here and unknown there; resolved.lr says what train.lr says
        {"setting": "train.lr", "values": {"a": 0.1, "b": 0.3}},
        {"setting": "train.widths", "values": {"a": [4, 4], "b": [4, 8]}},
    ]
    c = make_run(tmp_path / "c", lr=None, widths=[4, 4], cutout=8)
    rows = {row["setting"]: row["values"] for row in compared(capsys, a, c)["settings"]}
    assert rows == {
        "train.lr": {"a": 0.1, "c": None},
        "train.cutout": {"c": 8},
        "resolved.lr": {"a": 0.1, "c": 0.2},
    }
    text = " ".join((a / "compare.html").read_text().split())
    assert '<code>train.cutout</code></th><td><span class="soft">not recorded</span></td><td>8</td>' in text
    assert "<code>train.lr</code></th><td>0.1</td><td>not set</td>" in text


def test_the_same_pictures_are_paired(capsys, photos, tmp_path):
    a, b, keys = make_run(tmp_path / "a", photos), make_run(tmp_path / "b", photos), keys_of(photos)
    evaluated(a, keys, {keys[0]: 0.5})
    evaluated(b, keys, {keys[0]: 0.5, keys[2]: 0.6, keys[3]: 0.8, keys[4]: 0.7})
    found = compared(capsys, a, b)
    assert found["notes"] == []
    (pair,) = found["paired"]
    assert (pair["split"], pair["first"], pair["second"], pair["n"]) == ("val", "a", "b", 6)
    assert pair["pictures_only_first_right"] == [keys[3], keys[4], keys[2]]  # the surest mistakes first
    assert pair["pictures_only_second_right"] == []
    assert (pair["both_right"], pair["both_wrong"]) == (2, 1)
    assert (pair["difference"], pair["p"]) == (-0.5, mcnemar(3, 0))
    assert found["runs"][0]["evaluations"]["val"]["accuracy"] == 5 / 6
    text = (a / "compare.html").read_text()
    assert text.count("<img ") == 3
    assert "On the 6 pictures of val, a alone is right on 3 and b alone on 0" in text
    assert "a alone is right on 3" in run(capsys, "report", a, b)[1]
    compared(capsys, a, b, "--most", "2", "--split", "val")
    text = (a / "compare.html").read_text()
    assert text.count("<img ") == 2
    assert f"clearwing report {a} {b} --split=val --most=2</code>" in text
    compared(capsys, a, b, "--most", "0")
    assert "<img " not in (a / "compare.html").read_text()


def test_the_gallery_shows_both_sides(capsys, photos, tmp_path):
    a, b, keys = make_run(tmp_path / "a", photos), make_run(tmp_path / "b", photos), keys_of(photos)
    evaluated(a, keys, dict.fromkeys(keys[:1], 0.5))
    evaluated(b, keys, dict.fromkeys(keys[1:], 0.5))
    for most, (first, second) in {2: (1, 1), 3: (2, 1), 24: (5, 1)}.items():
        compared(capsys, a, b, "--most", most)
        text = (a / "compare.html").read_text()
        assert text.count(">a: right</span>") == first
        assert text.count(">b: right</span>") == second


def test_pairs_are_of_what_both_hold(capsys, photos, tmp_path):
    a, b, c = (make_run(tmp_path / name, photos) for name in "abc")
    keys = keys_of(photos)
    evaluated(b, keys, data="there")
    evaluated(c, keys[:4], {keys[1]: 0.5}, data="elsewhere")
    evaluated(a, keys, stem="val-best")
    evaluated(c, keys, stem="val-best")
    found = compared(capsys, a, b, c)
    assert [(p["first"], p["second"], p["weights"], p["n"]) for p in found["paired"]] == [
        ("a", "c", "best", 6),
        ("b", "c", "last", 4),
    ]
    (note, gone) = found["notes"]
    assert note.startswith("val: b and c: paired on the 4 pictures that both were evaluated on; evaluated in there and")
    assert gone.startswith("the pictures of val are not shown: ")
    evaluated(c, [key.replace("species_1", "species_2") for key in keys])
    path = c / "evaluation" / "val-predictions.csv"
    path.write_text(path.read_text().replace("val/species_2", "val/species_1"))
    assert "another true class" in " ".join(compared(capsys, b, c)["notes"])
    evaluated(c, ["val/species_0/new.png"])
    found = compared(capsys, b, c)
    assert (found["paired"], "evaluated on different pictures" in found["notes"][0]) == ([], True)
    path.write_text("a,b\n")
    assert "run it again" in failure(capsys, "report", b, c)


def test_an_evaluation_of_other_weights_is_left_out(capsys, photos, tmp_path):
    a, b = make_run(tmp_path / "a", photos), make_run(tmp_path / "b", photos)
    evaluated(a, keys_of(photos))
    evaluated(b, keys_of(photos), weights_sha256="0123456789abcdef")
    found = compared(capsys, a, b)
    assert (found["paired"], found["runs"][1]["evaluations"]) == ([], {})
    assert found["notes"] == ["b: evaluation/val.json is of other weights; left out"]


def test_masks_are_set_side_by_side(capsys, tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    result = {"split": "val", "pipeline": "refine", "mean_iou": 0.75, "ci95": [0.7, 0.8], "n": 5, "per_image": {}}
    write_json(a / "masks" / "segmentation.json", result)
    found = compared(capsys, a, b)
    assert found["runs"][0]["masks"] == {"val, refine": {"mean_iou": 0.75, "ci95": [0.7, 0.8], "n": 5}}
    assert found["runs"][1]["masks"] == {}
    assert "0.700 to 0.800" in (a / "compare.html").read_text()


def test_a_run_that_is_called_demo_is_not_the_data_demo(tmp_path, monkeypatch):
    make_run(tmp_path / "demo"), make_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert not is_comparison(ReportConfig(run="demo", data="demo"))  # as clearwing demo --out demo calls it
    assert is_comparison(ReportConfig(run="b", data="./demo"))
    runs, data = parties(ReportConfig(run="demo", data="b", more=("demo",)))
    assert ([run.path.name for run in runs], data) == (["demo", "b"], "demo")


def test_runs_with_different_classes_are_compared_with_a_word(capsys, photos, tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", classes=["ape", "bee"])
    notes = compared(capsys, a, b)["notes"]
    assert notes == ["the runs know different classes (3, 2): their accuracies are not of the same task"]


def test_runs_of_one_name_are_told_apart_and_the_page_goes_where_it_is_told(capsys, photos, tmp_path):
    runs = [make_run(tmp_path / folder / "run", photos) for folder in ("x", "y", "z")]
    page = tmp_path / "pages" / "three.html"
    found = compared(capsys, *runs, photos, "--out", page)
    assert [row["name"] for row in found["runs"]] == ["x/run", "y/run", "z/run"]
    assert found["report"] == str(page)
    assert not (runs[0] / "compare.html").exists()
    assert "exists; use --overwrite" in failure(capsys, "report", *runs, "--out", page)
    compared(capsys, *runs, "--out", page, "--overwrite")
    before = page.read_bytes()
    assert "exists; use --overwrite" in failure(capsys, "report", runs[0], "--out", page)  # of one run, too
    assert "end it in .html" in failure(capsys, "report", *runs, "--out", tmp_path / "page.txt")
    assert page.read_bytes() == before


def test_a_new_training_takes_the_comparison_away(capsys, tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    compared(capsys, a, b)
    Run.create(a, overwrite=True).clear()
    assert not (a / "compare.html").exists()


def test_what_is_wrong_is_one_line(capsys, photos, tmp_path):
    a, b = make_run(tmp_path / "a", photos), make_run(tmp_path / "b", photos)
    empty = make_run(tmp_path / "empty", accuracies=())
    (tmp_path / "link").symlink_to(a)
    for second in (a, f"{a}/", tmp_path / "link"):
        assert "is given twice" in failure(capsys, "report", a, second)
    assert "no finished epoch" in failure(capsys, "report", a, empty)
    assert "no finished epoch" in failure(capsys, "report", empty, a)
    assert "clearwing train wrote" in failure(capsys, "report", tmp_path / "none", a)
    assert f"RUN: {tmp_path / 'none'}; give folders" in failure(capsys, "report", a, b, tmp_path / "none")
    assert f"RUN: {tmp_path}; give folders" in failure(capsys, "report", a, b, photos, tmp_path)
    assert "--larger-than: 3" in failure(capsys, "report", a, b, "--larger-than", "3")
    assert "--limit: 3" in failure(capsys, "report", a, b, "--limit", "3")
    assert "--most: -1" in failure(capsys, "report", a, b, "--most", "-1")
    assert "--split: test" in failure(capsys, "report", a, b, "--split", "test")
    many = [make_run(tmp_path / str(i)) for i in range(13)]
    assert "at most 12" in failure(capsys, "report", *many)
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize("second", ["nowhere", "photos.txt"])
def test_one_run_and_no_such_thing(capsys, tmp_path, second):
    a = make_run(tmp_path / "a")
    (tmp_path / "photos.txt").write_text("x")
    assert failure(capsys, "report", a, tmp_path / second).count("\n") == 1
