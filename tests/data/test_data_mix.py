"""Pictures are mixed as their targets say."""

import pytest
import torch

from clearwing.data.mix import mixed
from clearwing.types import Batch, ClearwingError


def batch(count=6, classes=4, side=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.arange(count) % classes, tuple(f"p{i}" for i in range(count)))


def shares(whole, targets):
    """The share of each picture's own class, and a check that the rest is its neighbour's."""
    n, rows = len(whole), torch.arange(len(whole))
    own, other = whole.labels, whole.labels.roll(1)
    lam = targets[rows, own]
    wanted = torch.zeros_like(targets)
    wanted[rows, own] += lam
    wanted[rows, other] += 1 - lam
    torch.testing.assert_close(targets, wanted)
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    assert lam.unique().numel() == 1  # one draw a batch
    return float(lam[0])


@pytest.mark.parametrize("seed", range(4))
def test_mixup_weighs_two_pictures_as_the_targets_say(seed):
    whole = batch()
    got = mixed(whole, 4, mixup=1.0, seed=seed)
    lam = shares(whole, got.targets)
    assert 0 < lam < 1
    torch.testing.assert_close(got.images, lam * whole.images + (1 - lam) * whole.images.roll(1, 0))
    assert torch.equal(got.labels, whole.labels)
    assert got.keys == whole.keys
    assert got.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("seed", range(4))
def test_cutmix_takes_a_box_of_the_area_that_the_targets_say(seed):
    whole = batch()
    got = mixed(whole, 4, cutmix=1.0, seed=seed)
    lam = shares(whole, got.targets)
    other = whole.images.roll(1, 0)
    cut = (got.images != whole.images).any(1)  # (N, H, W)
    assert torch.equal(cut, cut[:1].expand_as(cut))
    assert cut[0].sum() == cut[0].any(0).sum() * cut[0].any(1).sum()  # one box
    assert torch.equal(got.images, torch.where(cut[:, None], other, whole.images))
    assert float(cut[0].double().mean()) == pytest.approx(1 - lam, abs=1e-6)
    assert got.images.is_contiguous(memory_format=torch.channels_last)


def test_both_take_turns_by_seed_alone_and_leave_the_global_generator_and_the_batch():
    whole, state = batch(), torch.get_rng_state()
    kept = whole.images.clone()
    kinds = []
    for seed in range(12):
        got, again = (mixed(whole, 4, mixup=1.0, cutmix=1.0, seed=seed) for _ in range(2))
        assert torch.equal(got.images, again.images)
        assert torch.equal(got.targets, again.targets)
        kinds.append(bool((got.images == whole.images).any()))  # a cut leaves pixels as they are
    assert {True, False} <= set(kinds)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole.images, kept)


def test_nothing_asked_is_nothing_done_and_what_is_wrong_is_named():
    whole = batch()
    assert mixed(whole, 4, seed=0) is whole
    with pytest.raises(ClearwingError, match="labels: None"):
        mixed(Batch(whole.images), 4, mixup=0.2, seed=0)
    with pytest.raises(ClearwingError, match="cutmix: -1"):
        mixed(whole, 4, cutmix=-1, seed=0)


def test_targets_go_along_to_the_device():
    moved = mixed(batch(), 4, mixup=1.0, seed=0).to("meta")
    assert moved.targets.device.type == moved.labels.device.type == moved.images.device.type == "meta"
    assert batch().to("meta").targets is None
