"""The manifest: what is added is there, half a line is not, and other settings are refused."""

import json
from pathlib import Path

import pytest
import torch

from clearwing.jobs.manifest import Manifest
from clearwing.types import ClearwingError

SETTINGS = {"method": "layer-cam", "weights": (1.0, 0.5), "limit": None}


def block(*keys):
    return {"pictures": [{"key": key} for key in keys]}


def keys(manifest):
    return [record["key"] for one in manifest.blocks() for record in one["pictures"]]


def test_blocks_come_back_in_order_as_plain_values(tmp_path):
    manifest = Manifest(tmp_path, SETTINGS)
    assert list(manifest.blocks()) == []
    manifest.add({"pictures": [{"key": "a", "iou": torch.tensor(0.5), "share": float("nan")}], "curve": (1, 2)})
    manifest.add(block("b", "name \udcff that is no text"))
    first, second = Manifest(tmp_path, SETTINGS).blocks()
    assert first == {"pictures": [{"key": "a", "iou": 0.5, "share": None}], "curve": [1, 2]}
    assert second == block("b", "name \udcff that is no text")


def test_each_process_writes_its_own_and_reads_all(tmp_path):
    manifests = [Manifest(tmp_path, SETTINGS, rank) for rank in range(3)]
    for rank in (2, 0, 1, 0):
        manifests[rank].add(block(f"{rank}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"manifest-{rank}.jsonl" for rank in range(3)]
    for manifest in manifests:
        assert keys(manifest) == ["0", "0", "1", "2"]


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_half_a_line_is_forgotten_and_what_follows_is_whole(tmp_path, cut):
    manifest = Manifest(tmp_path, SETTINGS)
    manifest.add(block("a"))
    manifest.add(block("b" * 50))
    text = manifest.path.read_text()
    manifest.path.write_text(text[:-cut])
    again = Manifest(tmp_path, SETTINGS)
    kept = keys(again)
    assert kept in (["a"], ["a", "b" * 50])  # only the line's end may be missing
    assert (len(kept) == 1) == (cut > 1)
    again.check()
    again.add(block("c"))
    again.add(block("d"))
    assert keys(again) == [*kept, "c", "d"]


def test_a_kill_in_the_very_first_line_leaves_settings_to_check(tmp_path):
    (tmp_path / "manifest-0.jsonl").write_text('{"settings": {"meth')
    manifest = Manifest(tmp_path, SETTINGS)
    manifest.add(block("a"))
    assert keys(manifest) == ["a"]
    with pytest.raises(ClearwingError, match="method"):
        Manifest(tmp_path, SETTINGS | {"method": "saliency"}).check()


def test_other_settings_are_refused_by_name(tmp_path):
    Manifest(tmp_path, SETTINGS).check()  # nothing there yet
    Manifest(tmp_path, SETTINGS, rank=1).add(block("a"))
    Manifest(tmp_path, SETTINGS).check()  # a tuple is the list that JSON made of it
    for changed in ({"method": "saliency"}, {"weights": (1.0, 0.4)}, {"limit": 3}):
        with pytest.raises(ClearwingError, match=f"--resume: .* another {next(iter(changed))}; give another --out"):
            Manifest(tmp_path, SETTINGS | changed).check()
    with pytest.raises(ClearwingError, match="another version"):
        Manifest(tmp_path, {"method": "layer-cam", "weights": (1.0, 0.5)}).check()


def test_files_are_named_before_they_are_written(tmp_path):
    assert list(Manifest(tmp_path, SETTINGS).written()) == []
    one, two = (Manifest(tmp_path, SETTINGS, rank) for rank in (0, 1))
    one.writing([Path("a.png"), Path("sub/b.png")])
    one.add(block("a", "b"))
    two.writing([Path("c.png")])
    assert keys(one) == ["a", "b"]
    assert list(one.written()) == [tmp_path / name for name in ("a.png", "sub/b.png", "c.png")]
    Manifest(tmp_path, SETTINGS).check()
    outside = json.dumps({"writing": ["/etc/passwd", "../up.png", "sub/../../up.png", "in.png"]})
    (tmp_path / "manifest-2.jsonl").write_text(outside + "\n")  # nobody began it
    assert tmp_path / "in.png" not in set(one.written())
    (tmp_path / "manifest-2.jsonl").write_text('{"settings": {}}\n' + outside + "\n")
    assert list(one.written())[3:] == [tmp_path / "in.png"]
    (tmp_path / "manifest-mine.jsonl").write_text('{"settings": {}}\n{"writing": ["mine.png"]}\n')
    assert tmp_path / "mine.png" not in set(one.written())


def test_clearing_forgets_all_processes_and_nothing_else(tmp_path):
    for rank in range(2):
        Manifest(tmp_path, SETTINGS, rank).add(block("a"))
    (tmp_path / "mine.jsonl").write_text("mine")
    manifest = Manifest(tmp_path, SETTINGS)
    manifest.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    manifest.add(block("b"))
    assert keys(manifest) == ["b"]
    assert json.loads(manifest.path.read_text().splitlines()[0])["settings"]["method"] == "layer-cam"


def test_a_line_is_there_when_add_returns(tmp_path):
    manifest = Manifest(tmp_path, SETTINGS)
    manifest.add(block("a"))
    assert manifest.path.read_text().endswith("\n")
    assert keys(Manifest(tmp_path, SETTINGS)) == ["a"]
