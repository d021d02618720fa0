"""The command line: exit codes, one line an error, one JSON object, and the whole path on a tiny data set."""

import json
import shutil
from pathlib import Path

import pytest

from clearwing.cli import COMMANDS, main
from commands import failure, run


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert run(capsys, "--version")[1].startswith("clearwing 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_its_options(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "--json" in out
    assert "--device" in out


def test_wrong_calls_are_one_line(capsys):
    assert "command: trian; did you mean train" in failure(capsys, "trian")
    assert "needs DATA, --out" in failure(capsys, "train")
    assert "--epochs: three; give INT" in failure(capsys, "train", "x", "--out", "y", "--epochs", "three")
    assert "--szie: no such option; did you mean --size" in failure(capsys, "train", "x", "--out", "y", "--szie", "3")
    assert "--szie: no such option" in failure(capsys, "train", "x", "more", "--szie", "3", "--out", "y")
    assert "'': one word too many" in failure(capsys, "train", "x", "", "--out", "y")
    told = failure(capsys, "train", "my", "pictures", "--out", "y")
    assert "pictures: one word too many; put names with spaces in quotes; see clearwing train --help" in told
    assert "--fit: foo; choose one of squash, crop, pad" in failure(capsys, "train", "x", "--out", "y", "--fit", "foo")
    assert "--config" in failure(capsys, "train", "--config", "nowhere.json")


def test_wrong_training_settings_are_refused_before_work(capsys, photos, tmp_path):
    def refused(*options):
        return failure(capsys, "train", photos, "--out", tmp_path / "run", *options)

    assert "--epochs: 0; give a number from 1" in refused("--epochs", "0")
    assert "not both" in refused("--epochs", "1", "--time-budget", "1m")
    assert "--time-budget: soon; give a time such as 90s" in refused("--time-budget", "soon")
    assert "model: resnet15; did you mean" in refused("--model", "resnet15")
    assert "--val: holdout" in refused("--val", "holdout")
    assert "--device: tpu" in refused("--device", "tpu")
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_or_empty(capsys, tmp_path, photos):
    assert "no such file or folder" in failure(capsys, "train", tmp_path / "none", "--out", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "empty" in failure(capsys, "train", tmp_path / "empty", "--out", tmp_path / "run")
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "species_9").mkdir()
    assert "species_9" in failure(capsys, "train", tmp_path / "photos", "--out", tmp_path / "run")


def test_a_run_that_exists_is_refused(capsys, photos, trained):
    assert "holds a run already" in failure(capsys, "train", photos, "--out", trained)
    assert "evaluate" not in failure(capsys, "evaluate", photos, photos)


def test_evaluate_writes_its_results(capsys, photos, trained):
    code, out, _ = run(capsys, "evaluate", trained, photos, "--json")
    assert code == 0
    result = json.loads(out)
    written = json.loads((trained / "evaluation" / "val.json").read_text())
    for name in ("accuracy", "ci95", "per_class", "confusion", "n", "loss", "skipped", "top5"):
        assert written[name] == result[name]
    assert sum(map(sum, result["confusion"])) == result["n"] == 6
    lines = (trained / "predictions.csv").read_text().splitlines()
    assert lines[0] == "picture,predicted,probability,true,correct"
    assert len(lines) == 7
    assert sum(line.endswith(",1") for line in lines) == round(result["accuracy"] * 6)


def test_best_weights_are_no_headline_on_val(capsys, photos, trained):
    _, out, _ = run(capsys, "evaluate", trained, photos, "--weights", "best", "--json")
    assert "quote the last weights" in json.loads(out)["notes"][0]


def test_predict_on_a_folder_without_labels(capsys, photos, trained, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photos.glob("val/*/*.png"))):
        shutil.copy(path, flat / f"picture{i}.png")
    (flat / "broken.jpg").write_bytes(b"no picture")
    code, out, err = run(capsys, "predict", trained, flat, "--json", "--top", "2")
    assert code == 0
    result = json.loads(out)
    assert len(result["pictures"]) == 6
    assert result["skipped"] == 1
    assert result["skipped_pictures"][0][0] == "broken.jpg"
    assert all(len(row["predictions"]) == 2 for row in result["pictures"])
    code, out, err = run(capsys, "predict", trained, flat)
    assert out.splitlines()[0] == "picture,rank,class,probability"
    assert "skipped broken.jpg" in err
    target = tmp_path / "said.csv"
    assert run(capsys, "predict", trained, flat, "--out", target)[0] == 0
    assert target.read_text().splitlines()[0] == "picture,rank,class,probability"
    assert "exists" in failure(capsys, "predict", trained, flat, "--out", target)
    assert "needs MODEL" in failure(capsys, "predict")


def test_explain_writes_overlays_and_raw_maps(capsys, photos, trained, tmp_path):
    out = tmp_path / "maps"
    pictures = sorted(photos.glob("val/*/*.png"))[:2]
    options = ["--methods", "grad-cam,saliency", "--layers", "layer2,layer3", "--target", "top-2", "--out", out]
    code, text, _ = run(capsys, "explain", trained, *pictures, *options, "--json")
    assert code == 0
    result = json.loads(text)
    assert result["skipped"] == 0
    assert all((out / name).is_file() for row in result["pictures"] for name in row["files"])
    from PIL import Image

    from clearwing import Explanation

    stem = pictures[0].stem
    e = Explanation.load(out / f"{stem}.grad-cam@layer2.safetensors")
    assert e.maps.shape == (1, 2, 32, 32)
    assert e.layer == "layer2"
    with Image.open(out / f"{stem}.saliency.1.png") as image:
        assert image.size == (56, 40)  # the picture's own size
    assert "exists and is not empty" in failure(capsys, "explain", trained, pictures[0], "--out", out)


def test_explain_names_what_is_near(capsys, photos, trained, tmp_path):
    picture = next(photos.glob("val/*/*.png"))

    def refused(*options):
        return failure(capsys, "explain", trained, picture, "--out", tmp_path / "out", *options)

    assert "gradcam; did you mean grad-cam" in refused("--methods", "gradcam")
    assert "layr3; did you mean layer3" in refused("--layers", "layr3")
    assert "species_7" in refused("--target", "species_7")
    assert "nowhere" in failure(capsys, "explain", "nowhere", picture, "--out", tmp_path / "out")


@pytest.mark.parametrize("pipeline", ["refine", "classic"])
def test_segment_writes_masks_in_the_original_size_and_scores_them(capsys, photos, trained, tmp_path, pipeline):
    from PIL import Image

    from clearwing import read_mask

    out = tmp_path / "masks"
    code, text, _ = run(capsys, "segment", trained, photos, "--pipeline", pipeline, "--out", out, "--json")
    assert code == 0
    result = json.loads(text)
    written = json.loads((out / "segmentation.json").read_text())
    for name in ("mean_iou", "ci95", "per_image", "threshold", "masks_used_for_calibration", "baselines", "skipped"):
        assert written[name] == result[name]
    assert result["masks_used_for_calibration"] is False
    assert result["pipeline"] == pipeline
    assert set(result["threshold"]) >= {"how", "value"}
    names = {"everything", "centre-gaussian", "centre-box-grabcut", "edge-map", "untrained-network"}
    assert set(result["baselines"]) == names
    masks = sorted(out.rglob("*.png"))
    assert len(masks) == len(result["per_image"]) == 6
    for path in masks:
        with Image.open(path) as image:
            assert image.size == (56, 40)
            assert set(image.getdata() if not hasattr(image, "get_flattened_data") else image.get_flattened_data()) <= {
                0,
                255,
            }
    key = next(iter(result["per_image"]))
    truth = read_mask(photos / "MASKS" / key.replace(".jpg", ".png"))
    mask = read_mask(out / result["files"][key])
    both, either = (truth & mask).sum(), (truth | mask).sum()
    assert result["per_image"][key] == pytest.approx(float(both / either), abs=1e-6)


def test_masks_that_do_not_fit_are_named_and_counted(capsys, photos, trained, tmp_path):
    from PIL import Image

    shutil.copytree(photos, tmp_path / "photos")
    masks = sorted((tmp_path / "photos" / "MASKS").rglob("*.png"))
    Image.new("L", (9, 9)).save(masks[0])
    masks[1].unlink()
    code, out, _ = run(capsys, "segment", trained, tmp_path / "photos", "--out", tmp_path / "out", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["scored"] == 4
    reasons = [reason for _, reason in result["unscored"]]
    assert any("mask of 9x9, picture of 40x56" in reason for reason in reasons)
    assert any("no mask" in reason for reason in reasons)
    (tmp_path / "nomasks").mkdir()
    wrong = ["segment", trained, photos, "--masks", tmp_path / "nomasks", "--out", tmp_path / "other"]
    assert "nomasks" in failure(capsys, *wrong)


def test_evaluate_with_masks_segments_too(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    code, out, _ = run(capsys, "evaluate", copy, photos, "--masks", photos / "MASKS", "--json")
    assert code == 0
    assert json.loads(out)["n"] == 6
    masks = json.loads((copy / "segmentation" / "val" / "segmentation.json").read_text())
    assert masks["scored"] == 6
    assert json.loads(out)["mean_iou"] == masks["mean_iou"]
    text = run(capsys, "evaluate", copy, photos, "--masks", photos / "MASKS")[1]
    assert f"mean IoU {masks['mean_iou']:.3f} (95 % interval" in text
    assert "top-5" not in text  # of three classes
    best = ["evaluate", copy, photos, "--masks", photos / "MASKS", "--weights", "best"]
    assert "--masks: with --weights best; segment uses the last weights" in failure(capsys, *best)


def test_explain_on_networks_that_are_not_ours(capsys, photos, tmp_path):
    factory = tmp_path / "mine.py"
    factory.write_text(
        "import torch, torch.nn.functional as F\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.two = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 3, 2, 1)\n"
        "        self.fc = torch.nn.Linear(8, 4)\n"
        "    def forward(self, x):\n"
        "        x = F.relu(self.two(F.relu(self.one(x))))\n"
        "        return self.fc(x.mean((2, 3)))\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Net().eval()\n"
    )
    picture = next(photos.glob("val/*/*.png"))
    methods = "saliency,grad-cam,layer-cam,guided-backprop,guided-grad-cam"
    for model, size in ((f"{factory}:make", 32), ("torchvision:resnet18:random", 64)):
        out = tmp_path / str(size)
        options = ["--methods", methods, "--size", size, "--out", out, "--json"]
        code, text, _ = run(capsys, "explain", model, picture, *options)
        assert code == 0, text
        assert len(json.loads(text)["methods"]) == 5
    from clearwing import Explanation

    plain = Explanation.load(next((tmp_path / "32").glob("*.saliency.safetensors")))
    guided = Explanation.load(next((tmp_path / "32").glob("*.guided-backprop.safetensors")))
    assert not plain.channels.allclose(guided.channels)  # functional ReLUs are guided, too


def test_segment_refuses_what_it_does_not_know(capsys, photos, trained, tmp_path):
    def refused(*options):
        return failure(capsys, "segment", trained, photos, "--out", tmp_path / "out", *options)

    assert "--threshold: otzu; did you mean otsu" in refused("--threshold", "otzu")
    assert "--threshold: percentile:101; give a percentile" in refused("--threshold", "percentile:101")
    assert "--split: holdout" in refused("--split", "holdout")
    assert "salience; did you mean saliency" in refused("--method", "salience")
    assert "--pipeline: default; choose one of refine, decoder, classic" in refused("--pipeline", "default")


def test_an_unreadable_picture_among_many_is_counted(capsys, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    broken = next((tmp_path / "photos" / "train").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:40])
    options = ["--model", "resnet8", "--widths", "4", "4", "4", "--size", "16", "--epochs", "1"]
    code, out, _ = run(capsys, "train", tmp_path / "photos", "--out", tmp_path / "run", *options, "--json")
    assert code == 0
    assert json.loads(out)["skipped"] == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["skipped"][0][0].endswith(broken.name)


def test_json_keeps_stdout_for_the_object_alone(capsys, photos, trained):
    code, out, _ = run(capsys, "report", trained, photos, "--json")
    assert code == 0
    assert json.loads(out)["report"].endswith("report.html")
    assert out.count("\n") == 1


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_and_true_masks_are_never_replaced(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    before = contents(copy)
    segmented = ["segment", trained, copy, "--overwrite", "--out"]
    assert "--out" in failure(capsys, *segmented, copy)
    assert "would replace" in failure(capsys, *segmented, copy / "MASKS")
    folder = next(copy.glob("val/*"))
    explained = ["explain", trained, folder, "--overwrite", "--out"]
    assert "would replace" in failure(capsys, *explained, folder)
    shutil.copy(next(folder.glob("*.png")), tmp_path / "a.grad-cam.png")
    shutil.copy(next(folder.glob("*.png")), tmp_path / "a.jpg")
    pictures = [tmp_path / "a.jpg", tmp_path / "a.grad-cam.png"]
    assert "would replace" in failure(capsys, "explain", trained, *pictures, "--overwrite", "--out", tmp_path)
    assert contents(copy) == before
    assert run(capsys, *segmented, tmp_path / "masks")[0] == 0
    assert run(capsys, *segmented, tmp_path / "masks")[0] == 0  # its own earlier masks may go


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory, photos):
    """A run on a flat folder whose files are called by an unusual pattern; the folder and the run."""
    folder = tmp_path_factory.mktemp("flat") / "pictures"
    folder.mkdir()
    for path in sorted(photos.glob("*/species_*/*.png")):
        shutil.copy(path, folder / f"{path.stem}-{path.parent.name}.png")
    options = ["--pattern", "{id}-{class}.png", "--classes", "species_2,species_0,species_1", "--epochs", "1"]
    small = ["--model", "resnet8", "--widths", "4", "8", "8", "--size", "32", "--val-fraction", "0.4", "--seed", "3"]
    out = folder.parent / "run"
    assert main(["train", str(folder), "--out", str(out), *options, *small, "--json"]) == 0
    return folder, out


def test_segment_takes_the_val_slice_of_the_run(capsys, flat_run, tmp_path):
    folder, trained = flat_run
    _, out, _ = run(capsys, "evaluate", trained, folder, "--json")
    scored = json.loads(out)
    keys = {line.split(",")[0] for line in (trained / "predictions.csv").read_text().splitlines()[1:]}
    code, out, _ = run(capsys, "segment", trained, folder, "--out", tmp_path / "own", "--json")
    assert code == 0
    made = json.loads(out)
    assert set(made["files"]) == keys
    assert made["split"] == scored["split"] == "val"
    foreign = tmp_path / "foreign"  # names that the run's pattern and classes do not fit
    foreign.mkdir()
    for name in ("one.png", "two.png"):
        shutil.copy(next(folder.glob("*.png")), foreign / name)
    code, out, _ = run(capsys, "segment", trained, foreign, "--out", tmp_path / "other", "--json")
    assert code == 0
    made = json.loads(out)
    assert made["split"] == "all"
    assert made["data"] == str(foreign.resolve())
    assert made["notes"] == []
    assert "has no labels" in failure(capsys, "evaluate", trained, foreign)


def test_all_of_the_runs_own_data_is_noted(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    note = "all holds pictures that the network was trained on"
    assert note in json.loads(run(capsys, "evaluate", copy, photos, "--split", "all", "--json")[1])["notes"]
    assert note not in json.loads(run(capsys, "evaluate", copy, photos, "--json")[1])["notes"]
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert note not in json.loads(run(capsys, "evaluate", copy, moved, "--split", "all", "--json")[1])["notes"]


def test_report_leaves_out_results_of_other_weights(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert run(capsys, "evaluate", copy, photos, "--masks", photos / "MASKS")[0] == 0
    written = json.loads((copy / "evaluation" / "val.json").read_text())
    assert len(written["weights_sha256"]) == 16
    assert written["data"] == str(photos.resolve())
    code, _, err = run(capsys, "report", copy, photos)
    assert (code, "other weights" in err) == (0, False)
    assert "Mean IoU" in (copy / "report.html").read_text()
    shutil.copy(copy / "model.safetensors", copy / "kept")
    shutil.copy(copy / "best.safetensors", copy / "model.safetensors")
    if (copy / "kept").read_bytes() == (copy / "model.safetensors").read_bytes():
        from clearwing import Run

        changed = Run.load(copy)
        changed.model.mean.add_(0.01)
        changed.save_weights(changed.model.state_dict())
    code, _, err = run(capsys, "report", copy, photos)
    assert code == 0
    assert "evaluation/val.json are of other weights" in err
    assert "segmentation/val are of other weights" in err
    assert "Mean IoU" not in (copy / "report.html").read_text()


def test_report_of_moved_data_shows_the_masks(capsys, photos, trained, tmp_path):
    copy, moved = shutil.copytree(trained, tmp_path / "copy"), shutil.copytree(photos, tmp_path / "moved")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["where"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    assert run(capsys, "segment", copy, moved, "--out", copy / "masks", "--threshold", "mean")[0] == 0
    moved = moved.rename(tmp_path / "again")
    code, _, _ = run(capsys, "report", copy, moved)
    assert code == 0
    assert (copy / "pictures" / "masks.png").is_file()
    assert "--threshold mean --out" in (copy / "report.html").read_text()


def test_a_changed_pipeline_is_called_so(capsys, photos, trained, tmp_path):
    def pipeline(*options):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        code, text, _ = run(capsys, "segment", trained, photos, "--limit", "1", "--out", out, *options, "--json")
        assert code == 0
        return json.loads(text)["pipeline"]

    assert pipeline("--threshold", "auto") == "refine"
    assert pipeline("--threshold", "mean") == "refine (changed)"
    assert pipeline("--layers", "layer2,layer3") == "refine (changed)"
    assert pipeline("--pipeline", "classic", "--refine", "grabcut") == "classic (changed)"


def test_one_scored_picture_has_no_interval(capsys, photos, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    code, text, _ = run(capsys, "segment", copy, photos, "--limit", "1", "--out", copy / "masks")
    assert code == 0
    written = json.loads((copy / "masks" / "segmentation.json").read_text())
    assert written["ci95"] is None
    assert all(row["ci95"] is None for row in written["differences"].values())
    assert f"mean IoU {written['mean_iou']:.3f} (n = 1)" in text
    assert run(capsys, "report", copy, photos)[0] == 0


def test_a_report_shows_the_masks_that_were_made_and_no_others(capsys, photos, trained, tmp_path):
    copy, bare = shutil.copytree(trained, tmp_path / "copy"), shutil.copytree(photos, tmp_path / "bare")
    shutil.rmtree(bare / "MASKS")
    assert run(capsys, "segment", copy, bare, "--limit", "2", "--out", copy / "masks")[0] == 0
    assert run(capsys, "report", copy, bare)[0] == 0


def test_predict_takes_every_picture_below_a_folder(capsys, photos, trained, tmp_path):
    source = next(photos.glob("val/*/*.png"))
    for name in ("top.png", "sub/one.png", "sub/deep/two.PNG", ".hidden/no.png"):
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
    code, out, _ = run(capsys, "predict", trained, tmp_path / "mixed", source, "--json")
    assert code == 0
    keys = [row["picture"] for row in json.loads(out)["pictures"]]
    assert keys == ["sub/deep/two.PNG", "sub/one.png", "top.png", source.name]
    assert "the run knows its classes" in failure(capsys, "predict", trained, source, "--classes", "a,b,c")


def test_keys_and_result_names_are_unique():
    from clearwing.data.sources import Sample
    from clearwing.jobs.inputs import result_paths, unique_keys

    names = ["x.jpg", "x.jpg", "2/x.jpg", "x.jpg"]
    assert [s.key for s in unique_keys([Sample(name, b"") for name in names])] == [
        "x.jpg",
        "3/x.jpg",
        "2/x.jpg",
        "4/x.jpg",
    ]
    for keys in (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg.png", "a.png", "a.jpg"], ["b/a.jpg", "a.jpg", "../a.jpg"]):
        assert len(set(result_paths(keys, ".png").values())) == 3
    assert result_paths(["b/a.jpg"], ".png") == {"b/a.jpg": Path("b/a.png")}


def test_a_class_name_wins_over_a_number():
    from clearwing.jobs.explain import read_target

    assert read_target("3", ("7", "3")) == "3"
    assert read_target("3,0", ("7", "3")) == ("3", 0)
    assert read_target("1,0", ("a", "b")) == (1, 0)


def test_a_network_that_is_not_finite_gives_json(capsys, photos, tmp_path):
    factory = tmp_path / "broken.py"
    factory.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.mean((2, 3)) * float('nan')\n"
        "def make():\n"
        "    return Net().eval()\n"
    )
    picture = next(photos.glob("val/*/*.png"))
    code, out, _ = run(capsys, "predict", f"{factory}:make", picture, "--size", "16", "--json")
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail)["pictures"][0]["predictions"][0]["probability"] is None


def test_explain_into_a_folder_below_the_pictures_passes_its_own_results_over(capsys, photos, trained, tmp_path):
    folder = shutil.copytree(photos / "val", tmp_path / "val")
    command = ["explain", trained, folder, "--methods", "saliency", "--out", folder / "maps", "--overwrite", "--json"]
    for _ in range(2):
        code, out, _ = run(capsys, *command)
        assert code == 0
        assert len(json.loads(out)["pictures"]) == 6
    assert "--larger-than" in failure(
        capsys, "explain", trained, folder, "--layers", "layer2", "--larger-than", "3", "--out", tmp_path / "other"
    )
