"""The second course: what the voters say, what a decoder learns of it, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import clearwing as cw
from clearwing.jobs import decoder, inputs
from clearwing.jobs.decoder import (
    CUTS,
    Course,
    decoder_of,
    has_decoder,
    new_decoder,
    revised,
    taught,
    teach,
    trained_decoder,
    votes,
)
from clearwing.jobs.maskers import explained, fitted
from clearwing.jobs.progress import Progress
from clearwing.masks.pipeline import VOTERS, segment_with
from clearwing.masks.refine import clean, grabcut, likely_seeds
from clearwing.train.devices import make_fabric
from clearwing.train.fit import FitState
from clearwing.train.masks import with_masks

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHORT = Course(pictures=9, rounds=2, steps=3, batch=4, width=4)


@pytest.fixture(scope="module")
def progress():
    with Progress(quiet=True) as quiet:
        yield quiet


@pytest.fixture
def copy(trained, tmp_path):
    return cw.Run.load(shutil.copytree(trained, tmp_path / "copy"))


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# The voters.


@pytest.mark.parametrize("batch_size", [2, 32])
def test_the_votes_are_the_voters_own_masks(trained, photos, progress, batch_size):
    model = cw.Run.load(trained).model
    samples = cw.open_data(photos).splits["val"][:5]
    pictures, fine = (cw.load_pictures(samples, side, fit="squash") for side in (32, VOTERS[0].side(32)))
    shares, agreement = votes(model, pictures, fine, CPU, progress, batch_size)
    assert shares.shape == (5, 32, 32)
    assert agreement.shape == (5,)

    [batch], [finer] = pictures.batches(5), fine.batches(5)
    masks = []
    for voter in VOTERS:
        recipe, layers = fitted(voter, model, batch.images)
        masks.append(segment_with(recipe, explained(model, recipe, batch, layers), finer).masks.bool())
    expected = torch.stack(masks).float().mean(0)
    expected = torch.nn.functional.interpolate(expected[:, None], (32, 32), mode="bilinear", antialias=True)[:, 0]
    torch.testing.assert_close(shares, expected.clamp(0, 1), atol=1e-5, rtol=0)
    for i in range(5):
        both = [(a[i] & b[i]).sum() / (a[i] | b[i]).sum() for k, a in enumerate(masks) for b in masks[k + 1 :]]
        assert agreement[i].item() == pytest.approx(sum(both).item() / len(both), abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 32])
def test_revised_masks_are_the_decoders_own_and_their_cuts(trained, photos, progress, batch_size):
    samples = cw.open_data(photos).splits["val"][:5]
    pictures, fine = (cw.load_pictures(samples, side, fit="squash") for side in (32, VOTERS[0].side(32)))
    segmenter = new_decoder(cw.Run.load(trained).model, pictures, CPU, 4).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(segmenter.decoder.head.weight, std=30)
    with torch.no_grad():  # half of the places are foreground
        images = next(pictures.batches(5)).images
        segmenter.decoder.head.bias.sub_(segmenter.decoder(segmenter.features(images)[1]).median())
    fabric = make_fabric("cpu", "float32")
    shares, agreement = revised(segmenter, pictures, fine, fabric, progress, batch_size)

    [batch], [finer] = pictures.batches(5), fine.batches(5)
    with torch.inference_mode():
        plain = segmenter(batch.images, finer.images)[1].sigmoid()
        mirrored = segmenter(batch.images.flip(3), finer.images.flip(3))[1].sigmoid().flip(2)
    likely = (plain + mirrored) / 2
    masks, failed = [likely > 0.5], torch.zeros(5, dtype=torch.bool)
    for foreground, background in CUTS:
        codes = likely_seeds(likely, sure_foreground=foreground, sure_background=background)
        cut, fell_back = grabcut(finer.images, codes)
        failed |= fell_back
        masks.append(clean(cut, likely, share=0.2, fill=True))
    assert 0 < failed.sum() < 5
    assert 0 < masks[0].float().mean() < 1
    assert not torch.equal(masks[0], masks[1])
    expected = torch.stack(masks).float().mean(0)
    expected = torch.nn.functional.interpolate(expected[:, None], (32, 32), mode="bilinear", antialias=True)[:, 0]
    torch.testing.assert_close(shares, expected.clamp(0, 1), atol=1e-5, rtol=0)
    for i in range(5):  # a cut that fell back repeats the decoder: it agrees with nobody
        pairs = [cw.iou(a[i : i + 1], b[i : i + 1]) for k, a in enumerate(masks) for b in masks[k + 1 :]]
        expected = 0.0 if failed[i] else float(sum(pairs)) / len(pairs)
        assert agreement[i].item() == pytest.approx(expected, abs=1e-5)


# The lessons.


@pytest.fixture(scope="module")
def lesson(drawn, trained, progress):
    """Drawn pictures with their true masks, and the features of an untrained, wider network to tell them by."""
    from clearwing.data.loader import Pictures
    from clearwing.data.sources import Sample
    from clearwing.types import Geometry

    images, labels, masks = (torch.as_tensor(values) for values in drawn)
    n, height, width = masks.shape
    pictures = Pictures(
        images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last),
        labels.long(),
        tuple(Sample(str(i), b"") for i in range(n)),
        tuple(Geometry(height, width, 0, 0, height, width, (height, width)) for _ in range(n)),
    )
    torch.manual_seed(0)
    model = cw.build("resnet8", 3, widths=(8, 12, 16)).eval()
    return model, pictures, masks


def mean_iou(segmenter, pictures, masks):
    [batch] = pictures.batches(len(pictures))
    with torch.inference_mode():
        return float(cw.iou((segmenter(batch.images)[1] > 0).byte(), masks.byte()).mean())


def test_a_decoder_learns_the_masks_it_is_taught(lesson, progress):
    model, pictures, masks = lesson
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taught = with_masks(pictures, masks.float(), torch.ones(len(masks)))
    course = Course(steps=90, batch=9, width=12, lr=1e-2, ema=0.9)
    untrained = new_decoder(model, pictures, CPU, course.width)
    start = {name: value.clone() for name, value in untrained.state_dict().items()}
    segmenter = trained_decoder(untrained, taught, make_fabric("cpu", "float32"), course, progress)
    assert all(torch.equal(value, start[name]) for name, value in untrained.state_dict().items())
    assert not any(part.training for part in segmenter.modules())
    assert segmenter.decoder.width == 12
    assert (segmenter.head, segmenter.decoder.channels) == ("fc", (9, 13, 18))  # with the evidence of the class
    everything = float(cw.iou(torch.ones_like(masks.byte()), masks.byte()).mean())
    assert mean_iou(segmenter, pictures, masks) > max(0.5, everything + 0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_of_a_network_with_another_head_the_features_have_to_do(lesson, progress):
    _, pictures, _ = lesson
    torch.manual_seed(0)
    model = cw.build("resnet8", 3, widths=(8, 12, 16)).eval()
    model.backbone.fc = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    new = new_decoder(model, pictures, CPU, SHORT.width)
    assert (new.head, new.decoder.channels) == (None, (8, 12, 16))
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "say", said.append)
        course, fabric = replace(SHORT, steps=1), make_fabric("cpu", "float32")
        segmenter, _ = next(taught(model, pictures, pictures, fabric, course, progress))
    assert said[0].startswith("note: no linear head takes the mean of the last features")
    assert (segmenter.head, segmenter.decoder.channels) == (None, (8, 12, 16))


def test_what_has_no_weight_teaches_nothing(lesson, progress):
    model, pictures, masks = lesson
    fabric, course = make_fabric("cpu", "float32"), replace(SHORT, steps=2, batch=18)
    trust = torch.ones(len(masks))
    trust[::2] = 0
    wrong = masks.float().clone()
    wrong[::2] = 1 - wrong[::2]
    new = new_decoder(model, pictures, CPU, course.width)
    one = trained_decoder(new, with_masks(pictures, masks.float(), trust), fabric, course, progress)
    two = trained_decoder(new, with_masks(pictures, wrong, trust), fabric, course, progress)
    other = trained_decoder(new, with_masks(pictures, wrong, torch.ones(len(masks))), fabric, course, progress)
    for a, b in zip(one.decoder.parameters(), two.decoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert not same(one.decoder, other.decoder)


def test_a_seed_repeats_it_and_the_callers_numbers_stay(lesson, progress):
    model, pictures, masks = lesson
    taught, fabric = with_masks(pictures, masks.float(), torch.ones(len(masks))), make_fabric("cpu", "float32")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    new = new_decoder(model, pictures, CPU, SHORT.width)
    one = trained_decoder(new, taught, fabric, SHORT, progress)
    assert torch.equal(torch.rand(3), expected)
    two = trained_decoder(new_decoder(model, pictures, CPU, SHORT.width), taught, fabric, SHORT, progress)
    three = trained_decoder(new, taught, fabric, SHORT, progress, seed=1)
    assert same(one.decoder, two.decoder)
    assert not same(one.decoder, three.decoder)


# A run's decoder.


def test_teaching_leaves_the_decoder_and_what_it_was_taught(copy, progress):
    before = (copy.path / "model.safetensors").read_bytes()
    segmenter = teach(copy, "cpu", progress, course=SHORT)
    assert same(copy.load_segmenter(), segmenter.cpu())
    about = copy.decoder_about()
    assert about["weights_sha256"] == inputs.weights_hash(copy)
    assert (about["pictures"], about["masks_used"]) == (9, 0)
    assert [sorted(told) for told in about["rounds"]] == [["agreement", "without_mask"]] * 2
    assert all(0 <= told["agreement"] <= 1 for told in about["rounds"])
    assert about["course"] == vars(SHORT)
    assert (copy.path / "model.safetensors").read_bytes() == before


def test_no_drawn_mask_is_read(copy, photos, tmp_path, progress):
    data = shutil.copytree(photos, tmp_path / "photos")
    shutil.rmtree(data / "val")
    for mask in (data / "MASKS").rglob("*.png"):
        mask.write_bytes(b"no mask")
    config = json.loads((copy.path / "config.json").read_text())
    config["data"]["where"] = str(data)
    (copy.path / "config.json").write_text(json.dumps(config))
    teach(cw.Run.load(copy.path), "cpu", progress, course=SHORT)


def test_masks_count_by_their_agreement_and_where_there_is_none_not_at_all(copy, monkeypatch, progress):
    seen = []

    def some(model, pictures, *_):
        shares = torch.zeros(len(pictures), 32, 32)
        shares[3:, 8:20, 8:20] = 1.0
        agreement = torch.ones(len(pictures))  # where all are empty, all agree
        agreement[4] = 0.5
        return shares, agreement

    def kept(segmenter, pictures, *rest, seed):
        seen.append(pictures)
        assert seed == len(seen)  # every round changes the pictures in other ways
        return trained_decoder(segmenter, pictures, *rest, seed=seed)

    monkeypatch.setattr(decoder, "votes", some)
    monkeypatch.setattr(decoder, "revised", some)
    monkeypatch.setattr(decoder, "trained_decoder", kept)
    teach(copy, "cpu", progress, course=SHORT)
    weights = [round(255 * 0.5**SHORT.trust) if i == 4 else 255 * (i > 2) for i in range(9)]
    assert [seen[0].images[i, -1].unique().tolist() for i in range(9)] == [[weight] for weight in weights]
    assert len(seen) == SHORT.rounds
    assert copy.decoder_about()["rounds"][0]["without_mask"] == 3


def test_a_network_that_shows_nothing_has_nothing_to_teach(copy, monkeypatch, progress):
    empty = torch.zeros(9, 32, 32), torch.ones(9)
    monkeypatch.setattr(decoder, "votes", lambda *_: empty)
    with pytest.raises(cw.ClearwingError, match="the network gives no mask to teach with; train it longer"):
        teach(copy, "cpu", progress, course=SHORT)
    assert copy.decoder_about() is None


def test_training_pictures_that_are_gone_are_named(copy, tmp_path, progress):
    config = json.loads((copy.path / "config.json").read_text())
    config["data"]["where"] = str(tmp_path / "gone")
    (copy.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(cw.ClearwingError, match=r"the run.s training pictures, which are not at .*gone any more"):
        teach(cw.Run.load(copy.path), "cpu", progress, course=SHORT)


def test_a_decoder_is_of_the_weights_it_was_trained_on(copy, monkeypatch, progress):
    taught = []

    def counted(run, *args):
        taught.append(run)
        teach(run, *args, course=SHORT)

    monkeypatch.setattr(decoder, "teach", counted)
    assert not has_decoder(copy)
    decoder_of(copy, "cpu", False, progress)
    decoder_of(copy, "cpu", False, progress)
    assert has_decoder(copy)
    assert len(taught) == 1
    decoder_of(copy, "cpu", True, progress)
    assert len(taught) == 2
    copy.model.mean.add_(0.01)
    copy.save_weights(copy.model.state_dict())
    assert not has_decoder(copy)
    decoder_of(copy, "cpu", False, progress)
    assert has_decoder(copy)
    assert len(taught) == 3


@pytest.fixture
def revision(monkeypatch):
    """Revised masks of a decoder that has hardly learned anything: as if all were well."""

    def some(segmenter, pictures, *_):
        shares = torch.zeros(len(pictures), 32, 32)
        shares[:, 8:20, 8:20] = 1.0
        return shares, torch.ones(len(pictures))

    monkeypatch.setattr(decoder, "revised", some)


def test_where_no_revised_mask_is_of_use_the_decoder_stays(copy, monkeypatch, capsys):
    monkeypatch.setattr(decoder, "revised", lambda *_: (torch.ones(9, 32, 32), torch.full((9,), 0.2)))
    with Progress() as told:
        teach(copy, "cpu", told, course=SHORT)
    assert "no revised mask is fit to learn from: the decoder stays as it is" in capsys.readouterr().err
    assert [told["agreement"] for told in copy.decoder_about()["rounds"]][1] == pytest.approx(0.2)
    assert has_decoder(copy)


def test_an_interrupted_round_is_not_taken_for_a_whole_one(copy, monkeypatch, progress):
    monkeypatch.setattr(decoder, "fit", lambda *_, **more: FitState(interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        teach(copy, "cpu", progress, course=SHORT)
    assert copy.decoder_about() is None


def test_a_course_that_is_broken_off_goes_on_with_the_next_round(copy, revision, monkeypatch, capsys):
    calls = []

    def once(segmenter, pictures, *rest, **options):
        calls.append(segmenter)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained_decoder(segmenter, pictures, *rest, **options)

    monkeypatch.setattr(decoder, "trained_decoder", once)
    monkeypatch.setattr(decoder, "teach", lambda run, *args: teach(run, *args, course=SHORT))
    with Progress() as told:
        with pytest.raises(KeyboardInterrupt):
            decoder_of(copy, "cpu", False, told)
        [first] = copy.decoder_about()["rounds"]
        left = copy.load_segmenter()
        assert not has_decoder(copy)
        decoder_of(copy, "cpu", False, told)
    assert "note: the decoder's training was broken off; it goes on with the next round" in capsys.readouterr().err
    assert len(calls) == 3
    assert same(calls[2].cpu(), left)
    assert has_decoder(copy)
    assert copy.decoder_about()["rounds"][0] == first
    left = copy.load_segmenter()
    monkeypatch.setattr(decoder, "votes", lambda *_: (torch.zeros(9, 32, 32), torch.ones(9)))
    with pytest.raises(cw.ClearwingError, match="the network gives no mask"):
        decoder_of(copy, "cpu", True, Progress(True))
    assert same(copy.load_segmenter(), left)  # what is there stays until there is another
    monkeypatch.setattr(decoder, "votes", votes)
    decoder_of(copy, "cpu", True, Progress(True))  # anew from the start
    assert len(calls) == 5
    assert not same(calls[3], left)
