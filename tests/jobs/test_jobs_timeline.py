"""The timeline: fixed pictures, true maps and IoU, a model left as it was, files that a resumed run goes on with."""

import contextlib

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu

from clearwing.attribution.methods import explain
from clearwing.config import ReportConfig
from clearwing.data.loader import load_pictures
from clearwing.data.preprocess import fit_geometry
from clearwing.data.sources import Sample, open_data
from clearwing.jobs import report_seen
from clearwing.jobs import timeline as T
from clearwing.models.zoo import build
from clearwing.run import Run, write_json
from clearwing.types import IGNORE, ClearwingError


@pytest.fixture(scope="module")
def samples(drawn):
    return [
        Sample(f"val/{i}.png", image, int(label), (mask * 255).astype(np.uint8))
        for i, (image, label, mask) in enumerate(zip(*drawn, strict=True))
    ]


@pytest.fixture(scope="module")
def pictures(samples):
    return load_pictures(samples, 32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("resnet8", 3, class_names=("a", "b", "c"), widths=(4, 8, 8))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, {})


def finished(run, *epochs):
    run.write_metrics({"epoch": epoch} for epoch in epochs)
    return T.read_timeline(run)


class Board:
    def __init__(self):
        self.images = []

    def image(self, name, picture, epoch):
        self.images.append((name, picture, epoch))


@pytest.mark.parametrize(
    ("labels", "count", "counts"),
    [
        ([0] * 20 + [1] * 3 + [2] * 4, 9, [3, 3, 3]),
        ([0] * 20 + [1] * 1 + [2] * 4, 9, [4, 1, 4]),
        ([0, 1, 2], 50, [1, 1, 1]),
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, [1, 0, 1, 0]),  # more classes than pictures: spread over the classes
    ],
)
def test_pictures_are_spread_over_the_classes(labels, count, counts):
    labels = torch.tensor(labels)
    found = T.over_classes(labels, torch.arange(len(labels)), count)
    assert len(set(found)) == len(found)
    assert labels[found].bincount(minlength=len(counts)).tolist() == counts


def test_pictures_are_chosen_among_those_given():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert T.over_classes(labels, torch.tensor([1, 3, 6]), 2) == [1, 6]
    assert T.over_classes(labels, torch.tensor([], dtype=torch.int64), 2) == []


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_a_mask_comes_to_the_networks_size_like_its_picture(fit):
    mask = torch.from_numpy(np.random.default_rng(0).choice([0, 1, IGNORE], (30, 18)).astype(np.uint8))
    place = fit_geometry(30, 18, (10, 12), fit)
    found = T.fit_mask(mask, place)
    for i in range(10):
        for j in range(12):
            row = int(np.floor(place.top + (i + 0.5) * place.box_height / 10))
            column = int(np.floor(place.left + (j + 0.5) * place.box_width / 12))
            inside = 0 <= row < 30 and 0 <= column < 18
            assert found[i, j] == (mask[row, column] if inside else IGNORE)
    assert bool((found[:, 0] == IGNORE).all()) == (fit == "pad")


def test_maps_are_the_grad_cam_of_the_true_class(pictures, model, run):
    timeline = T.Timeline(run, pictures, 6, masks=0)
    assert timeline.after_epoch(model, 1) == {}
    (glance,) = finished(run, 1)
    at = [pictures.keys.index(key) for key in glance.keys]
    assert pictures.labels[at].bincount().tolist() == [2, 2, 2]
    batch = next(pictures.subset(at).batches(6))
    wanted = explain(model.eval(), batch, "grad-cam", target="label")
    assert glance.layer == wanted.layer
    torch.testing.assert_close(T.upsample(glance.maps, 32, 32), wanted.maps[:, 0])
    torch.testing.assert_close(glance.logits, wanted.logits)
    torch.testing.assert_close(glance.probabilities, wanted.probabilities[range(6), batch.labels])
    assert glance.mask_iou is None


def test_mask_iou_is_that_of_each_maps_own_otsu_threshold(pictures, samples, model, run, drawn):
    some = 12
    result = T.Timeline(run, pictures, 1, masks=some).after_epoch(model, 1)
    labels, chosen = pictures.labels, []
    for label in range(3):  # as many of each class, evenly
        own = (labels == label).nonzero().flatten().tolist()
        chosen += [own[k * len(own) // 4] for k in range(4)]
    wanted = explain(model.eval(), next(pictures.subset(chosen).batches(some)), "grad-cam", target="label")
    values, centre = [], []
    bump = np.exp(-(((np.arange(32) + 0.5) / 32 - 0.5) ** 2) / (2 * 0.25**2))
    for i, cam in zip(chosen, wanted.maps[:, 0].numpy(), strict=True):
        truth = T.fit_mask(torch.from_numpy(drawn[2][i].astype(np.uint8)), pictures.geometry[i]).numpy() == 1
        for heat, to in ((cam, values), (np.outer(bump, bump).astype(np.float32), centre)):
            mask = heat > threshold_otsu(heat)
            to.append((mask & truth).sum() / (mask | truth).sum())
    assert result["mask_iou"] == pytest.approx(np.mean(values), abs=1e-6)
    (glance,) = finished(run, 1)
    assert glance.baseline == pytest.approx(np.mean(centre), abs=1e-6)
    assert len(glance.iou) == some


def test_many_pictures_take_several_passes_to_the_same_end(pictures, model, run, monkeypatch):
    whole = T.Timeline(run, pictures, 4).look(model, 1)
    monkeypatch.setattr(T, "BATCH", 5)
    parts = T.Timeline(run, pictures, 4).look(model, 1)
    torch.testing.assert_close(parts.maps, whole.maps)
    torch.testing.assert_close(parts.iou, whole.iou)
    assert not run.file("timeline").exists()


def test_the_model_is_left_as_it_was(pictures, model, run):
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    frozen.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    T.Timeline(run, pictures, 3, autocast=lambda: torch.autocast("cpu", torch.bfloat16)).after_epoch(model, 1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad.eq(1).all() and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_fails_gets_its_modes_back(model):
    model.train()
    with contextlib.suppress(KeyError), T.evaluating(model):
        assert not model.training
        raise KeyError
    assert all(module.training for module in model.modules())


def test_a_resumed_run_goes_on_and_an_epoch_done_again_is_replaced(pictures, model, run):
    first = T.Timeline(run, pictures, 3)
    for epoch in range(3):
        first.after_epoch(model, epoch)
    other = build("resnet8", 3, widths=(4, 8, 8))
    again = T.Timeline(run, pictures, 3)
    for epoch in (2, 3, 4):
        again.after_epoch(other, epoch)
    found = finished(run, 1, 2, 3)  # the fourth epoch was not finished: it is not in the metrics
    assert [one.epoch for one in found] == [0, 1, 2, 3]
    assert torch.equal(found[0].maps, found[1].maps)
    assert torch.equal(found[2].maps, found[3].maps)
    assert not torch.equal(found[1].maps, found[2].maps)
    assert found[0].baseline == found[3].baseline
    assert sorted(file.name for file in run.file("timeline").iterdir())[0] == "epoch_0000.safetensors"


def test_epochs_that_show_other_pictures_are_not_mixed_in(pictures, model, run):
    T.Timeline(run, pictures, 3).after_epoch(model, 1)
    T.Timeline(run, pictures, 6).after_epoch(model, 2)
    assert [one.epoch for one in finished(run, 1, 2)] == [2]


def test_nothing_yet_and_a_broken_file(run):
    assert finished(run) == []
    run.file("timeline").mkdir()
    run.file("timeline", "epoch_0001.safetensors").write_bytes(b"torn")
    with pytest.raises(ClearwingError, match=r"epoch_0001\.safetensors; is broken"):
        T.read_timeline(run)


def test_a_new_run_deletes_the_timeline_alone(pictures, model, run):
    T.Timeline(run, pictures, 1).after_epoch(model, 1)
    mine = run.file("timeline", "notes.txt")
    mine.write_text("mine")
    run.clear()
    assert list(run.file("timeline").iterdir()) == [mine]


def test_the_board_is_given_a_picture(pictures, model, run):
    board = Board()
    T.Timeline(run, pictures, 3, board=board).after_epoch(model, 7)
    ((name, picture, epoch),) = board.images
    assert (name, epoch, picture.dtype, picture.ndim) == ("where it looks", 7, np.uint8, 3)
    assert picture.std() > 20


def test_masks_that_do_not_fit_are_left_out(samples, model, run):
    broken = [
        samples[0],
        Sample("small", samples[1].source, samples[1].label, np.ones((5, 5), np.uint8)),
        Sample("empty", samples[2].source, samples[2].label, np.zeros_like(samples[2].mask)),
        Sample("none", samples[3].source, samples[3].label),
    ]
    timeline = T.Timeline(run, load_pictures(broken, 32), 1)
    assert len(timeline.masked) == 1
    assert set(timeline.after_epoch(model, 1)) == {"mask_iou"}


def test_what_cannot_be_meant_is_refused(samples, pictures, model, run):
    with pytest.raises(ClearwingError, match="--explain: 0; give at least 1 picture"):
        T.Timeline(run, pictures, 0)
    unlabelled = load_pictures([Sample("a", samples[0].source)], 32)
    with pytest.raises(ClearwingError, match="--explain: 3; the watched pictures have no labels"):
        T.Timeline(run, unlabelled, 3)
    one_place = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3)).train()
    with pytest.raises(ClearwingError, match="no layer has more than one place"):
        T.Timeline(run, pictures, 3).after_epoch(one_place, 0)
    assert one_place.training


def test_the_report_draws_epochs_from_the_first_to_the_last(photos, model, run):
    run.config = {
        "train": {"data": str(photos), "out": "x", "fit": "crop"},
        "resolved": {"watch": "val", "size": 32},
        "data": {"where": str(photos)},
    }
    write_json(run.file("classes.json"), ["species_0", "species_1", "species_2"])
    pictures = load_pictures(open_data(str(photos)).splits["val"], 32, fit="crop")
    timeline = T.Timeline(run, pictures, 3)
    for epoch in range(21):
        timeline.after_epoch(model, epoch)
    glances = finished(run, *range(1, 21))
    found = report_seen.timeline(run, ReportConfig(run="x"))
    assert [row.true for row in found.rows] == ["species_0", "species_1", "species_2"]
    assert found.rows[0].key == glances[0].keys[0]
    for i, row in enumerate(found.rows):
        assert list(row.looks) == [0, 3, 6, 9, 11, 14, 17, 20]
        assert row.picture.shape == (40, 56, 3)  # in its own pixels
        overlay, share = row.looks[20]
        assert share == pytest.approx(float(glances[-1].probabilities[i]))
        grey = row.picture @ np.array([0.299, 0.587, 0.114], np.float32)
        calm = 0.4 * row.picture + 0.6 * grey[..., None]
        assert np.abs(overlay[:, :8] - calm[:, :8]).max() <= 1  # the network did not see beside its square
        tinted = np.abs(overlay[:, 8:48] - calm[:, 8:48]).max() > 50
        assert tinted == bool((glances[-1].maps[i] > 0).any())  # a map without evidence leaves the picture plain
    assert (glances[-1].maps > 0).any()
    assert found.mask_iou == {one.epoch: one.mask_iou for one in glances}
    assert found.masked == len(timeline.masked) > 0
    run.config["data"]["where"] = str(photos / "gone")
    assert report_seen.timeline(run, ReportConfig(run="x")).rows == ()


def test_a_run_without_a_timeline_has_none_in_its_report(run):
    assert report_seen.timeline(run, ReportConfig(run="x")) is None
