"""The cache holds every picture once, and batches are what it holds."""

import gc
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from clearwing.data import loader
from clearwing.data.augment import Augment
from clearwing.data.loader import epoch_order, load_pictures, load_sizes, made_ahead, spread
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


def keys_of(batches):
    return sum((batch.keys for batch in batches), ())


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


def test_several_sizes_are_of_one_reading(tmp_path, monkeypatch):
    given = samples(70)  # more than one task
    given[40] = Sample("bad", tmp_path / "none.jpg", 0)
    read = []
    monkeypatch.setattr(loader, "read_picture", lambda *given: read.append(1) or read_picture(*given))
    small, wide, again = load_sizes(given, (5, (6, 9), 5), fit="pad")
    assert len(read) == 70
    assert again is small
    monkeypatch.undo()
    for found, size in ((small, 5), (wide, (6, 9))):
        alone = load_pictures(given, size, fit="pad")
        assert torch.equal(found.images, alone.images)
        assert torch.equal(found.labels, alone.labels)
        assert (found.geometry, found.skipped) == (alone.geometry, alone.skipped)
        assert found.samples == alone.samples == tuple(given[:40] + given[41:])


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
    passes = [list(pictures.batches(3, order=epoch_order(10, seed, 0))) for seed in (0, 0, 1)]
    orders = [keys_of(batches) for batches in passes]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == sorted(pictures.keys)
    for batch in passes[2]:
        numbers = [int(key[1:]) for key in batch.keys]
        assert batch.labels.tolist() == [i % 3 for i in numbers]
        assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == numbers
        assert [place.height for place in batch.geometry] == [8 + i for i in numbers]


def test_an_order_may_leave_out_and_repeat():
    pictures = load_pictures(samples(), 4)
    assert keys_of(pictures.batches(2, order=torch.tensor([7, 7, 1]))) == ("p7", "p7", "p1")
    assert list(pictures.batches(2, order=torch.tensor([], dtype=torch.int64))) == []


def test_an_epoch_draws_anew_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first, second = (epoch_order(10, 0, epoch).tolist() for epoch in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(10))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_balanced_order_gives_each_class_equally_often():
    labels = torch.tensor([5] * 40 + [0] * 3 + [2] * 11)  # class 1 does not occur
    order = epoch_order(54, 3, 1, labels=labels, balanced=True)
    assert torch.equal(order, epoch_order(54, 3, 1, labels=labels, balanced=True))
    assert not torch.equal(order, epoch_order(54, 3, 2, labels=labels, balanced=True))
    assert Counter(labels[order].tolist()) == {5: 18, 0: 18, 2: 18}
    assert set(Counter(order[labels[order] == 0].tolist()).values()) == {6}
    assert set(Counter(order[labels[order] == 2].tolist()).values()) == {1, 2}
    assert len(order[labels[order] == 5].unique()) == 18
    assert labels[order[:18]].unique().tolist() == [0, 2, 5]  # the classes are mixed
    counts = Counter(labels[:53][epoch_order(53, 3, 1, labels=labels[:53], balanced=True)].tolist())
    assert sorted(counts.values()) == [17, 18, 18]
    with pytest.raises(ClearwingError, match="labels: 53 of them; balancing needs 54"):
        epoch_order(54, 0, 0, labels=labels[:53], balanced=True)
    with pytest.raises(ClearwingError, match="labels: None"):
        epoch_order(54, 0, 0, balanced=True)


AUGMENT = Augment(crop_padding=2, alternate_flip=True, auto="trivial", brightness=0.3, cutout=3)


def drawn(pictures, batch_size=4, augment=AUGMENT, epoch=1, **named):
    order = epoch_order(len(pictures), 0, epoch)
    return list(pictures.batches(batch_size, order=order, augment=augment, epoch=epoch, **named))


def assert_equal(got, wanted):
    assert [b.keys for b in got] == [b.keys for b in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_augmented_batches_have_the_network_size_and_no_geometry():
    pictures = load_pictures(noisy(), 9)
    state = torch.get_rng_state()
    batches = drawn(pictures, augment=Augment(resized_crop=(0.5, 1), size=6, flip=0.5))
    assert batches[0].images.shape == (4, 3, 6, 6)
    assert batches[0].images.dtype == torch.float32
    assert batches[0].images.max() <= 1.001
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert batches[0].geometry == ()
    assert torch.equal(pictures.images, load_pictures(noisy(), 9).images)  # the cache is not written on
    assert torch.equal(torch.get_rng_state(), state)


def test_an_augmentation_is_given_bytes_and_the_draw_of_its_batch():
    pictures, seen = load_pictures(noisy(), 6), []
    order = torch.tensor([8, 3, 5, 1])

    def augment(images, draw):
        seen.append((images, draw))
        return images

    batches = list(pictures.batches(3, order=order, augment=augment, seed=2, epoch=5))
    assert torch.equal(torch.cat([b.images for b in batches]), pictures.images[order].float() / 255)
    images, draw = seen[0]
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (draw.total, draw.first, draw.index.tolist(), draw.epoch, draw.seed) == (3, 0, [8, 3, 5], 5, 2)
    assert torch.rand(1, generator=draw.generator) != torch.rand(1, generator=seen[1][1].generator)


def test_what_is_drawn_depends_on_seed_and_epoch():
    pictures = load_pictures(noisy(), 9)
    assert_equal(drawn(pictures), drawn(pictures))
    for other in ({"seed": 1}, {"epoch": 3}):  # in an odd epoch too, the mirrored ones are the same
        order = torch.arange(9)
        first, second = (
            next(pictures.batches(9, order=order, augment=AUGMENT, **{"epoch": 1, **named})) for named in ({}, other)
        )
        assert not torch.equal(first.images, second.images)


@pytest.mark.parametrize("start", [1, 2, 3, 9])
def test_to_start_later_is_to_skip(start):
    pictures = load_pictures(noisy(11), 9)
    assert_equal(drawn(pictures, start=start), drawn(pictures)[start:])


def test_parts_of_the_batches_are_the_batches():
    pictures = load_pictures(noisy(11), 9)
    whole = drawn(pictures)  # 4, 4, 3
    parts = [drawn(pictures, part=(rank, 2)) for rank in range(2)]
    assert [[len(b) for b in part] for part in parts] == [[2, 2, 1]] * 2
    for batch, *shares in zip(whole, *parts, strict=True):
        n = sum(map(len, shares))
        assert keys_of(shares) == batch.keys[:n]
        torch.testing.assert_close(torch.cat([s.images for s in shares]), batch.images[:n], atol=1e-6, rtol=0)
        assert torch.equal(torch.cat([s.labels for s in shares]), batch.labels[:n])
    four = [drawn(pictures, part=(rank, 4)) for rank in range(4)]
    assert [[len(b) for b in part] for part in four] == [[1, 1]] * 4  # three pictures are too few for four
    assert [len(b) for b in drawn(pictures, part=(1, 2), drop_last=True)] == [2, 2]


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_batches_made_ahead_are_the_batches(ahead):
    pictures = load_pictures(noisy(11), 9)
    assert_equal(drawn(pictures, ahead=ahead), drawn(pictures))


def working():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clearwing-ahead")]


def ended(threads):
    for thread in threads:
        thread.join(60)
    return not any(thread.is_alive() for thread in threads)


def test_an_error_in_the_thread_is_raised_in_its_turn_and_the_thread_ends():
    def augment(images, draw):
        if 5 in draw.index:
            raise ClearwingError("picture", 5, "this one cannot be augmented")
        return images

    batches = load_pictures(noisy(9), 6).batches(2, augment=augment, ahead=3)
    assert keys_of([next(batches), next(batches)]) == ("n0", "n1", "n2", "n3")
    threads = working()
    with pytest.raises(ClearwingError, match="picture: 5"):
        next(batches)
    assert ended(threads)
    assert list(batches) == []


@pytest.mark.parametrize("leave", ["close", "forget", "finish"])
def test_leaving_ends_the_thread_and_no_more_is_made_than_was_asked(leave):
    made, others = [], set(working())
    items = made_ahead((made.append(i) or i for i in range(50)), 3)
    assert set(working()) <= others  # nothing is begun before the first is asked for
    assert [next(items), next(items)] == [0, 1]
    (thread,) = set(working()) - others
    if leave == "close":
        items.close()
    elif leave == "finish":
        assert list(items) == list(range(2, 50))
    del items
    gc.collect()
    assert ended([thread])
    assert len(made) <= (50 if leave == "finish" else 5)


def test_wrong_calls_of_batches_are_found_at_the_call():
    pictures = load_pictures(samples(2), 4)
    for named, message in (
        ({"batch_size": 0}, "batch_size: 0; give at least 1"),
        ({"part": (0, 2), "batch_size": 3}, "batch_size: 3; give 2, the number of processes, or a multiple"),
        ({"part": (2, 2)}, r"part: \(2, 2\)"),
        ({"start": -1}, "start: -1"),
        ({"ahead": -1}, "ahead: -1"),
        ({"order": torch.tensor([0, 2])}, "order: 0 to 2; the positions of 2 pictures are 0 to 1"),
    ):
        with pytest.raises(ClearwingError, match=message):
            pictures.batches(**{"batch_size": 2, **named})


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
