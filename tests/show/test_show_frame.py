"""What the pages share: round ticks, times in words, and where a chart puts its points."""

import pytest

from clearwing.show import frame


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 2.3, [0, 0.5, 1, 1.5, 2]), (3, 3, [3]), (0, 0.0004, 5)],
)
def test_ticks_are_round(low, high, ticks):
    got = frame.ticks(low, high)
    assert got == ticks if isinstance(ticks, list) else len(got) == ticks


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.34, "2.3 s"), (59.7, "1 min 0 s"), (83, "1 min 23 s"), (7300, "2 h 1 min")]
)
def test_duration(seconds, said):
    assert frame.duration(seconds) == said


def test_slots_cover_the_chart_without_gaps():
    made = frame.chart("Loss", {"a": [(1, 2.0), (2, 1.0), (7, 0.5)]})
    left, right, _, _ = made["frame"]
    ends = [left] + [slot["left"] + slot["width"] for slot in made["slots"]]
    assert ends[:-1] == pytest.approx([slot["left"] for slot in made["slots"]])
    assert ends[-1] == pytest.approx(right)
    assert made["series"][0]["end"][0] == right
    assert made["slots"][1]["text"] == "epoch 2: a 1"


def test_an_epoch_tells_its_own_values_and_a_time_the_latest():
    series = {"a": [(1.0, 0.5), (3.0, 0.75)], "b": [(2.0, 0.25)]}
    by_epoch = frame.chart("Accuracy", series, percent=True)
    assert [slot["text"] for slot in by_epoch["slots"]] == [
        "epoch 1: a 50.0 %",
        "epoch 2: b 25.0 %",
        "epoch 3: a 75.0 %",
    ]
    by_time = frame.chart("Accuracy", series, percent=True, across="minute", styles={"a": "run-1", "b": "run-2"})
    assert by_time["slots"][2]["text"] == "minute 3: a 75.0 %, b 25.0 %"
    assert by_time["slots"][0]["text"] == "minute 1: a 50.0 %"
    assert by_time["x_ticks"][0] == (by_time["frame"][0], "0")
    assert [line["style"] for line in by_time["series"]] == ["run-1", "run-2"]


def test_points_that_are_no_numbers_are_left_out():
    rows = [{"epoch": 1, "lr": float("nan")}, {"epoch": 2}, {"epoch": 3, "lr": None}, {"epoch": 4, "lr": 0.5}]
    assert frame.finite(rows, "epoch", "lr") == [(4.0, 0.5)]
