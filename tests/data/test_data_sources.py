"""Every layout of a data set, and one clear line for each that is wrong."""

import json
import os
import sys
import types
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image

from clearwing.data.preprocess import read_mask, read_picture
from clearwing.data.sources import cache_home, open_data
from clearwing.types import ClearwingError

DATA = Path(os.environ.get("CLEARWING_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def put(path, colour=128, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), colour).save(path)
    return path


def put_many(root, *names):
    for name in names:
        put(root / name)
    return root


def keys(data, split):
    return [sample.key for sample in data.splits[split]]


def refused(match, *arguments, **options):
    with pytest.raises(ClearwingError, match=match) as caught:
        open_data(*arguments, **options)
    assert "\n" not in str(caught.value)


# class folders


def test_train_val_and_test_folders_with_mirrored_masks(tmp_path):
    put_many(tmp_path, *[f"{s}/{c}/{i}.jpg" for s in ("train", "val", "test") for c in ("cat", "Dog") for i in (1, 2)])
    put_many(tmp_path / "masks", "val/cat/1.png", "val/Dog/2.JPEG")
    data = open_data(tmp_path)
    assert data.class_names == ("Dog", "cat")  # plain order, capitals first, as torchvision's ImageFolder
    assert list(data.splits) == ["train", "val", "test"]
    assert keys(data, "val") == ["val/Dog/1.jpg", "val/Dog/2.jpg", "val/cat/1.jpg", "val/cat/2.jpg"]
    assert [s.label for s in data.split("val")] == [0, 0, 1, 1]
    masks = [s.mask and s.mask.name for s in data.split("val")]
    assert masks == [None, "2.JPEG", "1.png", None]
    assert all(s.mask is None for s in data.split("train"))
    assert data.notes == ()
    assert data.name == tmp_path.name
    with pytest.raises(ClearwingError, match=r"split: dev; .* has train, val, test"):
        data.split("dev")


@pytest.mark.parametrize("mask", ["val/cat/1.png", "cat/1.png", "1.png", "val/1.png"])
def test_masks_mirror_the_set_or_the_split_or_are_flat(tmp_path, mask):
    put_many(tmp_path / "data", "train/cat/7.jpg", "val/cat/1.jpg", "train/dog/8.jpg")
    put(tmp_path / "elsewhere" / mask)
    data = open_data(tmp_path / "data", masks=tmp_path / "elsewhere")
    assert [s.mask for s in data.split("val")] == [tmp_path / "elsewhere" / mask]


def test_a_mask_that_two_pictures_would_share_is_not_guessed(tmp_path):
    put_many(tmp_path, "val/cat/1.jpg", "val/dog/1.jpg", "MASKS/1.png")
    data = open_data(tmp_path)
    assert all(s.mask is None for s in data.split("val"))
    assert "1 masks that several pictures would share" in data.notes[0]
    refused("masks: .*1.png; val/cat/1.jpg and val/dog/1.jpg share it", tmp_path, masks=tmp_path / "MASKS")


def test_wrong_masks_are_named(tmp_path):
    put_many(tmp_path / "data", "val/cat/1.jpg")
    refused("masks: .*none; no such folder", tmp_path / "data", masks=tmp_path / "none")
    put(tmp_path / "other" / "9.png")
    refused("masks: .*other; no mask bears the name", tmp_path / "data", masks=tmp_path / "other")


def test_other_files_and_hidden_ones_are_not_pictures(tmp_path):
    put_many(tmp_path, "cat/a.JPG", "cat/b.Jpeg", "cat/c.png", "cat/d.webp", "cat/e.BMP", "cat/f.gif", "cat/g.tiff")
    put_many(tmp_path, "cat/.h.png", "dog/deep/er/i.tif", ".git/j.png", "__MACOSX/k.png", "l.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    data = open_data(tmp_path, val_fraction=0)
    assert [k.rpartition("/")[2][0] for k in keys(data, "train")] == list("abcdefgi")
    assert keys(data, "train")[-1] == "dog/deep/er/i.tif"
    assert data.class_names == ("cat", "dog")
    assert data.notes == (f"1 pictures beside the class folders of {tmp_path.name} were left out",)


def test_a_folder_of_class_folders_is_split_by_class_and_seed(tmp_path):
    put_many(tmp_path, *[f"{c}/{i:02d}.png" for c, n in (("a", 20), ("b", 10), ("c", 1)) for i in range(n)])
    data = open_data(tmp_path, seed=3)
    assert Counter(s.label for s in data.split("val")) == {0: 4, 1: 2}
    assert Counter(s.label for s in data.split("train")) == {0: 16, 1: 8, 2: 1}
    assert set(keys(data, "train")) | set(keys(data, "val")) == {
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")
    }
    assert keys(data, "train") == sorted(keys(data, "train"))
    assert data.notes == ("no val: 6 of 31 pictures of train, stratified, seed 3, are val",)
    assert keys(open_data(tmp_path, seed=3), "val") == keys(data, "val")
    assert keys(open_data(tmp_path, seed=4), "val") != keys(data, "val")
    put(tmp_path / "0" / "new.png")  # a new class changes no other class's draw
    assert set(keys(open_data(tmp_path, seed=3), "val")) == set(keys(data, "val"))


def test_a_test_slice_is_taken_on_request_and_leaves_the_val_slice_as_it_was(tmp_path):
    put_many(tmp_path, *[f"{c}/{i:02d}.png" for c, n in (("a", 20), ("b", 10), ("c", 2)) for i in range(n)])
    data = open_data(tmp_path, val_fraction=0.15, test_fraction=0.15, seed=3)
    counts = {split: Counter(s.label for s in data.split(split)) for split in data.splits}
    assert counts == {"train": {0: 14, 1: 6, 2: 1}, "val": {0: 3, 1: 2, 2: 1}, "test": {0: 3, 1: 2}}
    every = [key for split in data.splits for key in keys(data, split)]
    assert len(every) == len(set(every)) == 32
    assert data.notes[1] == "no test: 5 of 32 pictures of train, stratified, seed 3, are test"
    assert keys(data, "val") == keys(open_data(tmp_path, val_fraction=0.15, seed=3), "val")
    assert list(open_data(tmp_path, val_fraction=0, test_fraction=0.15).splits) == ["train", "test"]
    put_many(tmp_path / "ready", "train/a/1.png", "train/a/2.png", "train/b/1.png", "test/a/1.png")
    assert len(open_data(tmp_path / "ready", test_fraction=0.5).split("test")) == 1
    refused("test_fraction: 1; give a share", tmp_path, test_fraction=1)


def test_train_and_test_get_a_val_from_train_and_a_test_alone_gets_none(tmp_path):
    put_many(tmp_path, *[f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in range(5)])
    data = open_data(tmp_path)
    assert list(data.splits) == ["train", "val", "test"]
    assert [len(data.split(s)) for s in data.splits] == [8, 2, 10]
    assert all(key.startswith("train/") for key in keys(data, "val"))
    put_many(tmp_path / "only", "test/a/1.png", "test/b/1.png")
    assert list(open_data(tmp_path / "only").splits) == ["test"]


def test_an_unlabelled_test_folder_stays_unlabelled(tmp_path):
    put_many(tmp_path, "train/a/1.png", "train/b/1.png", "test/x1.png", "test/x2.png")
    data = open_data(tmp_path)
    assert [s.label for s in data.split("test")] == [None, None]


def test_wrong_folders_each_get_their_line(tmp_path):
    refused("data: .*nowhere; no such file or folder; give one, or demo", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(r"data: .*empty; no picture here", tmp_path / "empty")
    put_many(tmp_path / "hole", "train/a/1.png", "val/a/1.png")
    (tmp_path / "hole" / "train" / "b").mkdir()
    refused("data: train/b; this class folder holds no picture", tmp_path / "hole")
    put_many(tmp_path / "flat", "a/1.png")
    (tmp_path / "flat" / "b").mkdir()
    refused("data: flat/b; this class folder holds no picture", tmp_path / "flat")
    put_many(tmp_path / "split", "train/a/1.png")
    (tmp_path / "split" / "val").mkdir()
    refused(r"data: .*val; no picture here", tmp_path / "split")
    put_many(tmp_path / "more", "train/a/1.png", "val/b/1.png")
    refused(r"class: b \(val/b/1.png\); train has no picture of this class", tmp_path / "more")
    (tmp_path / "x.txt").write_text("")
    refused("data: .*x.txt; not a picture", tmp_path / "x.txt")
    refused("val_fraction: 1; give a share", tmp_path / "more", val_fraction=1)


def test_class_order_can_be_given_and_what_is_missing_is_named(tmp_path):
    put_many(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png")
    assert [s.label for s in open_data(tmp_path, classes=["b", "a"]).split("train")] == [1, 0]
    refused("classes: c; no picture of this class", tmp_path, classes=["a", "b", "c"])
    refused(r"class: b \(train/b/1.png\); not among the classes", tmp_path, classes=["a"])
    refused("classes: a; give every class once", tmp_path, classes=["a", "a", "b"])
    refused(r"classes: \[\]; give every class once", tmp_path, classes=[])
    refused("classes: a; give names, or a file", tmp_path, classes="a")


def test_a_class_may_be_called_like_a_split(tmp_path):
    put_many(tmp_path, *[f"{c}/{i}.png" for c in ("bus", "car", "train") for i in range(3)])
    assert open_data(tmp_path).class_names == ("bus", "car", "train")
    put_many(tmp_path / "sets", "train/a/1.png", "valid/a/1.png", "extra/a/1.png")
    data = open_data(tmp_path / "sets")
    assert list(data.splits) == ["train", "val"]
    assert data.notes == ("folders beside the splits were left out: extra",)


def test_numbered_class_folders_sort_as_torchvision_sorts(tmp_path):
    put_many(tmp_path, "1/a.png", "2/a.png", "10/a.png")
    assert open_data(tmp_path).class_names == ("1", "10", "2")


# names


def test_splits_of_named_files(tmp_path):
    put_many(tmp_path, *[f"train/{c}_{i}.jpg" for c in ("cat", "dog") for i in range(4)], "val/cat_1.jpg")
    data = open_data(tmp_path)
    assert [s.label for s in data.split("train")] == [0] * 4 + [1] * 4
    assert [s.label for s in data.split("val")] == [0]  # one file says little, but train knows its class


def test_files_named_by_class_and_number(tmp_path):
    names = [f"{c}_{i}.jpg" for c in ("oak", "red_maple", "7") for i in range(10)]
    put_many(tmp_path, *names)
    data = open_data(tmp_path)
    assert data.class_names == ("7", "oak", "red_maple")
    assert [len(data.split(s)) for s in ("train", "val")] == [24, 6]
    label = {s.key: data.class_names[s.label] for split in data.splits.values() for s in split}
    assert label["red_maple_3.jpg"] == "red_maple"


def test_the_class_file_and_the_pattern(tmp_path):
    put_many(tmp_path / "p", "001-oak.png", "002-oak.png", "003-elm_tree.png", "0-4-elm_tree.jpg")
    (tmp_path / "classes.txt").write_text("oak\n\nelm_tree\n")
    data = open_data(tmp_path / "p", pattern="{id}-{class}.png", classes=tmp_path / "classes.txt", val_fraction=0)
    assert data.class_names == ("oak", "elm_tree")
    assert {s.key: s.label for s in data.split("train")} == {
        "0-4-elm_tree.jpg": 1, "001-oak.png": 0, "002-oak.png": 0, "003-elm_tree.png": 1,
    }  # fmt: skip
    (tmp_path / "classes.json").write_text(json.dumps(["elm_tree", "oak"]))
    data = open_data(tmp_path / "p", pattern="{id}-{class}.png", classes=tmp_path / "classes.json")
    assert data.class_names == ("elm_tree", "oak")
    refused(r"pattern: \{id\}.jpg; it must hold \{class\} once", tmp_path / "p", pattern="{id}.jpg")
    refused(r"pattern: 001-oak.png; this name does not follow \{class\}_\{id\}.jpg", tmp_path / "p", classes=["oak"])


def test_given_classes_decide_where_a_name_is_cut(tmp_path):
    put_many(tmp_path, "bald_eagle_2020_01.jpg", "bald_1.jpg")
    data = open_data(tmp_path, classes=["bald", "bald_eagle"], val_fraction=0)
    assert {s.key: s.label for s in data.split("train")} == {"bald_1.jpg": 0, "bald_eagle_2020_01.jpg": 1}
    refused(r"class: bald \(bald_1.jpg\); not among the classes", tmp_path, classes=["bald_eagle"])
    refused("classes: owl; no picture of this class", tmp_path, classes=["bald", "bald_eagle", "owl"])


@pytest.mark.parametrize(
    "names",
    [
        ["IMG_0001.jpg", "IMG_0002.jpg"],  # one class: a camera's names
        ["IMG_0001.jpg", "DSC_0002.jpg", "x_1.jpg"],  # as many classes as files, nearly
        ["0010001.jpg", "0010002.jpg", "cat_1.jpg", "cat_2.jpg", "dog_1.jpg", "dog_2.jpg"],  # a third does not match
    ],
)
def test_names_that_do_not_plainly_hold_classes_are_unlabelled(tmp_path, names):
    put_many(tmp_path, *names)
    data = open_data(tmp_path)
    assert list(data.splits) == ["all"]
    assert [s.label for s in data.split("all")] == [None] * len(names)
    assert data.class_names == ()


def test_a_few_strange_names_are_left_out_with_a_note(tmp_path):
    put_many(tmp_path, *[f"{c}_{i}.jpg" for c in "ab" for i in range(20)], "cover.jpg")
    data = open_data(tmp_path)
    assert sum(map(len, data.splits.values())) == 40
    assert data.notes[0].startswith("1 files whose names do not follow")


# lists


def test_lists_of_pictures_and_one_picture(tmp_path):
    put_many(tmp_path, "a/1.png", "b/1.png", "c/2.png")
    data = open_data([tmp_path / "a" / "1.png", str(tmp_path / "b" / "1.png"), tmp_path / "a" / "1.png"])
    assert keys(data, "all") == ["a/1.png", "b/1.png"]
    assert keys(open_data([tmp_path / "a", tmp_path / "c" / "2.png"]), "all") == ["a/1.png", "c/2.png"]
    one = open_data(tmp_path / "a" / "1.png")
    assert keys(one, "all") == ["1.png"]
    assert one.split("all")[0].label is None
    refused(r"pictures: \[\]; no picture here", [])
    refused("pictures: .*z.png; no such file", [tmp_path / "z.png"])


def test_relative_lists_have_short_keys(tmp_path, monkeypatch):
    put_many(tmp_path, "a/1.png", "2.png")
    monkeypatch.chdir(tmp_path)
    assert keys(open_data(["a/1.png", "2.png"]), "all") == ["a/1.png", "2.png"]


# Parquet


def encoded(value=128):
    held = pa.BufferOutputStream()
    Image.new("L", (3, 2), value).save(held, "PNG")
    return held.getvalue().to_pybytes()


def write_parquet(path, labels, *, image="image", label="label", names=None, paths=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": encoded(i), "path": paths[i] if paths else None} for i in range(len(labels))]
    columns = {image: pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if label:
        columns[label] = pa.array(labels)
    table = pa.table(columns)
    if names:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def test_parquet_folder_of_a_hugging_face_set(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [1, 0, 1], names=["z", "a"])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [0, 0], names=["z", "a"])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [1], names=["z", "a"])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [-1, 0], names=["z", "a"])
    data = open_data(tmp_path)
    assert data.class_names == ("z", "a")
    assert {name: [s.label for s in split] for name, split in data.splits.items()} == {
        "train": [1, 0, 1, 0, 0], "val": [1], "test": [None, 0],
    }  # fmt: skip
    assert keys(data, "test") == ["test/000000", "test/000001"]
    assert read_picture(data.split("train")[1].source, channels=1).unique().tolist() == [1]


def test_parquet_files_of_other_splits_are_not_mixed_into_train(tmp_path):
    write_parquet(tmp_path / "partial-train" / "0000.parquet", [0, 1])
    write_parquet(tmp_path / "unsupervised" / "0000.parquet", [-1, -1])
    data = open_data(tmp_path, val_fraction=0)
    assert keys(data, "train") == ["train/000000", "train/000001"]
    assert data.notes == ("1 files that name no split were left out (0000.parquet ...)",)


def test_parquet_columns_of_other_names_and_paths_as_keys(tmp_path):
    file = write_parquet(
        tmp_path / "test" / "0000.parquet", [0, 2], image="img", label="fine_label", paths=["u/a.png", "u/b.png"]
    )
    data = open_data(tmp_path)
    assert keys(data, "test") == ["u/a.png", "u/b.png"]
    out = write_parquet(tmp_path / "out.parquet", [0, 1], paths=["../a.png", "b.png"])  # a key stays below a folder
    assert keys(open_data(out), "train") == ["train/000000", "train/000001"]
    assert data.class_names == ("0", "2")
    assert list(open_data(file).splits) == ["train"]  # a file given by itself, whose name says nothing


def test_parquet_numbers_sort_by_value_and_strings_are_names(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [10, 9, 10, 9])
    assert open_data(file).class_names == ("9", "10")
    named = open_data(write_parquet(tmp_path / "n.parquet", [1, 0, 1]), classes=["cat", "owl"], val_fraction=0)
    assert [named.class_names[s.label] for s in named.split("train")] == ["owl", "cat", "owl"]
    file = write_parquet(tmp_path / "b.parquet", ["owl", "cat"])
    assert [s.label for s in open_data(file, val_fraction=0).split("train")] == [1, 0]


def test_parquet_without_labels_and_with_pictures_in_files(tmp_path):
    file = write_parquet(tmp_path / "p.parquet", [0, 0], label=None)
    assert list(open_data(file).splits) == ["all"]
    put(tmp_path / "pics" / "1.png", 9)
    outside = pa.table(
        {
            "image": pa.array(
                [{"bytes": None, "path": "pics/1.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            )
        }
    )
    pq.write_table(outside, tmp_path / "q.parquet")
    assert open_data(tmp_path / "q.parquet").split("all")[0].source == tmp_path / "pics" / "1.png"
    pq.write_table(pa.table({"picture": pa.array([encoded(7)], pa.binary())}), tmp_path / "r.parquet")
    assert read_picture(open_data(tmp_path / "r.parquet").split("all")[0].source)[0, 0, 0] == 7


def test_wrong_parquet_gets_its_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    refused("data: .*a.parquet; cannot be read as Parquet", tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    refused("data: .*b.parquet; no column of pictures among text", tmp_path / "b.parquet")
    refused("data: empty/train; this split holds no picture", write_parquet(tmp_path / "empty.parquet", []))
    write_parquet(tmp_path / "c.parquet", [0, 5], names=["x", "y"])
    refused(r"data: .*label 5; there are 2 class names", tmp_path / "c.parquet")


# sets that come by name


def test_demo_is_the_built_in_set(monkeypatch):
    drawn = types.ModuleType("synthetic")
    drawn.SPLITS, drawn.SIZE, drawn.CLASS_NAMES = {"train": 3, "val": 2, "test": 1}, 8, ("Moth", "Argus")

    def draw_split(split, n, seed, size):
        images = np.full((n, size, size, 3), seed, np.uint8)
        return images, np.arange(n) % 2, np.ones((n, size, size), np.uint8)

    drawn.draw_split = draw_split
    monkeypatch.setitem(sys.modules, "clearwing.data.synthetic", drawn)
    monkeypatch.setattr("clearwing.data.synthetic", drawn, raising=False)
    data = open_data("demo", seed=7)
    assert data.class_names == ("Moth", "Argus")
    assert {s: len(split) for s, split in data.splits.items()} == drawn.SPLITS
    sample = data.split("train")[1]
    assert (sample.key, sample.label) == ("train/Argus/000001", 1)
    assert int(read_picture(sample.source).max()) == 7
    assert read_mask(sample.mask).sum() == 64


def test_cifar_comes_from_torchvision_and_a_failed_download_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CLEARWING_HOME", str(tmp_path))
    assert cache_home() == tmp_path

    def fake(root, train, download):
        assert Path(root) == tmp_path / "cifar10"
        count = 10 if train else 4
        images = np.zeros((count, 32, 32, 3), np.uint8)
        return types.SimpleNamespace(data=images, targets=[i % 2 for i in range(count)], classes=["plane", "car"])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    data = open_data("cifar10")
    assert data.class_names == ("plane", "car")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [8, 2, 4]
    assert keys(data, "test")[1] == "test/000001"

    def offline(*_, **__):
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    refused("data: cifar100; download failed .*put the archive in", "cifar100")


def test_labels_of_a_trained_network_are_matched_by_name(tmp_path):
    put_many(tmp_path, "test/b/1.png", "test/c/1.png")
    data = open_data(tmp_path).relabelled(["a", "b", "c"])
    assert [s.label for s in data.split("test")] == [1, 2]
    assert data.class_names == ("a", "b", "c")
    with pytest.raises(ClearwingError, match="class: c; the network does not know it"):
        open_data(tmp_path).relabelled(["a", "b"])


# the reference data


@pytest.mark.skipif(not (DATA / "leeds_butterflies").is_dir(), reason="reference data leeds_butterflies is not here")
def test_leeds_butterflies():
    data = open_data(DATA / "leeds_butterflies")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 498, "val": 167}
    assert len(data.class_names) == 10
    assert all(s.mask is not None and s.mask.stem == s.source.stem for s in data.split("val"))
    sample = data.split("val")[0]
    assert read_mask(sample.mask).shape == read_picture(sample.source).shape[1:]


@pytest.mark.skipif(not (DATA / "cifar10_jpeg").is_dir(), reason="reference data cifar10_jpeg is not here")
def test_cifar10_jpeg_copies():
    data = open_data(DATA / "cifar10_jpeg" / "test.parquet")
    assert data.class_names[3] == "cat"
    assert Counter(s.label for s in data.split("test")) == dict.fromkeys(range(10), 1000)
    assert len(set(keys(data, "test"))) == 10_000
