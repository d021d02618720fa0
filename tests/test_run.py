"""Run: what a training leaves, loads again, resumes, replays and refuses; and its decoder."""

import json
import shutil
import signal

import pytest
import torch

import clearwing as cw
from clearwing.config import TrainConfig
from clearwing.jobs.train import train
from clearwing.run import Run, free_folder, plain, write_json


def settings(photos, out, **more):
    common = {"model": "resnet8", "widths": (4, 4, 8), "size": 16, "tensorboard": False, "json": True, "device": "cpu"}
    return TrainConfig(data=str(photos), out=str(out), **(common | more))


def weights(path):
    return Run.load(path).model.state_dict()


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


def test_a_trained_run_loads(trained, photos):
    run = cw.Run.load(trained)
    assert run.class_names == ("species_0", "species_1", "species_2")
    assert run.model.class_names == run.class_names
    assert not run.model.training
    assert [row["epoch"] for row in run.metrics] == [1, 2]
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"} <= set(run.metrics[0])
    assert run.model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    files = {"config.json", "classes.json", "model.safetensors", "best.safetensors", "metrics.jsonl", "state.pt"}
    assert files <= {path.name for path in trained.iterdir()}
    assert not list(trained.rglob("*.part"))
    kept = torch.load(trained / "state.pt", weights_only=True)
    assert (kept["fit"]["epoch"], kept["fit"]["batch"]) == (2, 0)


def test_mean_and_std_are_those_of_the_training_pictures(trained, photos):
    model = cw.Run.load(trained).model
    pictures = cw.load_pictures(cw.open_data(photos).splits["train"], 40, fit="squash")
    mean, std = pictures.mean_std()
    assert model.mean.flatten().tolist() == pytest.approx(mean, abs=1e-5)
    assert model.std.flatten().tolist() == pytest.approx(std, abs=1e-5)


def test_loading_a_model_leaves_the_random_numbers_alone(trained):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cw.Run.load(trained).load_model()
    assert torch.equal(torch.rand(3), expected)


def test_what_is_no_run_is_refused(tmp_path, trained):
    with pytest.raises(cw.ClearwingError, match="clearwing train wrote"):
        Run.load(tmp_path)
    copy = shutil.copytree(trained, tmp_path / "copy")
    write_json(copy / "classes.json", ["a", "b"])
    with pytest.raises(cw.ClearwingError, match="names"):
        _ = Run.load(copy).model
    (copy / "model.safetensors").unlink()
    with pytest.raises(cw.ClearwingError, match="no weights"):
        Run.load(copy).load_model()


def test_broken_files_are_named_with_a_way_out(tmp_path, trained):
    copy = shutil.copytree(trained, tmp_path / "copy")
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(cw.ClearwingError, match=r"model\.safetensors; is broken .*; restore it, or train the run anew"):
        Run.load(copy).load_model()
    (copy / "config.json").write_text("{")
    with pytest.raises(cw.ClearwingError, match=r"config\.json; cannot be read .*; restore it, or make it anew"):
        Run.load(copy)


def test_weights_with_another_number_of_classes_are_refused(tmp_path, trained):
    copy = shutil.copytree(trained, tmp_path / "copy")
    write_json(copy / "classes.json", ["a", "b"])
    config = json.loads((copy / "config.json").read_text())
    config["model"]["num_classes"] = 2
    write_json(copy / "config.json", config)
    with pytest.raises(cw.ClearwingError, match=r"do not fit .*; take both from one run"):
        _ = Run.load(copy).model


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_seed_repeats_a_run_to_the_bit(photos, tmp_path, precision):
    for name, seed in (("one", 4), ("two", 4), ("three", 5)):
        train(settings(photos, tmp_path / name, epochs=2, seed=seed, precision=precision))
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "three"))


def test_a_killed_run_resumes_to_the_same_bits(photos, tmp_path, monkeypatch):
    from clearwing.jobs.session import Session

    train(settings(photos, tmp_path / "whole", epochs=3))
    save, saved = Session.save, []

    def die_after_two(self, state):
        save(self, state)
        saved.append(state.epoch)
        if len(saved) == 2:
            raise SystemExit("killed")

    monkeypatch.setattr(Session, "save", die_after_two)
    with pytest.raises(SystemExit, match="killed"):
        train(settings(photos, tmp_path / "part", epochs=3))
    monkeypatch.setattr(Session, "save", save)
    result = train(settings(photos, tmp_path / "part", epochs=3, resume=True))
    assert result["json"]["epochs"] == 3
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "part"))
    assert [row["epoch"] for row in Run.load(tmp_path / "part").metrics] == [1, 2, 3]


def test_resume_takes_the_settings_of_the_run_and_refuses_others(photos, tmp_path, capsys):
    from clearwing.cli import main, parse

    train(settings(photos, tmp_path / "run", epochs=1))
    _, config = parse(["train", "--out", str(tmp_path / "run"), "--resume"])
    assert (config.model, config.size, config.epochs, config.data) == ("resnet8", 16, 1, str(photos))
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]) == 0
    assert [row["epoch"] for row in Run.load(tmp_path / "run").metrics] == [1, 2]
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--size", "24"]) == 2
    assert "the run has another size" in capsys.readouterr().err
    assert main(["train", str(photos), "--out", str(tmp_path / "none"), "--resume"]) == 2


def test_a_run_under_a_time_budget_ends_in_time_and_replays_to_the_bit(photos, tmp_path):
    class Clock:
        """Half a second for every look at it."""

        now = 0.0

        def __call__(self):
            self.now += 0.5
            return self.now

    result = train(settings(photos, tmp_path / "timed", time_budget="60s"), clock=Clock())
    assert result["json"]["seconds"] <= 60
    plan = json.loads((tmp_path / "timed" / "plan.json").read_text())
    assert len(plan["progress"]) == result["json"]["steps"] > 3
    assert plan["progress"][-1] > 0.85
    again = settings(photos, tmp_path / "again", replay=str(tmp_path / "timed" / "plan.json"))
    train(again)
    assert same(weights(tmp_path / "timed"), weights(tmp_path / "again"))


def test_ctrl_c_saves_the_weights_and_exits_with_1(photos, tmp_path, monkeypatch):
    from clearwing.jobs.session import Session

    batches = Session.batches

    def stop_in_the_second_epoch(self, epoch, start):
        for batch in batches(self, epoch, start):
            if epoch == 1:
                signal.raise_signal(signal.SIGINT)
            yield batch

    train(settings(photos, tmp_path / "whole", epochs=3))
    monkeypatch.setattr(Session, "batches", stop_in_the_second_epoch)
    result = train(settings(photos, tmp_path / "run", epochs=3))
    assert result["exit_code"] == 1
    assert result["json"]["interrupted"]
    assert "--resume" in result["text"]
    assert Run.load(tmp_path / "run").model(torch.rand(1, 3, 16, 16)).shape == (1, 3)
    monkeypatch.setattr(Session, "batches", batches)
    assert train(settings(photos, tmp_path / "run", epochs=3, resume=True))["exit_code"] == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_settings_come_back_from_config_json(photos, trained, tmp_path, capsys):
    from clearwing.cli import main, parse

    _, config = parse(["train", "--config", str(trained / "config.json"), "--out", "elsewhere", "--seed", "7"])
    assert (config.model, config.size, config.epochs, config.widths) == ("resnet8", 32, 2, (4, 8, 8))
    assert (config.out, config.seed, config.data) == ("elsewhere", 7, str(photos))
    write_json(tmp_path / "wrong.json", {"modle": "resnet8"})
    assert main(["train", str(photos), "--config", str(tmp_path / "wrong.json"), "--out", "x"]) == 2
    assert "modle; did you mean model" in capsys.readouterr().err


def test_one_channel_networks_train_on_request(photos, tmp_path):
    train(settings(photos, tmp_path / "grey", epochs=1, channels=1))
    model = Run.load(tmp_path / "grey").model
    assert model.in_channels == 1
    assert model.mean.shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    "more",
    [
        {"model": "resnet18", "stem": "cifar", "widths": (32, 64, 128)},
        {"shortcut": "pad", "downsample": "conv"},
        {"optimizer": "adamw", "schedule": "cosine", "crop": "padded", "cutout": 4},
        {"optimizer": "adam", "schedule": "step", "crop": "none", "rotate": 10.0, "fit": "pad"},
    ],
)
def test_settings_reach_the_network_and_the_training(photos, tmp_path, more):
    train(settings(photos, tmp_path / "run", epochs=1, limit=6, **more))
    run = Run.load(tmp_path / "run")
    assert run.config["train"]["optimizer"] == more.get("optimizer", "sgd")
    assert run.model(torch.rand(1, 3, 16, 16)).shape == (1, 3)


def test_folders_that_hold_something_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(cw.ClearwingError, match="a file is in the way"):
        free_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(cw.ClearwingError, match="not empty"):
        free_folder(tmp_path, overwrite=False)
    assert free_folder(tmp_path / "new", overwrite=False).is_dir()


def test_json_has_no_nan():
    value = {"a": float("nan"), "b": (1, torch.tensor([2.0])), "c": float("inf")}
    assert plain(value) == {"a": None, "b": [1, [2.0]], "c": None}


def test_a_time_budget_survives_a_kill(photos, tmp_path):
    class Clock:
        now = 0.0

        def __call__(self):
            self.now += 0.5
            return self.now

    first = train(settings(photos, tmp_path / "run", time_budget="40s"), clock=Clock())
    again = train(settings(photos, tmp_path / "run", time_budget="40s", resume=True), clock=Clock())
    # Its time was used already. The bar asks the clock as well, as often as it is drawn: so the last step may be on
    # either side of the end.
    assert again["json"]["steps"] - first["json"]["steps"] in (0, 1)
    assert first["json"]["steps"] > 5


# The decoder of a run.


@pytest.fixture
def taught(trained, tmp_path):
    """A copy of the run with an untrained decoder of its own shape, and the segmenter it was saved from."""
    from clearwing.models.decoder import Decoder, Segmenter

    run = Run.load(shutil.copytree(trained, tmp_path / "copy"))
    torch.manual_seed(3)
    segmenter = Segmenter(run.load_model(), Decoder((5, 10), width=5, context=1), ["layer1", "layer3"], "fc")
    for value in segmenter.decoder.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)  # what batch norm keeps, too
    run.save_decoder(segmenter.eval(), {"pictures": 9, "course": {"lr": 0.1}, "nan": float("nan")})
    return run, segmenter


def test_a_decoder_comes_back(taught):
    run, segmenter = taught
    again = Run.load(run.path)
    assert again.decoder_about() == {"pictures": 9, "course": {"lr": 0.1}, "nan": None}
    loaded = again.load_segmenter()
    assert (loaded.layers, loaded.head) == (("layer1", "layer3"), "fc")
    assert (loaded.decoder.channels, loaded.decoder.width, loaded.decoder.context) == ((5, 10), 5, 1)
    assert not any(part.training for part in loaded.modules())
    assert same(loaded.decoder.state_dict(), segmenter.decoder.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        for a, b in zip(loaded(images), segmenter.to(memory_format=torch.channels_last)(images), strict=True):
            assert torch.equal(a, b)
    assert not list(run.path.rglob("*.part"))


def test_a_decoder_of_features_alone_comes_back(taught):
    """And one of before there was a head, whose file names none."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from clearwing.models.decoder import Decoder, Segmenter

    run, _ = taught
    run.save_decoder(Segmenter(run.load_model(), Decoder((4, 8), width=5), ["layer1", "layer3"]), {})
    path = run.file("decoder.safetensors")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    made = json.loads(metadata["made"])
    assert made.pop("head") is None
    first = run.load_segmenter()
    save_file(load_file(path), path, metadata | {"made": json.dumps(made)})
    second = run.load_segmenter()
    assert (first.head, second.head) == (None, None)
    with torch.inference_mode():
        assert torch.equal(first(torch.ones(1, 3, 32, 32))[1], second(torch.ones(1, 3, 32, 32))[1])


def test_loading_a_decoder_leaves_the_random_numbers_alone(taught):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    taught[0].load_segmenter()
    assert torch.equal(torch.rand(3), expected)


def test_a_run_without_a_decoder_says_how_to_get_one(trained):
    run = Run.load(trained)
    assert run.decoder_about() is None
    with pytest.raises(cw.ClearwingError, match=r"has no decoder; .* --pipeline decoder trains one"):
        run.load_segmenter()


@pytest.mark.parametrize("left", [0, 7, 60, -1])  # nothing, no header, half a header, a byte of the last weight short
def test_a_damaged_decoder_is_refused(taught, left):
    path = taught[0].file("decoder.safetensors")
    path.write_bytes(path.read_bytes()[:left])
    for read in (taught[0].decoder_about, taught[0].load_segmenter):
        with pytest.raises(cw.ClearwingError, match=r"is no decoder that clearwing wrote .* delete it"):
            read()


def test_weights_of_something_else_are_no_decoder(taught):
    run, _ = taught
    shutil.copy(run.file("model.safetensors"), run.file("decoder.safetensors"))
    with pytest.raises(cw.ClearwingError, match=r"is no decoder that clearwing wrote"):
        run.load_segmenter()


def test_weights_that_do_not_fit_what_the_decoder_says_of_itself_are_refused(taught):
    run, segmenter = taught
    segmenter.decoder.width += 1
    run.save_decoder(segmenter, {})
    with pytest.raises(cw.ClearwingError, match=r"does not fit what it says of itself .* delete it"):
        run.load_segmenter()


def test_overwriting_a_run_takes_its_decoder_along(taught):
    run, _ = taught
    Run.create(run.path, overwrite=True).clear()
    assert not run.file("decoder.safetensors").exists()
