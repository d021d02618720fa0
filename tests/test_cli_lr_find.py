"""`clearwing lr-find` on a small data set: what it prints, what it writes, and what it refuses."""

import dataclasses
import json
import shlex
import tomllib

import pytest
from PIL import Image

from clearwing.cli import parse
from clearwing.config import LrFindConfig, TrainConfig
from clearwing.jobs.lr_find import command
from clearwing.settings import recipes
from clearwing.show import draw
from clearwing.show.draw import range_curve
from clearwing.types import ClearwingError
from commands import failure, run

TINY = ["--model", "resnet8", "--widths", "4", "8", "8", "--size", "32"]


def test_it_suggests_a_rate_and_the_command_that_takes_it(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = [
        "--limit",
        "12",
        "--batch-size",
        "12",
        "--crop",
        "none",
        "--jitter",
        "0",
        "--flip",
        "none",
    ]  # one batch without noise
    code, out, err = run(capsys, "lr-find", photos, *TINY, *whole, "--low", "1e-4", "--high", "1", "--steps", "60")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("suggested learning rate: 0."), out
    assert lines[1].startswith("to compare: ")
    rate = lines[0].split()[3]
    words = shlex.split(lines[-1])
    assert words[:3] == ["clearwing", "train", str(photos)]
    assert words[-4:] == ["--lr", rate, "--out", "RUN"]
    name, config = parse(words[1:])
    assert name == "train"
    assert (config.model, config.size, config.limit, config.widths) == ("resnet8", 32, 12, (4, 8, 8))
    assert (config.batch_size, config.crop, config.jitter, config.flip) == (12, "none", 0.0, "none")
    assert list(tmp_path.iterdir()) == []  # nothing is written that was not asked for


def test_it_draws_the_plot_and_refuses_to_replace_it(capsys, photos, tmp_path):
    path = tmp_path / "new" / "lr.png"
    options = [photos, *TINY, "--batch-size", "4", "--low", "1e-3", "--steps", "20", "--out", path]
    code, out, _ = run(capsys, "lr-find", *options, "--json")
    assert code == 0
    result = json.loads(out)
    assert len(result["lrs"]) == len(result["losses"]) == len(result["smoothed"]) <= 20
    assert result["lrs"][0] == 1e-3
    assert {"suggestion", "minimum_tenth", "diverged", "command"} <= set(result)
    assert (result["model"], result["data"], result["batch_size"], result["skipped"]) == ("resnet8", photos.name, 4, 0)
    with Image.open(path) as picture:
        assert min(picture.size) > 400
    assert json.loads(path.with_suffix(".json").read_text())["losses"] == result["losses"]
    assert "lr.png; exists; use --overwrite" in failure(capsys, "lr-find", *options)
    path.unlink()
    assert "lr.json; exists; use --overwrite" in failure(capsys, "lr-find", *options)
    code, out, _ = run(capsys, "lr-find", *options, "--overwrite", "--json")
    assert code == 0
    assert json.loads(out) == result  # and the same again


def test_no_picture_of_val_is_read(capsys, photos, monkeypatch):
    from clearwing.jobs import train

    splits, load = [], train.load_train_and_val
    monkeypatch.setattr(
        "clearwing.jobs.lr_find.load_train_and_val", lambda c, d, *a: splits.append(d) or load(c, d, *a)
    )
    code, out, _ = run(capsys, "lr-find", photos, *TINY, "--steps", "20", "--high", "1e-5")
    assert code == 0
    assert list(splits[0].splits) == ["train"]
    assert out.startswith("no suggestion: between 1e-06 and 1e-05 the loss does not fall by more than its noise")
    assert "clearwing train" not in out


def test_the_command_says_what_differs_from_the_recipe(tmp_path):
    recipe = sorted(recipes())[0]
    _, config = parse(["lr-find", "demo", "--recipe", recipe, "--momentum", "0.8", "--no-tensorboard"])
    assert isinstance(config, LrFindConfig)
    words = command(config, 0.0123)
    assert words == (f"clearwing train demo --recipe {recipe} --momentum 0.8 --no-tensorboard --lr 0.012 --out RUN")
    _, trained = parse(shlex.split(words)[1:])
    own = {"lr", "out"}
    for field in dataclasses.fields(TrainConfig):
        assert field.name in own or getattr(trained, field.name) == getattr(config, field.name), field.name
    assert trained.model == tomllib.loads(recipes()[recipe].read_text())["model"]


def test_settings_of_a_run_are_taken_but_not_its_folder(trained):
    _, config = parse(["lr-find", "demo", "--config", str(trained / "config.json"), "--epochs", "3"])
    assert (config.out, config.model, config.size, config.epochs) == ("", "resnet8", 32, 3)
    words = command(config, 0.1)
    assert words == f"clearwing train demo --config {trained / 'config.json'} --epochs 3 --lr 0.1 --out RUN"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--low", "0"], "--low: 0 to --high 10; give 0 < low < high"),
        (["--low", "2", "--high", "1"], "--low: 2 to --high 1; give 0 < low < high"),
        (["--steps", "3"], "--steps: 3; give a number from 20"),
        (["--resume"], "--resume: True; the test trains a new network"),
        (["--out", "lr.txt"], "--out: lr.txt; give a file that ends in .png or .svg"),
        (["--momentum", "2"], "--momentum: 2.0; give a number"),
    ],
)
def test_wrong_calls_are_refused(capsys, options, line):
    assert line in failure(capsys, "lr-find", "demo", *TINY, *options)


def test_the_plot_is_cut_above_and_checks_its_values(tmp_path, monkeypatch):
    lrs, losses = [1e-3, 1e-2, 1e-1, 1.0], [2.0, 1.5, 1.9, 1e9]
    figures = []
    monkeypatch.setattr(draw, "_save_figure", lambda figure, path: figures.append(figure) or path)
    range_curve(lrs, losses, losses, tmp_path / "a.png", suggestion=1e-2, title="cost $5$")
    axes = figures[0].axes[0]
    assert axes.get_xscale() == "log"
    assert 2 < axes.get_ylim()[1] < 4
    assert axes.get_title(loc="left") == "cost $5$"
    assert [0.01, 0.01] in [list(line.get_xdata()) for line in axes.lines]
    monkeypatch.undo()
    assert len(range_curve(lrs[:1], [2.0], [2.0], tmp_path / "one.png").read_bytes()) > 1000
    with pytest.raises(ClearwingError, match="losses: 2 for 4 rates; give a loss a rate"):
        range_curve(lrs, losses[:2], losses, tmp_path / "b.png")
