"""The command `segment`: what it skips, its resumption, its processes, its pipelines."""

import functools
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from segmenting import FAST, contents, factory, segmented, table

import clearwing as cw
from clearwing.config import SegmentConfig
from clearwing.data.sources import Sample
from clearwing.jobs import decoder, segment
from clearwing.jobs.calibrate import held_out
from clearwing.jobs.manifest import Manifest
from clearwing.jobs.maskers import SURE, DecoderMasker, explained, fitted, free_masks, whole
from clearwing.masks.pipeline import RECIPES, Recipe, cut_likely, segment_with
from clearwing.masks.refine import clean
from clearwing.models.decoder import Decoder, Segmenter
from clearwing.train.devices import make_fabric
from commands import failure, run

pytestmark = pytest.mark.usefixtures("one_thread")


def tear(path, folder):
    """Write half of a picture of a folder. (What says that a file is none holds an address in memory.)"""
    whole = next(folder.rglob("*.png")).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


# What cannot be read.


def test_an_unreadable_picture_is_counted_and_the_others_are_done(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    whole = segmented(capsys, trained, photos, "--out", tmp_path / "whole", *FAST)
    key = list(whole["per_image"])[2]
    (copy / key).write_bytes(b"no picture")
    result = segmented(capsys, trained, copy, "--out", tmp_path / "out", "--batch-size", "2", *FAST)
    assert (result["skipped"], result["n"], result["scored"]) == (1, 5, 5)
    assert result["skipped_pictures"][0][0] == key
    for other, value in whole["per_image"].items():
        if other != key:
            assert result["per_image"][other] == pytest.approx(value, abs=1e-6)
    assert not (tmp_path / "out" / key).exists()
    assert key not in {row["key"] for row in table(tmp_path / "out" / "boxes.csv")}


def test_where_none_can_be_read_it_is_one_line(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    for path in (copy / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    told = failure(capsys, "segment", trained, copy, "--out", tmp_path / "out")
    assert "none of 6 can be read" in told


def test_no_batch_is_one_line(capsys, photos, trained, tmp_path):
    for size in ("0", "-1"):
        told = failure(capsys, "segment", trained, photos, "--out", tmp_path / "out", "--batch-size", size)
        assert f"--batch-size: {size}; give at least 1" in told


def test_what_is_there_stays_until_the_new_call_can_go_on(capsys, photos, trained, tmp_path, lessons):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    call = [trained, "--out", tmp_path / "out", *FAST]
    segmented(capsys, *call, photos, "--limit", "2")
    before = contents(tmp_path / "out")
    for more in ([], ["--pipeline", "decoder"], ["--retrain", "--pipeline", "decoder"]):
        told = failure(capsys, "segment", *call, broken, "--overwrite", *more)
        assert "none of 1 can be read" in told
    assert contents(tmp_path / "out") == before
    assert lessons == []  # nor is a decoder taught for nothing


WAYS = ("--cutouts", "--cutouts --format voc", "--cutouts --format coco", "--format geojson")


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("killed", [False, True])
def test_overwritten_results_leave_nothing_behind(capsys, photos, trained, tmp_path, monkeypatch, options, killed):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if killed:  # once its masks are written, before the manifest says so
            patch.setattr(Manifest, "add", lambda self, block: (_ for _ in ()).throw(KeyboardInterrupt))
        run(capsys, "segment", trained, photos, "--out", out, *FAST, *options.split())
    assert (out / "segmentation.json").exists() is not killed
    assert len(contents(out)) > 3
    mine = [Path("mine.txt"), Path("Annotations/val/species_0/mine.xml"), Path("cutouts/mine.png")]
    mine += [Path("manifest-train.jsonl"), Path("manifest-9.jsonl")]
    for path in mine:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text('{"writing": ["mine.txt"]}\n')  # no settings: not of this
    segmented(capsys, trained, photos, "--out", out, *FAST, "--limit", "1", "--overwrite")
    segmented(capsys, trained, photos, "--out", tmp_path / "fresh", *FAST, "--limit", "1")
    found = contents(out)
    kept = {path for path in mine if path.name != "manifest-9.jsonl"}
    assert found.keys() == contents(tmp_path / "fresh").keys() | kept


def test_files_that_no_call_wrote_are_not_deleted(capsys, photos, trained, tmp_path):
    """A VOC folder: its annotations bear the names that --format voc would give."""
    out = tmp_path / "VOC"
    shutil.copytree(photos / "val", out / "JPEGImages")
    for path in (out / "JPEGImages").rglob("*.png"):
        note = (out / "Annotations" / path.relative_to(out / "JPEGImages")).with_suffix(".xml")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("by hand")
    before = contents(out)
    for limit in ("4", "2"):
        call = [trained, out / "JPEGImages", "--split", "all", "--out", out, "--overwrite", "--limit", limit]
        segmented(capsys, *call, *FAST)
        assert before.items() <= contents(out).items()


def test_pictures_that_are_read_are_not_deleted(capsys, photos, trained, tmp_path):
    out = tmp_path / "out"
    segmented(capsys, trained, photos, "--out", out, "--cutouts", *FAST)
    before = contents(out)
    told = failure(capsys, "segment", trained, out / "cutouts", "--split", "all", "--out", out, "--overwrite")
    assert f"--out: {out}; would replace {out / 'cutouts'}" in told
    masks = ["--masks", out / "val", "--format", "geojson"]
    told = failure(capsys, "segment", trained, photos / "val", "--split", "all", *masks, "--out", out, "--overwrite")
    assert f"--out: {out}; would replace {out / 'val'}" in told
    assert contents(out) == before


def test_masks_are_not_put_among_the_pictures(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    for path in (copy / "val").rglob("*.png"):
        path.rename(path.with_suffix(".bmp"))  # else they would be replaced, which is refused by another name
    told = failure(capsys, "segment", trained, copy, "--out", copy, "--overwrite")
    assert f"--out: {copy}; would put masks among the pictures of {copy / 'val' / 'species_0'}" in told
    for kind in ("geojson", "coco"):  # no picture
        segmented(capsys, trained, copy, "--out", copy, "--overwrite", "--format", kind, *FAST)
    links = tmp_path / "links"
    links.mkdir()
    for path in (copy / "train" / "species_0").glob("*.png"):
        (links / f"{path.stem}.jpg").symlink_to(path)
    told = failure(capsys, "segment", trained, links, "--out", links, "--overwrite", "--split", "all")
    assert f"would put masks among the pictures of {links}" in told


def test_masks_that_do_not_fit_are_told_with_the_result(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    for path in (copy / "MASKS").rglob("*.png"):
        Image.new("L", (5, 4)).save(path)
    code, text, _ = run(capsys, "segment", trained, copy, "--out", tmp_path / "out", *FAST)
    assert code == 0
    assert "not scored: 6 of 6; val/species_0/" in text
    assert "mask of 4x5, picture of 40x56" in text


def test_a_split_that_nobody_asked_for_says_what_it_leaves_out(capsys, photos, trained, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (photos / "train").rglob("*.png"):
        shutil.copy(path, flat / f"cam{path.parent.name[-1]}_{path.name}")
    result = segmented(capsys, trained, flat, "--out", tmp_path / "part", *FAST)
    count = len(list(flat.iterdir()))
    assert f"{count - result['n']} of {count} pictures are left out; --split all takes all" in result["notes"]
    whole = segmented(capsys, trained, flat, "--split", "all", "--out", tmp_path / "all", *FAST)
    assert whole["n"] == count
    assert not any("left out" in note for note in whole["notes"])


def test_sizes_that_cannot_be_meant(capsys, photos, trained, tmp_path):
    call = ["segment", trained, photos, "--out", tmp_path / "out"]
    assert "--size: 0; give at least 1 pixel" in failure(capsys, *call, "--size", "0")
    assert "--size: 8; the decoder is taught at 32 px" in failure(capsys, *call, "--size", "8", "--pipeline", "decoder")


# A killed call.


def killed_after(monkeypatch, blocks):
    """Let Ctrl-C come in the middle of a block, when so many are done; the blocks that are made, by their keys."""
    block, made = segment.Work.block, []

    def interrupted(self, pictures, fine):
        if len(made) == blocks:
            raise KeyboardInterrupt
        made.append(pictures.keys)
        return block(self, pictures, fine)

    monkeypatch.setattr(segment.Work, "block", interrupted)
    return made


def without_speed(path):
    return re.sub(r'"pictures_per_s": .*', "", path.read_text())


@pytest.mark.parametrize(("blocks", "torn", "more"), [(2, True, []), (1, False, ["--format", "coco"])])
def test_a_killed_call_goes_on_to_the_same_bytes(capsys, photos, trained, tmp_path, monkeypatch, blocks, torn, more):
    whole, part = tmp_path / "whole", tmp_path / "part"
    copy = shutil.copytree(photos, tmp_path / "photos")
    tear(copy / "val" / "species_0" / "zzz.png", photos)  # what is skipped is told again
    call = [trained, copy, "--batch-size", "2", *more]
    segmented(capsys, *call, "--out", whole)
    with monkeypatch.context() as patch:
        killed_after(patch, blocks)
        code, _, err = run(capsys, "segment", *call, "--out", part)
    assert code == 1
    assert "stopped by Ctrl-C" in err
    assert not (part / "segmentation.json").exists()
    if torn:  # and a power cut in the middle of the next line
        with (part / "manifest-0.jsonl").open("a") as file:
            file.write('{"unscored": [], "pictures": [{"key": "val/spec')
    with monkeypatch.context() as patch:
        made = killed_after(patch, 99)
        result = segmented(capsys, *call, "--out", part, "--resume")
    assert len(made) == 4 - blocks  # the rest alone: 7 pictures, two a block
    assert result["n"] == 6
    assert result["skipped"] == 1
    assert without_speed(part / "segmentation.json") == without_speed(whole / "segmentation.json")
    names = ("segmentation.json", "manifest-0.jsonl")
    assert contents(part, but=names) == contents(whole, but=names)


def test_a_call_that_is_done_is_done_again_by_reading(capsys, photos, trained, tmp_path, monkeypatch):
    call = [trained, photos, "--limit", "3", "--out", tmp_path, *FAST]
    segmented(capsys, *call)
    before = without_speed(tmp_path / "segmentation.json")
    killed_after(monkeypatch, 0)
    assert segmented(capsys, *call, "--resume")["pictures_per_s"] is None
    assert without_speed(tmp_path / "segmentation.json") == before
    code, text, _ = run(capsys, "segment", *call, "--resume")
    assert code == 0
    assert "3 masks" in text
    assert "pictures/s" not in text


def test_a_folder_that_no_call_began_is_not_gone_on_with(capsys, photos, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "job.log").write_text("what a queue writes there")
    first = segmented(capsys, trained, photos, "--out", out, "--limit", "1", "--resume", *FAST)
    (out / "manifest-0.jsonl").unlink()
    before = contents(out)
    told = failure(capsys, "segment", trained, photos, "--out", out, "--resume")
    assert f"--resume: {out}; holds segmentation.json, and no manifest to go on from" in told
    (out / "segmentation.json").unlink()
    [file] = first["files"].values()
    assert f"holds {file}, and no manifest" in failure(capsys, "segment", trained, photos, "--out", out, "--resume")
    assert contents(out) == {name: data for name, data in before.items() if name.name != "segmentation.json"}


def test_a_call_killed_in_its_first_block_is_gone_on_with(capsys, photos, trained, tmp_path, monkeypatch):
    call = ["segment", trained, photos, "--out", tmp_path / "out", *FAST]
    with monkeypatch.context() as patch:
        killed_after(patch, 0)
        assert run(capsys, *call)[0] == 1
    (tmp_path / "out" / "half.png").write_bytes(b"what it may leave")
    assert run(capsys, *call, "--resume")[0] == 0


def test_the_same_data_by_another_name_is_gone_on_with(capsys, photos, trained, tmp_path, monkeypatch):
    call = [trained, "--out", tmp_path / "out", "--limit", "2", *FAST]
    segmented(capsys, *call, photos)
    monkeypatch.chdir(photos.parent)
    assert segmented(capsys, *call, f"./{photos.name}", "--resume")["pictures_per_s"] is None  # nothing was left to do
    other = shutil.copytree(photos, tmp_path / "other" / photos.name)
    monkeypatch.chdir(other.parent)
    assert "made with another data; give another --out" in failure(capsys, "segment", *call, photos.name, "--resume")


def test_what_is_done_and_gone_is_told(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    call = [trained, copy, "--out", tmp_path / "out", *FAST]
    first = segmented(capsys, *call)
    keys = list(first["per_image"])
    (tmp_path / "out" / first["files"][keys[0]]).unlink()
    (copy / keys[1]).unlink()
    code, _, err = run(capsys, "segment", *call, "--resume")
    assert code == 0
    assert "going on: 5 of 5 pictures are done" in err
    assert "1 of the pictures done are not in the data any more" in err
    assert f"1 of the masks made are gone from {tmp_path / 'out'}; --overwrite makes all anew" in err


def test_other_settings_are_not_joined(capsys, monkeypatch, photos, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    out = tmp_path / "out"
    call = ["segment", copy, photos, "--out", out, "--limit", "3", *FAST]
    assert run(capsys, *call)[0] == 0
    before = contents(out)
    told = failure(capsys, *call, "--resume", "--threshold", "mean")
    assert f"--resume: {out}; what is there was made with another threshold; give another --out, or --overwrite" in told
    assert "another baselines" in failure(capsys, *call[:-1], "--resume")
    assert "choose one of them" in failure(capsys, *call, "--resume", "--overwrite")
    assert "exists and is not empty" in failure(capsys, *call)
    assert contents(out) == before
    assert run(capsys, *call, "--resume", "--batch-size", "1", "--device", "cpu")[0] == 0  # these change no mask
    with monkeypatch.context() as patched:
        patched.setattr("clearwing.jobs.segment.__version__", "0.0.1")
        assert "another clearwing; give another --out" in failure(capsys, *call, "--resume")
    network = cw.Run.load(copy)
    network.model.mean.add_(0.01)
    network.save_weights(network.model.state_dict())
    assert "another weights_sha256" in failure(capsys, *call, "--resume")


def test_overwriting_forgets_what_was_there(capsys, photos, trained, tmp_path):
    segmented(capsys, trained, photos, "--out", tmp_path, *FAST)
    (tmp_path / "manifest-1.jsonl").write_text((tmp_path / "manifest-0.jsonl").read_text())  # of another process
    segmented(capsys, trained, photos, "--out", tmp_path, "--overwrite", "--limit", "1", "--format", "coco", *FAST)
    result = segmented(capsys, trained, photos, "--out", tmp_path, "--overwrite", "--limit", "2", *FAST)
    assert len(result["per_image"]) == result["n"] == 2
    assert not (tmp_path / "coco.json").exists()
    assert not (tmp_path / "manifest-1.jsonl").exists()


# Several processes.


def test_two_processes_make_what_one_makes(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    tear(copy / "val" / "species_2" / "zzz.png", photos)
    call = [trained, copy, "--batch-size", "3", "--device", "cpu"]
    one = segmented(capsys, *call, "--out", tmp_path / "one")
    two = segmented(capsys, *call, "--out", tmp_path / "two", "--devices", "2")
    assert sorted(path.name for path in (tmp_path / "two").glob("*.jsonl")) == ["manifest-0.jsonl", "manifest-1.jsonl"]
    assert one.keys() == two.keys()
    assert list(one["per_image"]) == list(two["per_image"])
    assert one["skipped_pictures"] == two["skipped_pictures"]
    assert one["per_image"] == pytest.approx(two["per_image"], abs=0.02)  # a batch of another size rounds otherwise
    assert one["mean_iou"] == pytest.approx(two["mean_iou"], abs=0.005)
    assert one["ci95"] == pytest.approx(two["ci95"], abs=0.01)
    assert one["baselines"] == pytest.approx(two["baselines"], abs=0.01)
    assert one["curve"]["n"] == two["curve"]["n"] == 6
    assert one["curve"]["mean_iou"] == pytest.approx(two["curve"]["mean_iou"], abs=1e-3)
    assert [row["key"] for row in table(tmp_path / "one" / "boxes.csv")] == [
        row["key"] for row in table(tmp_path / "two" / "boxes.csv")
    ]
    again = segmented(capsys, *call, "--out", tmp_path / "two", "--resume")  # one process goes on with what two did
    assert again["per_image"] == two["per_image"]


# Calibration.


def test_pictures_that_calibrate_are_not_scored(capsys, photos, trained, tmp_path):
    result = segmented(capsys, trained, photos, "--calibrate", "2", "--out", tmp_path)
    assert result["masks_used_for_calibration"] == 2
    assert result["threshold"]["chosen_on"]["masks"] == 2
    assert result["threshold"]["recipe"].items() >= {"method": "layer-cam", "blur": 0.04, "threshold": "otsu"}.items()
    assert not result["threshold"]["chosen_on"]["changed"]  # two masks make nothing sure
    config = SegmentConfig(run=str(trained), data=str(photos), out="", calibrate=2)
    held = held_out(config, cw.open_data(photos).splits["val"])
    assert len(held) == 2
    assert len(result["per_image"]) == result["scored"] == 4
    assert not held & set(result["per_image"])
    for name in ("everything", "edge-map", "untrained-network"):
        assert result["baseline_per_image"][name].keys() == result["per_image"].keys()
    assert json.loads((tmp_path / "segmentation.json").read_text())["masks_used_for_calibration"] == 2


def test_layers_that_are_named_are_kept_when_calibrating(capsys, photos, trained, tmp_path):
    layers = "layer1,layer2,layer3.0,layer3"  # more than the network has resolutions
    result = segmented(capsys, trained, photos, "--layers", layers, "--out", tmp_path / "one", *FAST)
    assert result["threshold"]["layers"] == layers.split(",")
    options = ["--layers", "layer2", "--calibrate", "3", "--out", tmp_path / "two", *FAST]
    result = segmented(capsys, trained, photos, *options)
    assert result["threshold"]["layers"] == ["layer2"]
    assert result["masks_used_for_calibration"] == 3


def test_a_layer_that_is_not_there_is_refused_before_any_work(capsys, photos, trained, tmp_path):
    told = failure(capsys, "segment", trained, photos, "--layers", "layer3,layre2", "--out", tmp_path / "out")
    assert "layre2" in told
    assert not (tmp_path / "out").exists()


def test_calibration_must_leave_something_to_score(capsys, photos, trained, tmp_path):
    def refused(data, *options):
        return failure(capsys, "segment", trained, data, "--out", tmp_path / "out", *options)

    for count in ("6", "7", "-1"):
        assert f"--calibrate: {count}; give 1 to 5" in refused(photos, "--calibrate", count)
    bare = shutil.copytree(photos, tmp_path / "bare")
    shutil.rmtree(bare / "MASKS")
    assert "--calibrate: 2; there are no masks" in refused(bare, "--calibrate", "2")
    assert "give 1 to 1" in refused(photos, "--limit", "2", "--calibrate", "2")
    assert not (tmp_path / "out").exists()


# The decoder.

SHORT = decoder.Course(pictures=9, steps=3, batch=4, width=4)


@pytest.fixture
def lessons(monkeypatch):
    """A course of three steps; the calls of `teach`."""
    taught, teach = [], functools.partial(decoder.teach, course=SHORT)

    def counted(run, *args):
        taught.append(run.path)
        return teach(run, *args)

    monkeypatch.setattr(decoder, "teach", counted)
    return taught


def test_the_decoder_is_trained_once_for_the_weights_of_a_run(capsys, photos, trained, tmp_path, lessons):
    copy = shutil.copytree(trained, tmp_path / "copy")
    call = [copy, photos, "--pipeline", "decoder", *FAST]
    first = segmented(capsys, *call, "--out", tmp_path / "one")
    assert len(lessons) == 1
    assert first["pipeline"] == "decoder"
    assert first["threshold"]["how"] == "probability"
    assert first["threshold"]["value"] == 0.5
    assert first["masks_used_for_calibration"] is False
    about = first["threshold"]["decoder"]
    assert about["weights_sha256"] == first["weights_sha256"]
    assert (about["pictures"], about["masks_used"]) == (9, 0)
    assert len(first["per_image"]) == 6

    segmenter = cw.Run.load(copy).load_segmenter()
    assert first["threshold"]["layers"] == list(segmenter.layers)
    samples = cw.open_data(photos).splits["val"]
    batch, fine = (next(cw.load_pictures(samples, side, fit="squash").batches(6)) for side in (32, 64))
    with torch.inference_mode():
        shares = cw.restore(segmenter(batch.images, fine.images)[1].sigmoid(), fine.geometry)
    for sample, share in zip(samples, shares, strict=True):
        mask = cw.read_mask(tmp_path / "one" / first["files"][sample.key])
        assert ((share > 0.5) != mask).float().mean() < 0.05  # bfloat16 in the job, where the processor has it

    second = segmented(capsys, *call, "--out", tmp_path / "two")
    assert len(lessons) == 1
    assert second["per_image"] == first["per_image"]
    segmented(capsys, *call, "--out", tmp_path / "three", "--retrain")
    assert len(lessons) == 2

    network = cw.Run.load(copy)
    network.model.mean.add_(0.05)
    network.save_weights(network.model.state_dict())
    code, _, err = run(capsys, "segment", *call, "--out", tmp_path / "four")
    assert code == 0
    assert "the decoder of this run is of other weights" in err
    assert len(lessons) == 3
    assert cw.Run.load(copy).decoder_about()["weights_sha256"] != about["weights_sha256"]


def test_masks_of_two_decoders_are_not_joined(capsys, photos, trained, tmp_path, lessons):
    copy = shutil.copytree(trained, tmp_path / "copy")
    call = [copy, photos, "--pipeline", "decoder", "--limit", "2", "--out", tmp_path / "out", *FAST]
    segmented(capsys, *call)
    segmented(capsys, *call, "--resume", "--retrain")  # what is done was made with the decoder that is there
    assert len(lessons) == 1
    run_ = cw.Run.load(copy)
    segmenter = run_.load_segmenter()
    segmenter.decoder.head.bias.data.add_(1)
    run_.save_decoder(segmenter, run_.decoder_about())
    assert "decoder_sha256; give another --out" in failure(capsys, "segment", *call, "--resume")


def test_the_decoder_is_there_before_several_processes_start(capsys, photos, trained, tmp_path, lessons, monkeypatch):
    copy = shutil.copytree(trained, tmp_path / "copy")

    def started(function, config, **kwargs):
        assert decoder.has_decoder(cw.Run.load(copy))  # or all would wait for one of them
        assert (function, kwargs["devices"], config.retrain) == (segment.segment, 2, False)
        return {"json": {}, "text": ""}

    monkeypatch.setattr(segment, "in_processes", started)
    call = [copy, photos, "--pipeline", "decoder", "--devices", "2", "--device", "cpu", "--out", tmp_path / "out"]
    segmented(capsys, *call, "--retrain")
    assert len(lessons) == 1
    monkeypatch.setattr(decoder, "is_child", lambda: True)
    (copy / "decoder.safetensors").unlink()
    with pytest.raises(cw.ClearwingError, match="has to be trained by one process first"):
        decoder.decoder_of(cw.Run.load(copy), "cpu", False, None)


def test_the_decoders_threshold_is_calibrated(capsys, photos, trained, tmp_path, lessons):
    copy = shutil.copytree(trained, tmp_path / "copy")
    options = ["--pipeline", "decoder", "--calibrate", "3", "--out", tmp_path / "out"]
    result = segmented(capsys, copy, photos, *options)
    assert result["masks_used_for_calibration"] == 3
    assert result["threshold"]["how"] == "probability"
    assert result["threshold"]["value"] == 0.5  # three masks make nothing sure
    assert result["threshold"]["chosen_on"]["tried"] == 101
    assert len(result["per_image"]) == 3
    assert set(result["baselines"]) >= {"everything", "edge-map", "untrained-network"}


def test_what_the_decoder_does_not_take_is_refused(capsys, photos, trained, tmp_path, lessons):
    def refused(model, *options):
        call = ["segment", model, photos, "--out", tmp_path / "out", "--pipeline", "decoder", *options]
        return failure(capsys, *call)

    told = refused(factory(tmp_path), "--size", "32")
    assert "--pipeline: decoder; is trained for a RUN; give one, or take refine" in told
    assert "--threshold: mean; the decoder has none" in refused(trained, "--threshold", "mean")
    assert "--method: saliency; the decoder has none" in refused(trained, "--method", "saliency")
    assert "--calibrate: 6" in refused(trained, "--calibrate", "6")
    assert "--refine: maxpool; the decoder takes grabcut or none" in refused(trained, "--refine", "maxpool")
    told = refused(trained, "--refine", "grabcut", "--calibrate", "3")
    assert "--refine: grabcut; --calibrate chooses the decoder's threshold" in told
    assert lessons == []


# Masks without a folder.


def test_a_recipe_fits_the_network_it_meets():
    recipe = Recipe("layer-cam", layers=3, weights=(0.1, 0.2, 0.3))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 16, 16, generator=generator)
    assert fitted(recipe, cw.build("resnet8", 3, widths=(4, 4, 8)).eval(), images)[1] == ["layer1", "layer2", "layer3"]
    small = cw.wrap(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, 2, 1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 4, 3, 2, 1),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, 3),
        )
    ).eval()
    changed, layers = fitted(recipe, small, images)
    assert len(layers) == changed.layers == 2  # it has no more
    assert changed.weights == (0.2, 0.3)  # those of the deepest
    sizes = [cw.record(small, images, [layer]).features[layer].shape[2] for layer in layers]
    assert sizes == [8, 4]  # shallow to deep
    at_input = Recipe("saliency")
    assert fitted(at_input, small, images) == (at_input, [])


def test_free_masks_of_a_classifier(trained, photos):
    model = cw.Run.load(trained).model
    [batch] = cw.load_pictures(cw.open_data(photos).splits["val"], 32, fit="squash").batches(6)
    for pipeline in ("refine", "classic"):
        recipe, layers = fitted(RECIPES[pipeline], model, batch.images)
        found = explained(model, recipe, batch, layers)
        made = free_masks(model, batch.images, pipeline)
        assert (made.shape, made.dtype) == ((6, 32, 32), torch.uint8)
        assert torch.equal(made, segment_with(recipe, found, batch.images).masks)
        assert torch.equal(free_masks(model, batch, pipeline), made)
        assert 0 < made.float().mean() < 1
    assert torch.equal(free_masks(model, batch), free_masks(model, batch, "refine"))
    with pytest.raises(cw.ClearwingError, match="pipeline: refined; did you mean refine"):
        free_masks(model, batch, "refined")


def test_free_masks_of_a_segmenter(trained):
    torch.manual_seed(0)
    model = cw.Run.load(trained).model
    segmenter = Segmenter(model, Decoder((4, 8, 8), 4), ["layer1", "layer2", "layer3"]).train()
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    made = free_masks(segmenter, images)
    assert (made.shape, made.dtype) == ((2, 32, 32), torch.uint8)
    assert segmenter.training  # as it was
    assert segmenter.decoder.training
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())
    with torch.no_grad():
        shares = segmenter.eval()(images)[1].sigmoid()
    assert torch.equal(made, clean(shares >= 0.5, shares, share=RECIPES["refine"].keep, fill=True).byte())


def test_a_decoders_masks_are_cut_along_the_edges(capsys, photos, trained, tmp_path, lessons):
    copy = shutil.copytree(trained, tmp_path / "copy")
    call = [copy, photos, "--pipeline", "decoder", *FAST]
    plain = segmented(capsys, *call, "--refine", "none", "--out", tmp_path / "plain")
    segmenter = cw.Run.load(copy).load_segmenter()
    samples = cw.open_data(photos).splits["val"]
    batch, fine = (next(cw.load_pictures(samples, side, fit="squash").batches(6)) for side in (32, 64))
    with torch.no_grad():  # of three steps, it would call nothing foreground
        segmenter.decoder.head.bias.sub_(segmenter.decoder(segmenter.features(batch.images)[1]).median())
    cw.Run.load(copy).save_decoder(segmenter, cw.Run.load(copy).decoder_about())
    cut = segmented(capsys, *call, "--refine", "grabcut", "--out", tmp_path / "cut")
    assert (plain["pipeline"], cut["pipeline"]) == ("decoder", "decoder (changed)")
    assert cut["options"] == {"refine": "grabcut"}
    assert {name: cut["threshold"][name] for name in ("how", "value", "sure")} == {
        "how": "grabcut",
        "value": None,
        "sure": list(SURE),
    }
    masker = DecoderMasker(segmenter.eval(), make_fabric("cpu").autocast, refine=True)
    shares, _ = masker.shares(batch, fine)
    masks, fell_back = cut_likely(shares, fine.images, SURE)
    assert not torch.equal(masks, shares > 0.5)
    assert cut["fell_back"] == int(fell_back.sum())
    made = masker(batch, fine)
    assert torch.equal(made.masks, masks.float())
    assert torch.equal(made.fell_back, fell_back)
    for sample, mask in zip(samples, whole(made, batch, fine), strict=True):
        assert torch.equal(mask, cw.read_mask(tmp_path / "cut" / cut["files"][sample.key]))


def test_a_place_at_the_threshold_is_foreground(trained):
    """Calibration counts it so: with saturated probabilities, its best threshold may be 1."""
    segmenter = Segmenter(cw.Run.load(trained).model, Decoder((4,), 4), ["layer1"]).eval()
    masker = DecoderMasker(segmenter, nullcontext, cut=1.0)
    shares = torch.zeros(1, 32, 32)
    shares[:, 4:20, 8:16] = 1.0
    masker.shares = lambda batch, fine: (shares, torch.zeros(1, 3))
    [batch] = cw.load_pictures([Sample("a", np.zeros((40, 40, 3), np.uint8))], 32, fit="squash").batches(1)
    [full] = whole(masker(batch, batch), batch, batch, cut=1.0)
    assert full.shape == (40, 40)
    assert full.float().mean().item() == pytest.approx(shares.mean().item(), abs=0.05)


def test_a_decoder_file_is_of_the_decoder_alone(capsys, photos, trained, tmp_path, lessons):
    copy = shutil.copytree(trained, tmp_path / "copy")
    segmented(capsys, copy, photos, "--pipeline", "decoder", "--limit", "1", "--out", tmp_path / "out", *FAST)
    held = load_file(copy / "decoder.safetensors")
    assert held.keys() == cw.Run.load(copy).load_segmenter().decoder.state_dict().keys()
