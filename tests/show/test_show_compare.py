"""The comparison is one sound file: it loads nothing, escapes everything, says who is right where the other errs."""

from dataclasses import replace

import numpy as np
import pytest
from compare_values import NAMES, full_comparison

from clearwing.show import compare as C
from clearwing.types import ClearwingError
from pages import Page, words


def page_of(tmp_path, comparison):
    path = C.write_comparison(tmp_path / "deep" / "compare.html", comparison)
    assert [file.name for file in path.parent.iterdir()] == ["compare.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_the_whole_comparison_holds_together(tmp_path):
    page = page_of(tmp_path, full_comparison())
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a")}
    assert targets <= set(ids)
    assert {"curves", "figures", "settings", "pictures", "reproduce"} <= targets
    assert len(page.all("img")) == 3
    assert all(a["src"].startswith("data:image/") and a["alt"] for a in page.all("img"))
    text = words(page)
    for said in (
        "runs_a, runs_b and a/long-name-of-a-third-run",
        "90.0 % 86.0 to 93.0 %",
        "92.0 % 88.0 to 95.0 % epoch 9",
        "696,618",
        "2 h 1 min",
        "train.lr 0.1 not set not recorded",
        "runs_a alone 1",
        "runs_b alone 2",
        "both wrong 17",
        "runs_b alone is right on 2 and runs_a alone on 1",
        "(best weights), runs_a and a/long-name-of-a-third-run are right on the same ones",
        "runs_a: right Danaus plexippus 90 % runs_b: wrong Pieris rapae 60 %",
        "the runs watched different pictures",
        "clearwing report runs/a runs/b",
    ):
        assert said in text, said
    assert "None" not in text


def test_it_loads_nothing_and_escapes_what_it_is_given(tmp_path):
    evil = "<script>alert(1)</script>\"'&<b>"
    comparison = full_comparison((evil, "b", "c"), key=evil, true=evil)
    comparison = replace(
        comparison,
        figures=(C.Figure(evil, (C.Estimate(0.5),) * 3, "share", evil, (evil,) * 3),),
        settings=(C.Setting(evil, (evil, evil, evil)),),
        notes=(evil,),
        commands=(evil,),
        when=evil,
    )
    page = page_of(tmp_path, comparison)
    assert len(page.all("script")) == 2
    assert page.text.count("alert(1)") > 20
    assert "alert(1)</script>" not in (tmp_path / "deep" / "compare.html").read_text(encoding="utf-8")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, name, value)


def test_curves_are_drawn_by_epoch_and_over_time(tmp_path):
    page = page_of(tmp_path, full_comparison())
    assert len(page.all("figure", "chart")) == 8
    lines = page.all("polyline")
    assert [a["class"] for a in lines[:3]] == ["run-3", "run-2", "run-1"]  # the first lies on top
    assert len(lines) == 8 * 3
    labels = [a["aria-label"] for a in page.all("svg") if a.get("role") == "img"]
    assert labels[0].startswith("Val accuracy by epoch; last: runs_a 90.8 %")
    assert labels[4].startswith("Val accuracy by minute; last: runs_a 90.8 %")
    ends = [float(a["points"].split()[-1].split(",")[0]) for a in lines[12:15]]
    assert ends[0] > ends[1] > ends[2]  # the third run takes longest
    assert ends[0] == pytest.approx(530)


def test_curves_bear_the_name_of_the_watched_split(tmp_path):
    rows = ({"epoch": 1, "val_accuracy": 0.5, "seconds": 1.0},)
    one, two = C.Contender("a", "", rows, watch="test"), C.Contender("b", "", rows)
    assert "Test accuracy" in words(page_of(tmp_path, C.Comparison((one, replace(one, name="b")))))
    assert "Watched accuracy" in words(page_of(tmp_path, C.Comparison((one, two))))


@pytest.mark.parametrize(("seconds", "unit"), [(0.9, "second"), (15, "minute"), (899, "minute"), (900, "hour")])
def test_the_unit_of_time_suits_the_longest_run(tmp_path, seconds, unit):
    rows = tuple({"epoch": e, "seconds": seconds, "train_loss": 1.0} for e in range(1, 13))
    page = page_of(tmp_path, C.Comparison((C.Contender("a", "", rows), C.Contender("b", "", rows[:1]))))
    assert f"Over time, in {unit}s" in words(page)


def test_every_part_but_the_runs_may_be_missing(tmp_path):
    rows = ({"epoch": 1},)
    page = page_of(tmp_path, C.Comparison((C.Contender("a", "x", rows), C.Contender("b", "y", rows))))
    text = words(page)
    for said in ("a and b", "no curves", "hold no figures", "Not one setting differs", "No two of these runs"):
        assert said in text
    assert "None" not in text


def test_twelve_runs_have_twelve_lines(tmp_path):
    rows = ({"epoch": 1, "lr": 0.1, "seconds": 1.0}, {"epoch": 2, "lr": 0.2, "seconds": 1.0})
    runs = tuple(C.Contender(f"run {i}", "", rows) for i in range(C.MOST_RUNS))
    lines = page_of(tmp_path, C.Comparison(runs)).all("polyline")
    assert len({a["class"] for a in lines}) == C.MOST_RUNS


@pytest.mark.parametrize(
    ("first", "second", "p", "said"),
    [
        (3, 12, 0.0352, "b alone is right on 12 and a alone on 3: a difference of 9.0 points, more than chance"),
        (12, 3, 0.0352, "a alone is right on 12 and b alone on 3: a difference of 9.0 points, more than chance"),
        (5, 4, 1.0, "a alone is right on 5 and b alone on 4: a difference of 1.0 points, which may be chance"),
        (0, 40, 1.8e-12, "p < 0.001"),
        (3, 12, 0.0352, "p = 0.035"),
        (0, 0, 1.0, "a and b are right on the same ones."),
    ],
)
def test_one_sentence_says_who_is_right_more_often(first, second, p, said):
    keys = [str(i) for i in range(first + second)]
    pair = C.Pair("val", "last", "a", "b", 100, 50, tuple(keys[:first]), tuple(keys[first:]), p)
    assert said in C.sentence(pair)
    assert C.sentence(pair).startswith("On the 100 pictures of val, ")
    assert C.sentence(pair).count(".") == C.sentence(pair).rstrip(".").count(".") + 1
    assert pair.neither == 50 - first - second
    assert pair.difference == pytest.approx((second - first) / 100)


def test_a_single_disputed_picture_is_named_as_one(tmp_path):
    whole = full_comparison()
    picture = np.zeros((8, 8, 3), np.uint8)
    one = C.Disputed("k", picture, "a", ("a", 0.5), ("b", 0.5))
    pair = C.Pair("val", "last", *NAMES[:2], 10, 9, ("k",), (), 1.0, (one,))
    text = words(page_of(tmp_path, replace(whole, pairs=(pair,))))
    assert "The 1 picture that one run alone names rightly" in text
    assert "Its name" in text
    many = replace(pair, only_first=tuple("klmn"), both=6)
    assert "1 of the 4 pictures" in words(page_of(tmp_path, replace(whole, pairs=(many,))))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ClearwingError, match="give the name of a file"):
        C.write_comparison(tmp_path, full_comparison())
    assert list(tmp_path.iterdir()) == []
