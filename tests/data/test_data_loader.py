"""The cache holds every picture once, and batches are what it holds."""

import numpy as np
import pytest
import torch
from PIL import Image

from clearwing.data import loader
from clearwing.data.augment import Augment
from clearwing.data.loader import load_pictures, spread
from clearwing.data.preprocess import fit_picture, read_picture
from clearwing.data.sources import Sample
from clearwing.types import ClearwingError


def samples(count=10, labelled=True):
    """Pictures of mixed sizes; picture i is of colour (i, 2i, 3i)."""
    return [
        Sample(f"p{i}", np.full((8 + i, 80 - i, 3), (i, 2 * i, 3 * i), np.uint8), i % 3 if labelled else None)
        for i in range(count)
    ]


def noisy(count=9, side=11):
    images = np.random.default_rng(0).integers(0, 256, (count, side, side + 3, 3), dtype=np.uint8)
    return [Sample(f"n{i}", image, i % 2) for i, image in enumerate(images)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_pictures_are_read_fitted_and_kept_in_order():
    source = noisy()
    pictures = load_pictures(source, 6, fit="pad", workers=2)
    assert pictures.images.shape == (9, 3, 6, 6)
    assert pictures.images.dtype == torch.uint8
    for i, sample in enumerate(source):
        wanted, place = fit_picture(read_picture(sample.source), 6, "pad")
        assert torch.equal(pictures.images[i], wanted)
        assert pictures.geometry[i] == place
    assert pictures.keys == tuple(s.key for s in source)
    assert pictures.labels.tolist() == [i % 2 for i in range(9)]
    assert pictures.skipped == ()
    assert len(pictures) == 9


def test_sizes_of_two_sides_and_one_channel():
    pictures = load_pictures(noisy(), (5, 9), channels=1)
    assert pictures.images.shape == (9, 1, 5, 9)
    batch = next(pictures.batches(4))
    assert batch.images.shape == (4, 1, 5, 9)


def test_broken_pictures_are_passed_over_and_named(tmp_path):
    good = samples(70)  # more than one task
    for i in (0, 33, 69):
        good[i] = Sample(f"bad{i}", tmp_path / f"{i}.jpg", 0)
    (tmp_path / "33.jpg").write_bytes(b"\xff\xd8\xff broken")
    seen = []
    pictures = load_pictures(good, 4, workers=3, progress=lambda done, total: seen.append((done, total)))
    assert [key for key, _ in pictures.skipped] == ["bad0", "bad33", "bad69"]
    assert all("cannot be read (" in reason for _, reason in pictures.skipped)
    assert len(pictures) == len(pictures.images) == len(pictures.labels) == len(pictures.geometry) == 67
    colours = [int(key[1:]) for key in pictures.keys]
    assert pictures.images[:, 0, 0, 0].tolist() == colours
    assert seen[-1] == (70, 70)
    assert seen == sorted(seen)


def test_nothing_to_load_and_nothing_readable_are_errors(tmp_path):
    with pytest.raises(ClearwingError, match="there is no picture to load"):
        load_pictures([], 4)
    with pytest.raises(ClearwingError, match=r"pictures: a; none of 2 can be read: cannot be read \(.*No such file"):
        load_pictures([Sample("a", tmp_path / "a.jpg"), Sample("b", tmp_path / "b.jpg")], 4)


@pytest.mark.parametrize("named", [{"fit": "x"}, {"channels": 2}, {"size": 0}])
def test_a_wrong_setting_is_an_error_and_not_a_skipped_picture(named):
    with pytest.raises(ClearwingError, match=next(iter(named))):
        load_pictures(samples(2), **{"size": 4, **named})


def test_a_large_cache_is_a_file_without_a_name(tmp_path):
    bad = [Sample("bad", tmp_path / "none.jpg", 0)]
    small, large = (
        load_pictures(bad + noisy(), 6, memory=memory, cache_dir=tmp_path / "cache") for memory in (10**9, 100)
    )
    assert torch.equal(small.images, large.images)
    assert large.skipped[0][0] == "bad"
    assert isinstance(large.images.untyped_storage().nbytes(), int)
    assert list((tmp_path / "cache").iterdir()) == []
    assert [b.images.sum().item() for b in small.batches(4)] == [b.images.sum().item() for b in large.batches(4)]


def test_a_full_disk_is_found_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 50}))
    with pytest.raises(ClearwingError, match=r"cache_dir: .*name another or a smaller size"):
        load_pictures(noisy(), 6, memory=100, cache_dir=tmp_path)


def test_batches_are_the_pictures_in_the_unit_range():
    pictures = load_pictures(noisy(), 6)
    batches = list(pictures.batches(4))
    assert [len(b) for b in batches] == [4, 4, 1]
    images = torch.cat([b.images for b in batches])
    assert images.dtype == torch.float32
    assert torch.equal(images, pictures.images.float() / 255)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert sum((b.keys for b in batches), ()) == pictures.keys
    assert sum((b.geometry for b in batches), ()) == pictures.geometry
    assert torch.equal(torch.cat([b.labels for b in batches]), pictures.labels)
    assert [len(b) for b in pictures.batches(4, drop_last=True)] == [4, 4]
    assert [len(b) for b in pictures.batches(20, drop_last=True)] == []


def test_a_shuffled_pass_holds_every_picture_once_beside_its_label_and_key():
    pictures = load_pictures(samples(), 4)
    passes = [list(pictures.batches(3, shuffle=seeded(seed))) for seed in (0, 0, 1)]
    orders = [sum((b.keys for b in batches), ()) for batches in passes]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == sorted(pictures.keys)
    for batch in passes[2]:
        numbers = [int(key[1:]) for key in batch.keys]
        assert batch.labels.tolist() == [i % 3 for i in numbers]
        assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == numbers
        assert [place.height for place in batch.geometry] == [8 + i for i in numbers]


def test_an_epoch_draws_anew_and_leaves_the_global_generator():
    pictures, generator, state = load_pictures(samples(), 4), seeded(), torch.get_rng_state()
    first, second = (sum((b.keys for b in pictures.batches(4, shuffle=generator)), ()) for _ in range(2))
    assert first != second
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_batches_have_the_network_size_and_no_geometry():
    pictures = load_pictures(noisy(), 9)
    augment = Augment(resized_crop=(0.5, 1), size=6, flip=0.5)
    batches = list(pictures.batches(4, augment=augment, generator=seeded()))
    assert batches[0].images.shape == (4, 3, 6, 6)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert batches[0].geometry == ()
    again = list(pictures.batches(4, augment=augment, generator=seeded()))
    assert torch.equal(batches[2].images, again[2].images)
    assert torch.equal(pictures.images, load_pictures(noisy(), 9).images)  # the cache is not written on


def test_wrong_calls_of_batches_are_found_at_the_call():
    pictures = load_pictures(samples(2), 4)
    with pytest.raises(ClearwingError, match="batch_size: 0"):
        pictures.batches(0)
    with pytest.raises(ClearwingError, match="generator: None"):
        pictures.batches(2, augment=Augment(flip=1.0))


def test_unlabelled_pictures_have_no_labels():
    pictures = load_pictures(samples(labelled=False), 4)
    assert pictures.labels is None
    assert next(pictures.batches(2)).labels is None
    with pytest.raises(ClearwingError, match="labels: None"):
        pictures.class_counts(3)


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_std_are_those_of_all_pixels(channels):
    pictures = load_pictures(noisy(300, 5), 4, channels=channels)  # more than one part
    mean, std = pictures.mean_std()
    values = pictures.images.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_subset_and_class_counts():
    pictures = load_pictures(samples(), 4)
    assert pictures.class_counts(5).tolist() == [4, 3, 3, 0, 0]
    few = pictures.subset(4)
    assert few.keys == ("p0", "p2", "p5", "p7")
    assert torch.equal(few.images, pictures.images[[0, 2, 5, 7]])
    assert few.geometry[1] == pictures.geometry[2]
    picked = pictures.subset(torch.tensor([9, 1]))
    assert picked.keys == ("p9", "p1")
    assert picked.labels.tolist() == [0, 1]
    assert len(pictures.subset(99)) == 10
    assert spread(3, 3) == [0, 1, 2]
    with pytest.raises(ClearwingError, match="limit: 0"):
        pictures.subset(0)


def test_files_of_the_same_name_in_two_folders(tmp_path):
    for folder, colour in (("a", 10), ("b", 200)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 5), (colour, 0, 0)).save(tmp_path / folder / "1.png")
    pictures = load_pictures([Sample(f"{f}/1.png", tmp_path / f / "1.png", 0) for f in "ab"], 4)
    assert pictures.images[:, 0, 0, 0].tolist() == [10, 200]
