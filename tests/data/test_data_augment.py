"""Augmentation draws per picture, from its generator alone, and does what its name says."""

import json
from dataclasses import asdict

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from clearwing.data import augment as A
from clearwing.data import auto
from clearwing.data.augment import Augment, Draw
from clearwing.types import ClearwingError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=32, channels=3, side=12, seed=0):
    return torch.rand(count, channels, side, side, generator=seeded(seed))


EVERYTHING = Augment(
    resized_crop=(0.4, 1.0),
    size=10,
    crop_padding=2,
    flip=0.5,
    vertical_flip=0.5,
    rotation=15,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    cutout=4,
)
ALL_SORTS = {
    "everything": EVERYTHING,
    "crop, alternating, trivial": Augment(crop_padding=2, alternate_flip=True, auto="trivial", cutout=4),
    "crop to size, alternating, rand": Augment(resized_crop=(0.4, 1.0), size=10, alternate_flip=True, auto="rand"),
    "size alone": Augment(size=7),
}


def draw(count, total=None, first=0, epoch=0, seed=0):
    """The Draw of pictures first : first + count of a batch of `total`, which lies at 100 in the data set."""
    return Draw(seeded(7), total or count, first, torch.arange(100 + first, 100 + first + count), epoch, seed)


def coarse(images):
    return (images * 255).to(torch.uint8)


def assert_same(got, wanted, atol=1e-6):
    """Equal but for pixels that `auto` rounds to 8 bits the other way; another decision would change whole pictures."""
    assert got.shape == wanted.shape
    assert ((got - wanted).abs() > atol).double().mean() < 0.02


@pytest.mark.parametrize("mode", ["reflect", "zero"])
def test_random_crop_is_a_window_of_the_padded_picture(mode):
    images = noise(16)
    cropped = A.random_crop(images, seeded(), 3, mode)
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="reflect" if mode == "reflect" else "constant")
    places = set()
    for picture, wide in zip(cropped, padded, strict=True):
        windows = wide.unfold(1, 12, 1).unfold(2, 12, 1)  # (C, 7, 7, 12, 12)
        hits = (windows == picture[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
        assert len(hits) == 1
        places.add(tuple(hits[0]))
    assert len(places) > 8  # drawn per picture


def test_random_crop_refuses_what_it_cannot_do():
    with pytest.raises(ClearwingError, match="crop_padding: 12; give 0 to 11"):
        A.random_crop(noise(1), seeded(), 12)
    with pytest.raises(ClearwingError, match="padding_mode: edge; choose one of reflect, zero"):
        A.random_crop(noise(1), seeded(), 1, "edge")


def test_random_resized_crop_keeps_scale_and_ratio():
    # a picture whose two channels are the coordinates tells where its crop lies
    line = (torch.arange(64) + 0.5) / 64
    coordinates = torch.stack([line[:, None].expand(64, 64), line.expand(64, 64)])
    crops = A.random_resized_crop(coordinates.expand(200, 2, 64, 64), seeded(), 16, (0.3, 0.6), (0.8, 1.25))
    height = (crops[:, 0, -1, 8] - crops[:, 0, 0, 8]) * 16 / 15
    width = (crops[:, 1, 8, -1] - crops[:, 1, 8, 0]) * 16 / 15
    area, ratio = height * width, width / height
    assert area.min() > 0.25
    assert area.max() < 0.65
    assert area.std() > 0.04
    assert ratio.min() > 0.75
    assert ratio.max() < 1.35
    assert crops[:, 0, 0, 0].unique().numel() > 10


def test_a_full_crop_of_ratio_one_is_the_picture_and_flip_mirrors_it():
    images = noise(8)
    torch.testing.assert_close(A.random_resized_crop(images, seeded(), 12, (1, 1), (1, 1)), images)
    torch.testing.assert_close(A.random_resized_crop(images, seeded(), 12, (1, 1), (1, 1), flip=1.0), images.flip(3))


@pytest.mark.parametrize(("scale", "ratio", "named"), [((0, 1), (1, 1), "scale"), ((0.5, 1), (2, 1), "ratio")])
def test_random_resized_crop_names_a_wrong_range(scale, ratio, named):
    with pytest.raises(ClearwingError, match=named):
        A.random_resized_crop(noise(1), seeded(), 4, scale, ratio)


@pytest.mark.parametrize("vertical", [False, True])
def test_flip_mirrors_some_pictures_whole(vertical):
    images = noise(64)
    flipped = A.random_flip(images, seeded(), 0.5, vertical)
    turned = [not torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    assert 16 < sum(turned) < 48
    mirrored = images.flip(2 if vertical else 3)
    for i, was in enumerate(turned):
        assert torch.equal(flipped[i], mirrored[i] if was else images[i])


def test_rotation_turns_about_the_centre(monkeypatch):
    monkeypatch.setattr(A, "_uniform", lambda count, low, high, generator, like: like.new_full((count,), high))
    images = noise(2, 3, 13)
    torch.testing.assert_close(A.random_rotation(images, seeded(), 180), images.flip(2, 3), atol=1e-4, rtol=0)
    quarter = A.random_rotation(images, seeded(), 90)
    assert torch.allclose(quarter, images.rot90(1, (2, 3)), atol=1e-4) or torch.allclose(
        quarter, images.rot90(-1, (2, 3)), atol=1e-4
    )
    # on a picture that is not square, lengths stay: a centred square stays a square
    wide = torch.zeros(1, 1, 21, 41)
    wide[:, :, 7:14, 17:24] = 1
    turned = A.random_rotation(wide, seeded(), 90)
    torch.testing.assert_close(turned[..., 10:31], wide[..., 10:31], atol=1e-3, rtol=0)


@pytest.mark.parametrize("side", [4, 5])
def test_cutout_covers_a_square_with_the_fill(side):
    images = noise(200) * 0.5
    covered = A.cutout(images, seeded(), side, (0.9, 0.8, 0.7))
    changed = (covered != images).all(1)  # (N, H, W)
    assert changed.sum((1, 2)).max() == side * side
    assert changed.sum((1, 2)).min() < side * side  # partly outside
    assert torch.equal(covered.permute(0, 2, 3, 1)[changed].unique(dim=0), torch.tensor([[0.9, 0.8, 0.7]]))
    assert changed.any(0).all()  # the centre lies anywhere, the border included
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(rows * columns, changed.sum((1, 2)))  # one full rectangle


def test_cutout_takes_the_mean_of_each_picture_unless_told():
    images = noise(4)
    covered = A.cutout(images, seeded(), 24)
    torch.testing.assert_close(covered[:, :, 6, 6], images.mean((2, 3)))
    with pytest.raises(ClearwingError, match="fill"):
        A.cutout(images, seeded(), 4, (0.5, 0.5))


def one_factor(monkeypatch, factor):
    monkeypatch.setattr(A, "_uniform", lambda count, low, high, generator, like: like.new_full((count,), factor))


def test_brightness_and_saturation_are_torchvisions(monkeypatch):
    images = noise(3) * 0.5
    one_factor(monkeypatch, 1.4)
    torch.testing.assert_close(A.colour_jitter(images, seeded(), brightness=0.5), TF.adjust_brightness(images, 1.4))
    got, wanted = A.colour_jitter(images, seeded(), saturation=0.5), TF.adjust_saturation(images, 1.4)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)  # torchvision's luma weights are rounded to 4 digits
    got, wanted = A.colour_jitter(images, seeded(), contrast=0.5), TF.adjust_contrast(images, 1.4)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


def test_hue_keeps_the_luma_and_a_full_turn_is_nothing(monkeypatch):
    images = noise(3) * 0.4 + 0.3
    luma = torch.tensor(A.LUMA)
    one_factor(monkeypatch, 0.05)
    turned = A.colour_jitter(images, seeded(), hue=0.1)
    assert (turned - images).abs().max() > 0.02
    lumas = [torch.einsum("nchw,c->nhw", x, luma) for x in (turned, images)]
    torch.testing.assert_close(*lumas, atol=1e-4, rtol=0)
    one_factor(monkeypatch, 1.0)
    torch.testing.assert_close(A.colour_jitter(images, seeded(), hue=0.1), images, atol=1e-4, rtol=0)


def test_jitter_of_grey_pictures_and_its_range():
    jittered = A.colour_jitter(noise(16, 1), seeded(), 0.9, 0.9, 0.9, 0.5)
    assert jittered.shape == (16, 1, 12, 12)
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert torch.equal(A.colour_jitter(noise(4, 1), seeded(), saturation=0.5), noise(4, 1))


def test_everything_at_once_repeats_by_seed_and_leaves_the_global_generator():
    images = noise(8)
    kept = images.clone()
    state = torch.get_rng_state()
    first, second, other = (EVERYTHING(images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (8, 3, 10, 10)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_none_draws_nothing_and_costs_nothing():
    images, generator = noise(2), seeded()
    state = generator.get_state()
    assert Augment.none()(images, generator) is images
    assert torch.equal(generator.get_state(), state)


def test_size_alone_brings_the_picture_to_the_network():
    images = noise(2)
    wanted = TF.resize(images, [6, 6], antialias=True)
    torch.testing.assert_close(Augment(size=6)(images, seeded()), wanted, atol=1e-4, rtol=0)


def test_settings_survive_json():
    assert Augment(**json.loads(json.dumps(asdict(EVERYTHING)))).size == 10
    again = Augment(**json.loads(json.dumps(asdict(EVERYTHING))))
    images = noise(4)
    assert torch.equal(again(images, seeded()), EVERYTHING(images, seeded()))


@pytest.mark.parametrize("augment", ALL_SORTS.values(), ids=ALL_SORTS)
def test_a_batch_in_two_parts_is_the_whole_batch(augment):
    images = coarse(noise(9))
    whole = augment(images, draw(9))
    parts = [augment(images[first : first + 4], draw(4, 9, first)) for first in (0, 4)]
    assert_same(torch.cat(parts), whole[:8])  # the ninth belongs to nobody


@pytest.mark.parametrize("augment", ALL_SORTS.values(), ids=ALL_SORTS)
def test_pictures_of_8_bits_come_out_as_floats_do(augment):
    images = coarse(noise(6))
    kept = images.clone()
    got = augment(images, draw(6))
    assert got.dtype == torch.float32
    assert torch.equal(images, kept)
    resized = augment.resized_crop or augment.size  # pictures of 8 bits may be resized to 8 bits
    assert_same(got, augment(images.float() / 255, draw(6)), atol=3 / 255 if resized else 1e-6)


def test_alternating_mirrors_every_picture_once_in_two_epochs():
    images = noise(64)
    augment = Augment(alternate_flip=True)
    epochs = [augment(images, draw(64, epoch=epoch)) for epoch in range(4)]
    mirrored = torch.stack([(seen != images).flatten(1).any(1) for seen in epochs])
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[:2], mirrored[2:])
    assert 20 < mirrored[0].sum() < 44
    for i, was in enumerate(mirrored[0]):
        assert torch.equal(epochs[0][i], images[i].flip(2) if was else images[i])
    assert not torch.equal(A.alternating(draw(64)), A.alternating(draw(64, seed=1)))
    cropped = Augment(resized_crop=(1, 1), ratio=(1, 1), alternate_flip=True)(images, draw(64))
    torch.testing.assert_close(cropped, epochs[0], atol=1e-5, rtol=0)


def test_alternating_is_a_fair_coin_of_each_place_and_needs_the_places():
    one = Draw(seeded(), 50_000, 0, torch.arange(50_000), 0)
    coin = A.alternating(one).double()
    assert abs(coin.mean() - 0.5) < 0.01  # 4.5 deviations
    assert abs((coin[1:] == coin[:-1]).double().mean() - 0.5) < 0.01
    with pytest.raises(ClearwingError, match="alternate_flip: True; it needs"):
        Augment(alternate_flip=True)(noise(2), seeded())


TORCHVISIONS = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}


@pytest.mark.parametrize("policy", TORCHVISIONS)
def test_the_operations_of_auto_are_torchvisions(policy):
    smooth = torch.nn.functional.interpolate(noise(4, 3, 5), (24, 20), mode="bicubic").clamp(0, 1)
    images = coarse(smooth)
    peer = TORCHVISIONS[policy]()
    space = peer._AUGMENTATION_SPACE
    assert len(space) == len(auto.OPERATIONS)
    reach = auto.reaches(policy, 24, 20)
    bins = torch.tensor([0, 9, 14, 30])
    for place, (name, (magnitudes, signed)) in enumerate(space.items()):
        theirs = magnitudes(31, 24, 20)
        for sign in (1, -1):
            got = auto.operate(images, [place] * 4, sign * reach[place] * bins / 30)
            for i, at in enumerate(bins):
                m = 0.0 if theirs is None else float(theirs[at]) * (sign if signed else 1)
                wanted = peer._apply_image_or_video_transform(images[i], name, m, interpolation="nearest", fill={})
                # a level or two of rounding; a pixel whose source lies half-way may go the other way
                far = (got[i].int() - wanted.int()).abs() > 2
                assert far.float().mean() < 0.01, (name, sign, int(at))


@pytest.mark.parametrize(("policy", "operations"), [("trivial", 1), ("rand", 2)])
def test_auto_draws_for_each_picture_and_leaves_the_global_generator(policy, operations, monkeypatch):
    seen = []
    kept = auto.operate
    monkeypatch.setattr(auto, "operate", lambda *given: seen.append(given[1:]) or kept(*given))
    state = torch.get_rng_state()
    images = coarse(noise(300, side=8))
    first, second = (A.auto_augment(images, seeded(1), policy) for _ in range(2))
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert not torch.equal(first, A.auto_augment(images, seeded(2), policy))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 3 * operations
    places, magnitudes = seen[0]
    assert set(places) == set(range(14))
    turns = magnitudes[torch.tensor(places) == 5]
    assert len(turns.unique()) > (8 if policy == "trivial" else 1)
    assert turns.min() < 0 < turns.max()
    if policy == "rand":
        torch.testing.assert_close(turns.abs(), torch.full_like(turns, 9.0))


def test_auto_takes_grey_pictures_and_refuses_other_names():
    images = noise(60, 1)
    got = Augment(auto="rand")(images, seeded())
    assert got.shape == images.shape
    assert got.dtype == torch.float32
    assert got.min() >= 0
    assert got.max() <= 1
    with pytest.raises(ClearwingError, match="auto: best; choose one of trivial, rand"):
        Augment(auto="best")(images, seeded())
