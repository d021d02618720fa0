"""Calibration: who is held out, what is tried, and that what is chosen is the best of it."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import clearwing as cw
from clearwing.config import SegmentConfig
from clearwing.data.sources import Sample
from clearwing.jobs import calibrate, inputs
from clearwing.jobs.calibrate import calibrated, candidates, held_out
from clearwing.jobs.maskers import explained, fitted
from clearwing.jobs.progress import Progress
from clearwing.masks.pipeline import RECIPES, Recipe, segment_with

CPU = torch.device("cpu")


def config(run="", count=0, **more):
    return SegmentConfig(run=str(run), data="", out="", calibrate=count, **more)


def samples(known, unknown=0):
    masks = [b"mask"] * known + [None] * unknown
    return [Sample(f"{i:02}", b"", mask=mask) for i, mask in enumerate(masks)]


def test_the_seed_draws_from_those_with_a_mask():
    some = samples(8, 5)[::-1]
    drawn = [held_out(config(count=3, seed=seed), some) for seed in range(20)]
    assert all(len(keys) == 3 and keys <= {f"{i:02}" for i in range(8)} for keys in drawn)
    assert drawn[0] == held_out(config(count=3), some)
    assert set().union(*drawn) == {f"{i:02}" for i in range(8)}
    assert held_out(config(), some) == set()


@pytest.mark.parametrize(
    ("count", "known", "message"),
    [
        (4, 4, "--calibrate: 4; give 1 to 3: of the 4 pictures with a mask, some must be left to score"),
        (-1, 4, "--calibrate: -1; give 1 to 3"),
        (1, 1, "--calibrate: 1; there are no masks to use"),
        (1, 0, "--calibrate: 1; there are no masks to use"),
    ],
)
def test_some_must_be_left_to_score(count, known, message):
    with pytest.raises(cw.ClearwingError, match=message):
        held_out(config(count=count), samples(known, 3))


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_recipe_itself_is_tried_first(name):
    tried = list(candidates(RECIPES[name]))
    assert tried[0] == RECIPES[name]
    assert len(set(tried)) >= 10
    kept = {(one.refine, one.iterations, one.keep, one.finest, one.average, one.target) for one in tried}
    assert len(kept) == 1  # the neighbours differ in how maps are made and cut alone
    assert all(len(one.weights) == max(one.layers, 1) for one in tried)


@pytest.fixture
def found(trained, photos, monkeypatch):
    """A function of settings that calibrates among the given candidates, on three pictures and however unsure it is."""
    loaded = inputs.open_model(str(trained))
    val = cw.open_data(photos).splits["val"]

    def call(recipe, tried, sure=1.0, count=3, **more):
        monkeypatch.setattr(calibrate, "candidates", lambda recipe: iter(tried))
        monkeypatch.setattr(calibrate, "SURE", sure)
        settings = config(trained, count, **more)
        layers = settings.layers.split(",") if settings.layers else []
        with Progress(quiet=True) as progress:
            return calibrated(settings, recipe, layers, loaded, val, CPU, progress)

    return call


def score(recipe, trained, photos):
    """The mean IoU of a recipe on the pictures held out, by the plain way."""
    val = cw.open_data(photos).splits["val"]
    keys = held_out(config(count=3), val)
    chosen = [sample for sample in val if sample.key in keys]
    model = cw.Run.load(trained).model
    [batch] = cw.load_pictures(chosen, 32, fit="squash").batches(3)
    [fine] = cw.load_pictures(chosen, recipe.side(32), fit="squash").batches(3)
    recipe, layers = fitted(recipe, model, batch.images)
    masks = segment_with(recipe, explained(model, recipe, batch, layers), fine).masks
    truths = [cw.read_mask(sample.mask) for sample in chosen]
    return float(cw.iou(cw.restore(masks, fine.geometry), truths).mean())


def test_the_best_of_what_is_tried_is_chosen(found, trained, photos):
    first = Recipe("saliency", threshold="percentile:50", pool=5)
    tried = [first, replace(first, threshold="percentile:80"), replace(first, threshold="percentile:98", pool=1)]
    scores = [score(one, trained, photos) for one in tried]
    assert len(set(scores)) == 3
    recipe, layers, cut, about = found(first, tried)
    best = scores.index(max(scores))
    assert recipe == tried[best]
    assert (layers, cut) == ([], 0.5)
    assert about["masks"] == about["tried"] == 3
    assert about["mean_iou"] == pytest.approx(scores[best])
    assert about["mean_iou_uncalibrated"] == pytest.approx(scores[0])
    assert about["changed"] == (best > 0)
    worst = tried[scores.index(min(scores))]
    assert found(worst, [worst])[0] == worst


def test_on_three_masks_nothing_is_sure(found, trained, photos):
    tried = [Recipe("saliency", threshold=f"percentile:{q}") for q in (98, 50)]
    worse, better = sorted(tried, key=lambda one: score(one, trained, photos))
    recipe, _, _, about = found(worse, [worse, better], sure=0.05)
    assert recipe == worse
    assert not about["changed"]
    assert about["p_value"] >= 1 / 8
    assert about["mean_iou"] == about["mean_iou_uncalibrated"] == pytest.approx(score(worse, trained, photos))


def test_what_is_better_on_all_of_five_masks_is_sure(found):
    next_to_nothing = Recipe("saliency", threshold="percentile:99.5")
    tried = [next_to_nothing, replace(next_to_nothing, threshold="percentile:30")]
    assert calibrate.SURE == 0.05
    recipe, _, _, about = found(next_to_nothing, tried, sure=0.05, count=5)
    assert recipe == tried[1]
    assert about["changed"]
    assert about["p_value"] == 1 / 32
    assert about["mean_iou"] > about["mean_iou_uncalibrated"]


def test_of_equals_the_recipe_itself_is_kept(found):
    first = Recipe("saliency", threshold="percentile:50")
    assert found(first, [first, replace(first, sure_foreground=0.9)])[0] == first  # which nothing reads


def test_methods_at_layers_get_the_layers_they_ask_for(found, trained, photos):
    one = Recipe("layer-cam", layers=1, threshold="mean", finest=64)
    two = replace(one, layers=2, weights=(1.0, 0.3))
    scores = [score(recipe, trained, photos) for recipe in (one, two)]
    recipe, layers, _, about = found(one, [one, two])
    best = scores.index(max(scores))
    assert recipe == (one, two)[best]
    assert layers == [["layer3"], ["layer2", "layer3"]][best]
    assert about["mean_iou"] == pytest.approx(max(scores))


def test_named_layers_are_used_whatever_is_tried(found):
    named = Recipe("layer-cam", layers=4, weights=(1.0,) * 4, threshold="mean")
    tried = [named, replace(named, layers=2, weights=(1.0, 0.3), threshold="otsu")]
    recipe, layers, _, _ = found(named, tried, layers="layer1,layer2,layer3.0,layer3")
    assert layers == ["layer1", "layer2", "layer3.0", "layer3"]
    assert recipe.weights == named.weights


def test_calibration_looks_at_no_other_mask(found, monkeypatch):
    read = []
    monkeypatch.setattr(inputs, "read_mask", lambda mask: read.append(mask) or cw.read_mask(mask))
    first = Recipe("saliency")
    found(first, [first])
    assert len(read) == len(set(read)) == 3


@pytest.mark.parametrize("given", [{"method": "grad-cam"}, {"threshold": "otsu"}])
def test_what_calibration_chooses_is_not_given_too(given):
    [(name, value)] = given.items()
    with pytest.raises(cw.ClearwingError, match=f"--{name}: {value}; --calibrate chooses it; leave one of them out"):
        held_out(config(count=3, **given), samples(8))


def test_what_cannot_be_used_is_passed_over(trained, photos, tmp_path, capsys):
    data = shutil.copytree(photos, tmp_path / "photos")
    val = cw.open_data(data).splits["val"]
    settings = config(trained, 4, pipeline="classic")
    drawn = [sample for sample in val if sample.key in held_out(settings, val)]
    drawn[0].source.write_bytes(b"no picture")
    drawn[1].mask.write_bytes(b"no mask")
    Image.new("L", (5, 5)).save(drawn[2].mask)

    def call():
        loaded = inputs.open_model(str(trained))
        with Progress() as progress:
            return calibrated(settings, RECIPES["classic"], [], loaded, val, CPU, progress)

    *_, about = call()
    assert about["masks"] == 1
    assert sorted(key for key, _ in about["unusable"]) == sorted(sample.key for sample in drawn[:3])
    told = " ".join(capsys.readouterr().err.split())
    assert f"skipped {drawn[0].key}" in told
    assert f"not scored {drawn[1].key}" in told
    assert f"not scored {drawn[2].key}: mask of 5x5" in told
    drawn[3].mask.write_bytes(b"no mask")
    with pytest.raises(
        cw.ClearwingError, match="--calibrate: 4; none of the masks drawn for it fits its picture; mend them"
    ) as caught:
        call()
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_block_does_not_change_the_choice(found, trained, photos, batch_size):
    one = Recipe("layer-cam", layers=1, threshold="mean", finest=64)
    two = replace(one, threshold="percentile:90")
    assert found(one, [one, two], batch_size=batch_size) == found(one, [one, two])
