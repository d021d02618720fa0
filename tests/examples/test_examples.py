"""The classic assignments, as a marker would run them, on a few drawn pictures."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clearwing as cw

NAMES = ["species_0", "species_1", "species_2"]
TINY = ["--model", "resnet8", "--epochs", "1"]


def refused(capsys, code):
    """The one line in which a script says what is wrong."""
    assert code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


# train.py


def test_train_leaves_a_plain_state_dict_and_the_class_names(script, checkpoint):
    assert json.loads((checkpoint / "class_names.json").read_text()) == NAMES
    state = torch.load(checkpoint / "resnet_model.pth", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adopted, model = cw.adopt(checkpoint / "resnet_model.pth"), cw.Run.load(checkpoint).model
    assert torch.equal(adopted.mean, model.mean)  # not those of ImageNet, nor none
    with torch.inference_mode():
        torch.testing.assert_close(adopted(images), model(images), rtol=1e-5, atol=1e-5)


def test_train_plans_by_the_first_epoch_under_its_time_budget(script, tmp_path, photos):
    told = script("train")
    arguments = [str(photos), str(tmp_path / "CKPT"), "--model", "resnet8", "--size", "16", "--time-budget", "2s"]
    assert told(arguments) == 0
    run = cw.Run.load(tmp_path / "CKPT")
    assert (run.config["train"]["plan"], run.config["train"]["time_budget"]) == ("first-epoch", "2s")
    assert run.config["train"]["epochs"] is None
    assert len(run.metrics) >= 1


def test_train_refuses_in_one_line(script, capsys, tmp_path, checkpoint, photos):
    main = script("train")
    assert "no such file or folder" in refused(capsys, main([str(tmp_path / "none"), str(tmp_path / "CKPT")]))
    assert "holds a run already" in refused(capsys, main([str(photos), str(checkpoint), *TINY]))
    assert refused(capsys, main([str(photos), str(tmp_path / "a"), "--time-budget", "soon"])).startswith("train.py: ")
    with pytest.raises(SystemExit) as stopped:
        main([str(photos), str(tmp_path / "b"), "--epochs", "1", "--time-budget", "20m"])
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())


# evaluate.py


def test_evaluate_unlabelled_pictures(script, capsys, tmp_path, checkpoint, flat):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, path in enumerate(sorted(flat.iterdir())[:5]):
        shutil.copy(path, pictures / f"{i:04}.jpg")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert script("evaluate")([str(checkpoint / "resnet_model.pth"), str(pictures), "--out", str(out)]) == 0
    rows = table(out / "submission.csv")
    assert rows[0] == ["image_name", "label"]
    assert [row[0] for row in rows[1:]] == [f"{i:04}.jpg" for i in range(5)]
    assert {row[1] for row in rows[1:]} <= set(NAMES)
    masks = sorted((out / "seg_maps").iterdir())
    assert [path.name for path in masks] == [f"{i:04}.png" for i in range(5)]
    for path in masks:
        with Image.open(path) as file:
            mask = np.asarray(file)
        assert mask.shape == (50, 40)  # the picture's own size
        assert set(np.unique(mask)) == {0, 255}
        assert 0.2 <= (mask == 255).mean() < 1  # a fifth of the pixels, and what the max-pool adds
    told = capsys.readouterr()
    assert "skipped 1" in told.out
    assert "broken.jpg" in told.err
    assert "accuracy" not in told.out


def test_evaluate_prints_the_accuracy_where_labels_are_known(script, capsys, tmp_path, checkpoint, photos):
    main, weights = script("evaluate"), str(checkpoint / "resnet_model.pth")
    seen = {}
    for pipeline in ("classic", "refine"):
        assert main([weights, str(photos / "val"), "--out", str(tmp_path / pipeline), "--pipeline", pipeline]) == 0
        rows = table(tmp_path / pipeline / "submission.csv")[1:]
        right = sum(name.split("/")[0] == label for name, label in rows)
        assert len(rows) == 6
        assert f"accuracy {right / 6:.1%} (95 % interval" in capsys.readouterr().out
        seen[pipeline] = {p.name: p.read_bytes() for p in (tmp_path / pipeline / "seg_maps").rglob("*.png")}
    assert seen["classic"].keys() == seen["refine"].keys()
    assert seen["classic"] != seen["refine"]


def test_evaluate_needs_the_two_files_alone_and_labels_can_be_left_unread(script, capsys, tmp_path, checkpoint, flat):
    for name in ("resnet_model.pth", "class_names.json"):
        shutil.copy(checkpoint / name, tmp_path)
    main, weights = script("evaluate"), str(tmp_path / "resnet_model.pth")
    predicted = []
    for i, more in enumerate((["--size", "32"], ["--size", "32", "--unlabelled"])):
        assert main([weights, str(flat), "--out", str(tmp_path / str(i)), *more]) == 0
        assert ("accuracy" in capsys.readouterr().out) == (i == 0)
        predicted.append(sorted(table(tmp_path / str(i) / "submission.csv")))
    assert predicted[0] == predicted[1]
    assert len(predicted[0]) == 19


def test_evaluate_refuses_in_one_line(script, capsys, tmp_path, monkeypatch, checkpoint, flat):
    main, weights = script("evaluate"), str(checkpoint / "resnet_model.pth")
    assert "class_names.json; " in refused(capsys, main([str(tmp_path / "resnet_model.pth"), str(flat)]))
    assert "none.pth; " in refused(capsys, main([str(checkpoint / "none.pth"), str(flat)]))
    assert "no such file or folder" in refused(capsys, main([weights, str(tmp_path / "none")]))
    monkeypatch.chdir(tmp_path)  # the default is the current folder
    Path("submission.csv").write_text("mine")
    assert "submission.csv; exists" in refused(capsys, main([weights, str(flat)]))
    assert Path("submission.csv").read_text() == "mine"
    assert main([weights, str(flat), "--overwrite"]) == 0
    assert len(table(Path("submission.csv"))) == 19


# cifar10_resnet18.py


@pytest.mark.parametrize(("more", "splits"), [([], {"train": 9, "val": 3, "test": 6}), (["--val", "test"], None)])
def test_cifar10_prints_the_classes_and_draws_the_mistakes(script, capsys, tmp_path, parquet, more, splits):
    out = tmp_path / "run"
    assert script("cifar10_resnet18")([str(parquet), "--out", str(out), *TINY, *more]) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"^  (species_\d) +([\d.]+)%  (\d) of 2$", told, re.MULTILINE)
    assert [name for name, _, _ in rows] == NAMES
    assert all(float(share) == 50 * int(right) for _, share, right in rows)
    for name in ("curves", "per_class", "confusion", "misclassified"):
        assert cw.read_picture(out / "pictures" / f"{name}.png").shape[2] > 100
    run = cw.Run.load(out)
    assert run.config["data"]["splits"] == (splits or {"train": 12, "test": 6})  # all of train where test is watched
    assert run.config["resolved"]["watch"] == ("val" if splits else "test")
    assert ("training watched the test split" in (out / "report.html").read_text()) == (splits is None)
    asked = {name: run.config["train"][name] for name in ("size", "crop", "padding", "cutout", "flip", "jitter")}
    assert asked == {"size": 32, "crop": "padded", "padding": 4, "cutout": 16, "flip": "none", "jitter": 0}


def test_cifar10_refuses_in_one_line(script, capsys, tmp_path, parquet):
    arguments = ["--out", str(tmp_path / "run"), "--epochs", "0"]
    assert "--epochs: 0" in refused(capsys, script("cifar10_resnet18")([str(parquet), *arguments]))


# plant_classifier.py


def test_plant_classifier_leaves_its_checkpoint(script, tmp_path, checkpoint, flat):
    arguments = ["--weights", str(checkpoint / "resnet_model.pth"), "--out", str(tmp_path / "run"), "--size", "32"]
    assert script("plant_classifier")([str(flat), *arguments, *TINY]) == 0
    path = tmp_path / "run" / "plant_classifier.pth"
    kept = torch.load(path, weights_only=True)
    assert list(kept) == ["model_state_dict", "class_names", "train_acc", "val_acc", "test_acc", "epoch"]
    assert (kept["class_names"], kept["epoch"]) == (NAMES, 1)
    run = cw.Run.load(tmp_path / "run")
    assert run.config["data"]["splits"] == {"train": 12, "val": 3, "test": 3}
    for split in ("train", "val", "test"):
        result = json.loads(run.file("evaluation", f"{split}.json").read_text())
        assert kept[f"{split}_acc"] == result["accuracy"]
    adopted = cw.adopt(path)
    assert adopted.class_names == tuple(NAMES)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(adopted(images), run.model(images), rtol=1e-5, atol=1e-5)


def test_plant_classifier_refuses_in_one_line(script, capsys, tmp_path, flat):
    main, out = script("plant_classifier"), ["--out", str(tmp_path / "run")]
    assert "no such file or folder" in refused(capsys, main([str(tmp_path / "none"), *out]))
    assert main([str(flat), *out, "--weights", "none.pth", "--size", "32"]) == 2
    assert "weights: none.pth; no such file" in capsys.readouterr().err.splitlines()[-1]
