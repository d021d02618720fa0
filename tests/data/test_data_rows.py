"""Pictures in Parquet files are read when they are asked for, a few at a time, and in any order."""

import io
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clearwing.data import rows
from clearwing.data.loader import load_pictures
from clearwing.data.rows import ParquetRow
from clearwing.data.sources import open_data
from clearwing.types import ClearwingError

PLAIN = {"compression": "none", "use_dictionary": False}


@pytest.fixture(autouse=True)
def fresh():
    rows._reader.cache_clear()


def png(value):
    file = io.BytesIO()
    Image.new("L", (2, 2), value).save(file, "PNG")
    return file.getvalue()


def put(path, values, *, struct=True, group=100, **settings):
    held = [{"bytes": value, "path": f"{i}.png"} if struct else value for i, value in enumerate(values)]
    pq.write_table(pa.table({"image": held, "label": [0] * len(held)}), path, row_group_size=group, **settings)
    return path


def sources(path):
    return [sample.source for sample in open_data(path, val_fraction=0).split("train")]


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("order", ["forward", "back", "mixed"])
def test_every_row_is_found_in_any_order(tmp_path, monkeypatch, struct, order):
    monkeypatch.setattr(rows, "KEPT", 40)
    values = [bytes([i, 7]) * (i + 1) for i in range(250)]
    found = sources(put(tmp_path / "a.parquet", values, struct=struct))
    assert all(isinstance(source, ParquetRow) for source in found)
    places = list(range(250))[:: -1 if order == "back" else 1]
    if order == "mixed":
        Random(0).shuffle(places)
    for i in places:
        assert found[i].read_bytes() == values[i]


def test_opening_reads_no_picture_and_threads_read_a_file_once(tmp_path, monkeypatch):
    begun = []
    begin = rows._Reader.begin
    monkeypatch.setattr(rows._Reader, "begin", lambda self, *at: (begun.append(at), begin(self, *at))[1])
    data = open_data(put(tmp_path / "a.parquet", [png(i % 256) for i in range(300)]), val_fraction=0)
    assert begun == []
    pictures = load_pictures(data.split("train"), 2, workers=2)
    assert pictures.images[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]
    assert set(begun) == {(0, 0)}
    assert len(begun) <= 4  # two threads may both be the first to come to the file


def test_a_long_row_group_is_read_a_page_at_a_time(tmp_path):
    noise = np.random.default_rng(0).bytes(2_000)
    values = [noise[i % 999 :] + noise for i in range(8_000)]
    total = sum(map(len, values))
    found = sources(put(tmp_path / "a.parquet", values, group=8_000, **PLAIN))
    before, most = pa.total_allocated_bytes(), 0
    for source, value in zip(found, values, strict=True):
        assert source.read_bytes() == value
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 0.5 * total


def test_pictures_that_may_lie_outside_are_looked_at_when_the_file_is_opened(tmp_path):
    values = [png(1), None]
    found = sources(put(tmp_path / "a.parquet", values))
    assert found == [values[0], tmp_path / "1.png"]
    untold = put(tmp_path / "b.parquet", [png(1), png(2)], write_statistics=False)
    assert sources(untold) == [png(1), png(2)]


def test_a_file_that_breaks_or_goes_makes_its_pictures_unreadable(tmp_path):
    path = put(tmp_path / "a.parquet", [png(i) for i in range(40)], group=20, **PLAIN)
    samples = open_data(path, val_fraction=0).split("train")
    whole = path.read_bytes()
    at = whole.index(png(30)) - 400
    path.write_bytes(whole[:at] + bytes(300) + whole[at + 300 :])
    pictures = load_pictures(samples, 2)
    assert 0 < len(pictures.skipped) <= 20
    assert pictures.images[:20, 0, 0, 0].tolist() == list(range(20))
    path.unlink()
    with pytest.raises(OSError, match=r"a\.parquet"):
        samples[0].source.read_bytes()
    with pytest.raises(ClearwingError, match=r"none of 40 can be read"):
        load_pictures(samples, 2)
    path.write_bytes(whole)
    assert samples[39].source.read_bytes() == png(39)


def test_a_file_that_was_written_anew_gives_its_new_pictures(tmp_path):
    path = put(tmp_path / "a.parquet", [png(1), png(2)])
    assert [source.read_bytes() for source in sources(path)] == [png(1), png(2)]
    put(path, [png(3), png(4), png(5)])
    assert [source.read_bytes() for source in sources(path)] == [png(3), png(4), png(5)]


def test_a_row_far_on_is_reached_from_its_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "KEPT", 64)
    found = sources(put(tmp_path / "a.parquet", [bytes([i % 256]) for i in range(1000)]))
    begun = []
    begin = rows._Reader.begin
    monkeypatch.setattr(rows._Reader, "begin", lambda self, *at: (begun.append(at), begin(self, *at))[1])
    assert [found[i].read_bytes() for i in (0, 950, 951, 20)] == [bytes([i % 256]) for i in (0, 950, 951, 20)]
    assert begun[1:] == [(0, 0), (9, 900), (0, 0)]


def test_few_large_pictures_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MEMORY", 100_000)
    values = [bytes([i]) * 10_000 for i in range(96)]
    found = sources(put(tmp_path / "a.parquet", values))
    for source, value in zip(found, values, strict=True):
        assert source.read_bytes() == value
    reader = rows._reader(found[0].path, found[0].column, found[0].child)
    assert len(reader.kept) == rows.PART
    assert reader.size == sum(map(len, reader.kept))
    assert found[3].read_bytes() == values[3]
