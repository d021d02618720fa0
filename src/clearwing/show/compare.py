"""Write runs side by side as one self-contained page: `write_comparison(path, Comparison(...))`.

The values come ready-made, as those of a report do; see show/report.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clearwing.show.draw import Picture
from clearwing.show.frame import Estimate, chart, duration, finite, write_page

__all__ = [
    "MOST_RUNS",
    "Comparison",
    "Contender",
    "Disputed",
    "Estimate",
    "Figure",
    "Kind",
    "Pair",
    "Setting",
    "duration",
    "sentence",
    "write_comparison",
]

MOST_RUNS = 12
"""Six colours, whole and dashed."""

Kind = Literal["share", "number", "count", "time"]


@dataclass(frozen=True)
class Contender:
    """One run; its rows are those of `metrics.jsonl`, of which each has `epoch` and most have `seconds`."""

    name: str
    where: str
    metrics: tuple[Mapping[str, Any], ...]
    accuracy: Estimate | None = None
    about: str = ""  # of the accuracy: "167 pictures of val, last weights"
    watch: str = "val"  # the split that the `val_` figures are of


@dataclass(frozen=True)
class Figure:
    """One row of the table of figures: the value of every run, None where it has none."""

    name: str
    values: tuple[Estimate | None, ...]
    kind: Kind = "number"
    about: str = ""
    notes: tuple[str, ...] = ()  # a word on each value: "epoch 17"


@dataclass(frozen=True)
class Setting:
    """A setting that differs, as every run has it; None where it was not recorded."""

    name: str
    values: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Disputed:
    """One picture on which one run is right and the other wrong: what each took it for, and how surely."""

    key: str
    picture: Picture  # (H, W, 3)
    true: str
    first: tuple[str, float]
    second: tuple[str, float]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two runs on the same n pictures; `p` is that of McNemar's exact test."""

    split: str
    weights: str  # "last" or "best"
    first: str
    second: str
    n: int
    both: int  # pictures on which both are right
    only_first: tuple[str, ...]  # keys of those on which the first alone is right
    only_second: tuple[str, ...]
    p: float
    gallery: tuple[Disputed, ...] = ()

    @property
    def neither(self) -> int:
        return self.n - self.both - len(self.only_first) - len(self.only_second)

    @property
    def difference(self) -> float:
        """The second's accuracy less the first's."""
        return (len(self.only_second) - len(self.only_first)) / self.n


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that the page shows; every part but the runs may be missing."""

    runs: tuple[Contender, ...]
    figures: tuple[Figure, ...] = ()
    settings: tuple[Setting, ...] = ()
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    when: str = ""


def write_comparison(path: str | Path, comparison: Comparison) -> Path:
    """Write the page to `path`, all or nothing; it loads nothing from elsewhere.

    Raises ClearwingError where `path` is a folder.
    """
    names = [run.name for run in comparison.runs]
    by_time, unit = _by_time(comparison.runs)
    return write_page(
        path,
        "compare.html.jinja",
        comparison=comparison,
        heading=" and ".join(filter(None, (", ".join(names[:-1]), names[-1]))),
        lead=" ".join(sentence(pair) for pair in comparison.pairs[:2]),
        styles=_styles(comparison.runs),
        by_epoch=_charts(comparison.runs, {run.name: run.metrics for run in comparison.runs}, "epoch"),
        by_time=_charts(comparison.runs, by_time, unit),
        unit=unit,
        sentence=sentence,
    )


def sentence(pair: Pair) -> str:
    """Say who is right more often, and whether chance gives as much: McNemar's exact test, Dietterich 1998."""
    weights = "" if pair.weights == "last" else f" ({pair.weights} weights)"
    where = f"On the {pair.n} pictures of {pair.split}{weights},"
    first, second = len(pair.only_first), len(pair.only_second)
    if not first + second:
        return f"{where} {pair.first} and {pair.second} are right on the same ones."
    ahead, behind = (pair.first, pair.second) if first >= second else (pair.second, pair.first)
    more, fewer = max(first, second), min(first, second)
    chance = "more than chance would give" if pair.p < 0.05 else "which may be chance"
    p = "p < 0.001" if pair.p < 0.001 else f"p = {pair.p:.2g}"
    return (
        f"{where} {ahead} alone is right on {more} and {behind} alone on {fewer}: "
        f"a difference of {100 * abs(pair.difference):.1f} points, {chance} (McNemar's exact test, {p})."
    )


def _styles(runs: tuple[Contender, ...]) -> dict[str, str]:
    """The CSS classes of every run's line: six colours, and dashed from the seventh on."""
    return {run.name: f"run-{i % 6 + 1}" + (" dashed" if i >= 6 else "") for i, run in enumerate(runs)}


def _by_time(runs: tuple[Contender, ...]) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows with the time at the end of their epoch, in the unit that suits the longest run."""
    ends: dict[str, list[float]] = {}
    for run in runs:
        spent = 0.0
        ends[run.name] = []
        for row in run.metrics:
            spent += row.get("seconds") or 0.0
            ends[run.name].append(spent)
    longest = max(times[-1] for times in ends.values())
    units = (("hour", 3600.0), ("minute", 60.0))
    unit, length = next((one for one in units if longest >= 3 * one[1]), ("second", 1.0))
    rows = {
        run.name: [{**row, unit: t / length} for row, t in zip(run.metrics, ends[run.name], strict=True)]
        for run in runs
    }
    return rows, unit


def _charts(runs: tuple[Contender, ...], rows: Mapping[str, Any], across: str) -> list[dict[str, Any]]:
    charts = []
    watches = {run.watch for run in runs}
    watched = watches.pop().capitalize() if len(watches) == 1 else "Watched"
    for title, key in (
        (f"{watched} accuracy", "val_accuracy"),
        ("Learning rate", "lr"),
        ("Train loss", "train_loss"),
        (f"{watched} loss", "val_loss"),
    ):
        series = {run.name: points for run in runs if (points := finite(rows[run.name], across, key))}
        if series:
            charts.append(
                chart(
                    title,
                    series,
                    percent=key == "val_accuracy",
                    across=across,
                    styles=_styles(runs),
                    size=(540, 250),
                )
            )
    return charts
