"""A stream gives every picture once an epoch, the same to any number of processes, and holds few of them at a time."""

import gc
import io
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clearwing.data import shards, stream
from clearwing.data.augment import Augment
from clearwing.data.loader import load_pictures
from clearwing.data.shards import write_shards
from clearwing.data.sources import Sample, open_data
from clearwing.data.stream import open_stream
from clearwing.types import ClearwingError

SIDE = 4
NAMES = ("a", "b", "c")


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (value, value // 2, 255 - value)).save(file, "PNG")
    return file.getvalue()


def put(path, labels, *, rows=5, broken=(), names=None, first=0):
    """A Parquet file with row groups of `rows`; picture i is of the grey level i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [
        {"bytes": b"broken" if i in broken else png(i), "path": None} for i in range(first, first + len(labels))
    ]
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}} if names else {}
    table = pa.table({"image": pictures, "label": labels}).replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two shards of train, 53 pictures in 11 row groups, and one of test."""
    root = tmp_path / "set"
    put(root / "train-00000-of-00002.parquet", [i % 3 for i in range(28)], names=NAMES)
    put(root / "train-00001-of-00002.parquet", [i % 3 for i in range(28, 53)], names=NAMES, first=28)
    put(root / "test-00000-of-00001.parquet", [2, 1], names=NAMES)
    return root


def opened(where, split="train", **options):
    return open_stream(where, split, **({"size": SIDE, "buffer": 12, "workers": 2} | options))


def numbers(batches):
    """The numbers of the pictures, batch by batch, read from their pixels."""
    return [(batch.images[:, 0, 0, 0] * 255).round().int().tolist() for batch in batches]


def flat(lists):
    return [number for one in lists for number in one]


def test_every_picture_comes_once_an_epoch_with_its_label_and_key(folder):
    data = opened(folder)
    assert len(data) == 53
    assert data.class_names == NAMES
    assert data.splits == ("train", "test")
    for epoch in range(2):
        batches = list(data.batches(8, epoch=epoch))
        assert [len(batch) for batch in batches] == [8] * 6 + [5]
        seen = flat(numbers(batches))
        assert sorted(seen) == list(range(53))
        assert flat(batch.labels.tolist() for batch in batches) == [i % 3 for i in seen]
        assert flat(batch.keys for batch in batches) == [f"train/{i:06d}" for i in seen]
    assert batches[0].images.dtype == torch.float32
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert len(batches[0].geometry) == 8
    assert data.skipped == ()


def test_the_order_depends_on_seed_and_epoch_alone_and_mixes(folder):
    data = opened(folder)

    def order(**options):
        return flat(numbers(data.batches(8, **options)))

    assert order() == order() == flat(numbers(opened(folder, workers=1).batches(5)))
    different = [order(), order(epoch=1), order(seed=1)]
    assert len(set(map(tuple, different))) == 3
    for one in different:
        assert one != sorted(one)
        groups = [i // 5 for i in one]
        assert len(set(groups[:8])) > 2  # a batch holds pictures of more row groups than fill it


def test_the_global_generators_are_left_alone(folder):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    list(opened(folder).batches(8, augment=Augment(flip=0.5)))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("buffer", [1, 7, 12, 1000])
@pytest.mark.parametrize("start", [1, 3, 6, 7])
def test_a_pass_can_begin_in_the_middle_of_an_epoch(folder, buffer, start):
    data, augment = opened(folder, buffer=buffer, holdout=0.1), Augment(flip=0.5, brightness=0.5)
    whole = list(data.batches(7, augment=augment, epoch=2))[start:]
    rest = list(data.batches(7, augment=augment, epoch=2, start=start))
    assert len(rest) == len(whole)
    for one, other in zip(whole, rest, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def test_what_is_left_out_at_the_start_is_not_read(folder, monkeypatch):
    read = []
    one_by_one = stream.Stream._read

    def spied(self, group, rows):
        for row in one_by_one(self, group, rows):
            read.append(row.number)
            yield row

    monkeypatch.setattr(stream.Stream, "_read", spied)
    kept = flat(numbers(opened(folder).batches(5, start=6)))
    assert len(kept) == 23
    assert set(kept) <= set(read)
    assert len(read) == len(set(read)) <= 23 + 5  # a row group more at the most


def test_processes_share_batches_and_pictures_are_augmented_alike(folder):
    data = opened(folder)
    augment = Augment(flip=0.5, brightness=0.4, alternate_flip=True)
    whole = list(data.batches(8, augment=augment, seed=4))
    parts = [list(data.batches(8, augment=augment, seed=4, part=(rank, 2))) for rank in range(2)]
    assert [len(part) for part in parts] == [7, 7]
    for b, (one, *shares) in enumerate(zip(whole, *parts, strict=True)):
        kept = 8 if b < 6 else 4  # the last batch has five pictures
        assert flat(share.keys for share in shares) == list(one.keys[:kept])
        assert torch.equal(torch.cat([share.images for share in shares]), one.images[:kept])
        assert torch.equal(torch.cat([share.labels for share in shares]), one.labels[:kept])
    assert [len(b) for b in data.batches(26, part=(1, 2))] == [13, 13]  # one picture is left for nobody
    assert [len(b) for b in data.batches(8, drop_last=True)] == [8] * 6


def test_an_unreadable_picture_is_replaced_and_counted_once(tmp_path):
    data = opened(put(tmp_path / "x.parquet", [i % 2 for i in range(20)], broken=(3, 4, 11)))
    for epoch in range(3):
        batches = list(data.batches(10, epoch=epoch))
        assert [len(batch) for batch in batches] == [10, 10]  # steps stay what they are
        shown = flat(numbers(batches))
        assert set(shown) == set(range(20)) - {3, 4, 11}
        assert flat(batch.labels.tolist() for batch in batches) == [i % 2 for i in shown]
        assert flat(batch.keys for batch in batches) == [f"train/{i:06d}" for i in shown]
        halves = [flat(numbers(data.batches(10, epoch=epoch, part=(rank, 2)))) for rank in range(2)]
        assert halves[0][:5] + halves[1][:5] == shown[:10]
    assert [key for key, _ in data.skipped] == ["train/000003", "train/000004", "train/000011"]
    assert all("cannot be read (" in reason for _, reason in data.skipped)


def test_a_batch_without_a_readable_picture_ends_the_pass(tmp_path):
    data = opened(put(tmp_path / "x.parquet", [0, 1, 0, 1], broken=range(4)))
    with pytest.raises(ClearwingError, match=r"pictures: train/00000.; none of its batch of 2 can be read") as caught:
        list(data.batches(2, ahead=1))
    assert caught.value.exit_code == 1


def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    """Undecoded pictures alive: the buffer, the batch under way, the one in the consumer's hands and the row drawn."""

    class Counted(stream._Row):
        alive, most = 0, 0

        def __init__(self, *args):
            super().__init__(*args)
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)

        def __del__(self):
            Counted.alive -= 1

    monkeypatch.setattr(stream, "_Row", Counted)

    def most(count, rows):
        Counted.most = 0
        list(opened(put(tmp_path / f"{count}-{rows}.parquet", [i % 2 for i in range(count)], rows=rows)).batches(8))
        assert Counted.alive == 0
        return Counted.most

    assert 12 < most(60, 10) <= 12 + 2 * 8 + 1
    assert most(60, 10) == most(250, 10) == most(250, 250)  # the last: a row group longer than everything else


def test_a_long_row_group_is_read_a_page_at_a_time(tmp_path):
    noise = np.random.default_rng(0).bytes(2_000)
    table = pa.table({"image": [noise[i % 999 :] + noise for i in range(4_000)], "label": [0, 1] * 2_000})
    total = table.nbytes
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    del table
    data = opened(tmp_path / "x.parquet")
    before, most = pa.total_allocated_bytes(), 0
    for _ in data._read(data._groups[0], np.arange(4_000)):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 0.45 * total  # a page has 1024 rows


def test_opening_and_counting_decode_no_picture(folder, monkeypatch):
    monkeypatch.setattr(stream, "read_picture", None)
    monkeypatch.setattr(stream.Stream, "_read", None)
    data = opened(folder, holdout=0.2)
    assert data.class_counts(5).tolist()[3:] == [0, 0]
    assert int(data.class_counts(3).sum()) == len(data) < 53
    assert opened(folder).class_counts(3).tolist() == [18, 18, 17]


def test_held_out_pictures_are_those_the_stream_never_gives(folder):
    data = opened(folder, holdout=0.3)
    given = Counter(flat(numbers(data.batches(8))))
    held = data.held_out()
    aside = [int(key.split("/")[1]) for key in held.keys]
    assert sorted([*given, *aside]) == list(range(53))
    assert len(data) == len(given)
    assert 5 < len(aside) < 27
    assert held.labels.tolist() == [i % 3 for i in aside]
    assert held.images[:, 0, 0, 0].tolist() == aside
    assert opened(folder, holdout=0.3).held_out().keys == held.keys
    some = data.held_out(4, size=2)
    assert some.images.shape == (4, 3, 2, 2)
    assert some.keys == tuple(held.keys[i] for i in (0, len(aside) // 4, len(aside) // 2, 3 * len(aside) // 4))
    with pytest.raises(ClearwingError, match=r"holdout: 0\.0; open the stream with a share"):
        opened(folder).held_out()


def test_mean_and_deviation_are_those_of_the_pictures(folder, monkeypatch):
    data = opened(folder)
    samples = open_data(folder, val_fraction=0).split("train")
    assert data.mean_std() == load_pictures(samples, SIDE, fit="squash").mean_std()
    part = data.mean_std(10)
    assert part == data.mean_std(10) != data.mean_std()
    assert part[0] == pytest.approx(data.mean_std()[0], abs=0.1)
    assert data.some(3).images[:, 0, 0, 0].tolist() == [0, 17, 35]


def test_class_names_are_those_of_open_data(tmp_path):
    for labels, options, names in (
        ([10, 9, 10], {}, ("9", "10")),
        (["owl", "cat", "owl"], {}, ("cat", "owl")),
        (["owl", "cat", "owl"], {"classes": ["owl", "cat"]}, ("owl", "cat")),
        ([1, 0, 1], {"classes": ["cat", "owl"]}, ("cat", "owl")),
    ):
        path = put(tmp_path / "x.parquet", labels)
        data = opened(path, **options)
        assert data.class_names == open_data(path, val_fraction=0, **options).class_names == names
        ((shown,), (batch,)) = numbers(data.batches(3)), data.batches(3)
        wanted = [s.label for s in open_data(path, val_fraction=0, **options).split("train")]
        assert batch.labels.tolist() == [wanted[i] for i in shown]
    put(tmp_path / "f" / "train.parquet", [5, 7])
    put(tmp_path / "f" / "test.parquet", [7, 6])
    assert opened(tmp_path / "f", "test").class_names == ("5", "6", "7")  # those of all splits
    renamed = put(tmp_path / "y.parquet", [0, 1], names=("x", "y"))
    assert opened(renamed, classes=["y", "x"]).class_counts(2).tolist() == [1, 1]
    ((_, second),) = (batch.labels.tolist() for batch in opened(renamed, classes=["y", "x"], buffer=1).batches(2))
    assert second == 0


def test_pictures_beside_the_parquet_and_bare_bytes_are_read(tmp_path):
    Image.new("RGB", (SIDE, SIDE), (9, 9, 9)).save(tmp_path / "1.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": "1.png"}], kind), "label": [0]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert numbers(opened(tmp_path / "a.parquet").batches(1)) == [[9]]
    pq.write_table(pa.table({"image": [png(7)], "label": [0]}), tmp_path / "b.parquet")
    assert numbers(opened(tmp_path / "b.parquet").batches(1)) == [[7]]


def test_batches_are_made_ahead_and_leaving_ends_the_threads(folder):
    import threading

    data = opened(folder)
    assert numbers(data.batches(8, ahead=3)) == numbers(data.batches(8))
    batches = data.batches(8, ahead=2)
    next(batches)
    batches.close()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("clearwing"):
            thread.join(10)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clearwing")]


def test_wrong_calls_get_their_line(folder, tmp_path):
    def refused(match, where=folder, split="train", **options):
        with pytest.raises(ClearwingError, match=match):
            opened(where, split, **options)

    refused("data: .*nowhere; no such file or folder", folder / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("data: .*empty; no Parquet file here", tmp_path / "empty")
    refused("split: val; .* has train, test", split="val")
    for options in ({"channels": 2}, {"buffer": 0}, {"holdout": 1.0}, {"fit": "x"}, {"size": 0}):
        refused(next(iter(options)), **options)
    refused("label -1; .* needs a label", put(tmp_path / "1" / "a.parquet", [0, -1]))
    refused("label 3; there are 2 class names", put(tmp_path / "2" / "a.parquet", [0, 3], names=("x", "y")))
    refused("class: b; not among the classes", classes=["a", "c"])
    refused("classes: d; no picture of it", classes=["a", "b", "c", "d"])
    refused(
        "a.parquet/train; this split has no picture to give", put(tmp_path / "3" / "a.parquet", [0]), holdout=0.9999
    )
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "n.parquet")
    refused("label None; .* needs a label", tmp_path / "n.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    refused("data: .*broken.parquet; cannot be read as Parquet", tmp_path / "broken.parquet")
    put(tmp_path / "4" / "train-0.parquet", [0], names=("x", "y"))
    put(tmp_path / "4" / "train-1.parquet", [0], names=("y", "x"))
    refused("data: .*train-1.parquet; its class names are not those of train-0.parquet", tmp_path / "4")
    data = opened(folder)
    with pytest.raises(ClearwingError, match="order: given; a stream draws its own"):
        data.batches(4, order=torch.arange(53))
    with pytest.raises(ClearwingError, match="batch_size: 0"):
        data.batches(0)
    with pytest.raises(ClearwingError, match="part"):
        data.batches(4, part=(2, 2))


def test_row_groups_longer_than_the_buffer_are_noted(folder):
    assert opened(folder).notes == ()
    assert opened(folder, buffer=4).notes == ("row groups of 5 pictures are mixed less well by a shuffle buffer of 4",)


# writing


def test_any_data_set_becomes_shards_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 2)
    (tmp_path / "p.png").write_bytes(png(40))
    source = [Sample(f"p/{i}.png", png(i), i % 3) for i in range(7)]
    source += [
        Sample("a/array", np.full((SIDE, SIDE, 1), 50, np.uint8), 1),
        Sample("a/file.png", tmp_path / "p.png", 2),
    ]
    paths = write_shards(source, tmp_path / "out", class_names=NAMES, rows_per_shard=5)
    assert [path.name for path in paths] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in paths]
    assert pq.ParquetFile(paths[0]).num_row_groups == 3
    read = open_data(tmp_path / "out", val_fraction=0)
    assert read.class_names == NAMES
    back = {sample.key: sample for sample in read.split("train")}
    assert list(back) != sorted(back)  # mixed
    assert {key: sample.label for key, sample in back.items()} == {sample.key: sample.label for sample in source}
    assert back["p/3.png"].source.read_bytes() == png(3)
    assert back["a/file.png"].source.read_bytes() == png(40)
    assert sorted(flat(numbers(opened(tmp_path / "out").batches(4)))) == [0, 1, 2, 3, 4, 5, 6, 40, 50]
    others = [Sample(f"t/{i}.png", png(i), 0) for i in range(9)]
    write_shards(others, tmp_path / "out", class_names=NAMES, split="test", seed=None)
    assert [sample.key for sample in open_data(tmp_path / "out").split("test")] == [s.key for s in others]


def test_shards_are_written_all_or_not_at_all(tmp_path):
    def refused(match, samples, **options):
        with pytest.raises(ClearwingError, match=match):
            write_shards(samples, tmp_path / "out", class_names=NAMES, **options)

    good = [Sample("a", png(1), 0), Sample("b", png(2), None)]
    refused("missing.png; cannot be read", [*good, Sample("c", tmp_path / "missing.png", 1)], rows_per_shard=1)
    assert list((tmp_path / "out").iterdir()) == []
    refused("samples", [])
    refused("rows_per_shard: 0", good, rows_per_shard=0)
    refused("split: trian; did you mean train", good, split="trian")
    write_shards(good, tmp_path / "out", class_names=NAMES, split="test")
    assert sorted(pq.read_table(tmp_path / "out")["label"].to_pylist()) == [-1, 0]
    refused("folder: .*out; holds shards of test", good, split="test")
