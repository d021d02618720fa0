"""The settings of `train`: recipes, what contradicts what, and what a resumed run is."""

import dataclasses
import json

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from clearwing.cli import parse
from clearwing.config import TrainConfig
from clearwing.jobs import train as job
from clearwing.jobs.choices import check, choose
from clearwing.jobs.session import Session, stalled
from clearwing.models.classifier import IMAGENET_MEAN
from clearwing.models.zoo import adopt, build
from clearwing.run import Run
from clearwing.settings import from_recipe, recipes
from clearwing.types import ClearwingError
from commands import failure, run

TINY = ["--model", "resnet8", "--widths", "4", "4", "4", "--size", "16", "--epochs", "2", "--no-tensorboard"]


def settings(photos, out, **more):
    base = {"model": "resnet8", "widths": (4, 4, 4), "size": 16, "epochs": 2, "tensorboard": False, "json": True}
    return TrainConfig(data=str(photos), out=str(out), **(base | more))


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_a_set_of_settings_that_can_be_meant(name):
    _, config = parse(["train", "demo", "--recipe", name, "--out", "x"])
    for key, value in from_recipe(name).items():
        assert getattr(config, key) == value
    check(config)
    assert config.recipe == name


def test_the_command_line_wins_over_a_recipe():
    argv = ["train", "demo", "--recipe", "cifar-resnet18-20", "--out", "x"]
    _, config = parse([*argv, "--time-budget", "1m", "--no-whiten", "--cutout", "0", "--schedule", "step"])
    assert (config.time_budget, config.epochs, config.whiten, config.cutout_off) == ("1m", None, False, 0.0)
    assert (config.schedule, config.warmup, config.flip) == ("step", None, "alternate")
    check(config)
    _, config = parse(["train", "demo", "--recipe", "photos-scratch", "--size", "32", "--out", "x"])
    assert config.train_size is None


def test_recipes_of_ones_own_and_wrong_ones(tmp_path, capsys):
    own = tmp_path / "own.toml"
    own.write_text('model = "resnet8"\nwidths = [4, 8, 8]\nflip = "alternate"\n')
    _, config = parse(["train", "demo", "--recipe", str(own), "--out", "x"])
    assert (config.model, config.widths, config.flip) == ("resnet8", (4, 8, 8), "alternate")
    for text, said in (
        ('flip = "alternat"', "flip = 'alternat'; give random or alternate or none"),
        ('batch_size = "sixteen"', "batch_size = 'sixteen'; give a whole number or auto"),
        ("widths = [4, 8]", r"widths = \[4, 8\]; give a list of 3 whole numbers"),
        ("flips = true", "flips; did you mean flip"),
        ("flip =", "cannot be read"),
    ):
        own.write_text(text)
        with pytest.raises(ClearwingError, match=said):
            from_recipe(str(own))
    with pytest.raises(ClearwingError, match=r"missing\.toml; no such file"):
        from_recipe("missing.toml")
    said = failure(capsys, "train", "demo", "--recipe", "cifar", "--out", "x")
    assert "--recipe: cifar; choose one of cifar-resnet" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sam": 0.1, "accumulate": 2}, "--sam: 0.1; needs whole batches"),
        ({"thaw": 1}, "--thaw: 1; nothing is frozen"),
        ({"freeze": 1}, "--freeze: 1; an untrained network"),
        ({"cutout_off": 0.1}, "--cutout-off: 0.1; there is no cutout"),
        ({"train_size": 16, "crop": "none"}, "--train-size: 16; needs a crop"),
        ({"class_weights": "balanced", "sampling": "balanced"}, "correct twice"),
        ({"stream": True, "limit": 5}, "--limit: 5; a stream is read whole"),
        ({"warmup": 0.1, "schedule": "step"}, "--warmup: 0.1; the schedule step has none"),
        ({"save_every": "soon"}, "--save-every: soon; give a time"),
        ({"mixup": -1.0}, "--mixup: -1.0; give a number from 0"),
        ({"replay": "nowhere.json", "epochs": None}, "--replay: nowhere.json; give the plan.json"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_read(more, said, tmp_path):
    with pytest.raises(ClearwingError) as caught:
        check(settings("nowhere", tmp_path / "x", **more))
    assert said in str(caught.value)


def test_a_plan_is_replayed_with_its_own_seed_and_length_alone(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"seed": 5, "progress": [0.0, 0.5]}))
    for more, said in (
        ({"seed": 1, "epochs": None}, "is the plan of seed 5"),
        ({"seed": 5}, "has a length of its own"),
    ):
        with pytest.raises(ClearwingError, match=said):
            check(settings("demo", tmp_path / "x", replay=str(plan), **more))
    for wrong in ([0.1], {"progress": ["a"]}, {"progress": [2.0], "seed": 5}):
        plan.write_text(json.dumps(wrong))
        with pytest.raises(ClearwingError, match=r"give the plan\.json"):
            check(settings("demo", tmp_path / "x", replay=str(plan), seed=5, epochs=None))


def test_the_learning_rate_follows_the_whole_step(photos, tmp_path):
    dataset = job.open_split_data(settings(photos, tmp_path))
    one = choose(settings(photos, tmp_path, batch_size=4), dataset)
    four = choose(settings(photos, tmp_path, batch_size=4, accumulate=4), dataset)
    assert four.lr == pytest.approx(4 * one.lr)
    assert choose(settings(photos, tmp_path, batch_size=4, lr=0.3, accumulate=4), dataset).lr == 0.3


def test_a_resumed_run_keeps_the_batch_that_was_found(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "largest_batch", lambda *a: 4)
    job.train(settings(photos, tmp_path / "run", batch_size="auto", epochs=1))
    assert Run.load(tmp_path / "run").config["resolved"]["batch_size"] == 4
    monkeypatch.setattr(job, "largest_batch", lambda *a: 2)
    result = job.train(settings(photos, tmp_path / "run", batch_size="auto", resume=True))["json"]
    assert Run.load(tmp_path / "run").config["resolved"]["batch_size"] == 4
    assert result["steps"] == 2 * 3  # 12 pictures


def test_what_a_kill_cut_off_is_made_of_the_state(photos, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job.train(settings(photos, whole))
    hand_on = Session.hand_on

    def killed(self, state):
        if state.epoch == 2:
            raise SystemExit
        hand_on(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "hand_on", killed)
        with pytest.raises(SystemExit):
            job.train(settings(photos, cut))
    assert len(Run.load(cut).metrics) == 1
    job.train(settings(photos, cut, resume=True))
    assert len(Run.load(cut).metrics) == 2
    for name in ("model.safetensors", "best.safetensors"):
        one, two = load_file(whole / name), load_file(cut / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_epochs_that_are_not_saved_lose_nothing(photos, tmp_path, monkeypatch):
    every, few = tmp_path / "every", tmp_path / "few"
    more = {"epochs": 6, "lr": 0.1, "schedule": "constant"}  # so it gets worse in the end
    job.train(settings(photos, every, save_every="0.0001s", **more))
    monkeypatch.setattr("clearwing.train.fit._Running.saving_is_due", lambda self: False)
    job.train(settings(photos, few, **more))
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in Run.load(few).metrics]
    assert max(scores[:-1]) == max(scores)  # the best weights are those of an epoch after which nothing was saved
    for name in ("model.safetensors", "best.safetensors"):
        one, two = load_file(every / name), load_file(few / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(value, one[key]) for key, value in load_file(few / "model.safetensors").items())


def test_a_run_that_is_over_says_so(photos, tmp_path):
    lr = 1e-12  # so that no epoch is better than the first
    early = {"epochs": 9, "patience": 1, "lr": lr, "schedule": "constant", "jitter": 0.0, "ema": 0.99}
    told = job.train(settings(photos, tmp_path / "run", **early))
    assert told["json"]["epochs"] < 9
    assert "ended by --patience 1: the loss on val fell no more" in told["text"]
    again = job.train(settings(photos, tmp_path / "run", resume=True, **early))
    assert again["text"].startswith(f"was finished already: {told['json']['epochs']} epochs")


def test_a_run_writes_the_same_files_again(photos, tmp_path):
    for name in ("one", "two"):
        job.train(settings(photos, tmp_path / name))
    for file in ("model.safetensors", "best.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_batch_that_fits_is_no_smaller_than_the_usual_one(photos, tmp_path):
    run = job.train(settings(photos, tmp_path / "run", batch_size="auto", epochs=1))["json"]
    assert Run.load(run["run"]).config["resolved"]["batch_size"] == 16


def test_a_budget_that_is_gone_before_training_names_one_that_is_not(photos, tmp_path):
    with pytest.raises(ClearwingError, match=r"reading the pictures took \d+ s; give \d+s or more"):
        job.train(settings(photos, tmp_path / "run", epochs=None, time_budget="0.001s"))


def test_what_is_resumed_otherwise_is_refused(photos, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(capsys, "train", photos, "--out", out, *TINY)[0] == 0
    again = ["train", photos, "--out", out, "--resume"]
    assert run(capsys, *again, *TINY)[0] == 0  # the same command once more
    assert "--time-budget: 60s; the run's length was given in another way" in failure(
        capsys, *again, "--time-budget", "60s"
    )
    assert "the run has another recipe" in failure(capsys, *again, "--recipe", "photos-scratch")
    (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:1000])
    assert "state.pt; is damaged" in failure(capsys, *again)


def test_early_stopping_counts_epochs_without_a_lower_loss():
    def rows(*losses):
        return [{"val_loss": loss} for loss in losses]

    assert not stalled(rows(3, 2, 1), 1)
    assert stalled(rows(3, 2, 2), 1)
    assert not stalled(rows(3, 2, 4), 2)
    assert stalled(rows(3, 2, 4, 5), 2)
    assert not stalled([{"train_loss": 1.0}] * 5, 1)


def test_the_average_is_what_the_run_hands_on(photos, tmp_path):
    job.train(settings(photos, tmp_path / "run", ema=0.9))
    kept = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    handed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(handed[name], kept["ema"]["module"][name]) for name in handed)
    assert not all(torch.equal(handed[name], kept["model"][name]) for name in handed)


def test_frozen_stages_of_adopted_weights_stay_and_thaw(photos, tmp_path):
    job.train(settings(photos, tmp_path / "first"))
    weights = str(tmp_path / "first" / "model.safetensors")
    more = {"weights": weights, "freeze": 3, "lr": 0.1}
    job.train(settings(photos, tmp_path / "frozen", **more))
    job.train(settings(photos, tmp_path / "thawed", **more, thaw=1))
    first, frozen, thawed = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "frozen", "thawed"))
    low = [name for name in first if ".layer1." in name or ".conv1." in name[:16] or ".layer2." in name]
    assert low
    assert all(torch.equal(first[name], frozen[name]) for name in low)
    assert any(not torch.equal(first[name], thawed[name]) for name in low if ".layer2." in name)
    assert any(not torch.equal(first[name], frozen[name]) for name in first if ".layer3." in name)


def public_files():
    """Seeded doubles of files as people have them: torchvision's of ImageNet, kuangliu's and akamaster's of CIFAR."""
    torch.manual_seed(0)
    imagenet = torchvision.models.resnet18(num_classes=1000).state_dict()
    cifar = build("resnet18", 10).backbone.state_dict()
    kuangliu = {f"module.{k.replace('downsample', 'shortcut').replace('fc.', 'linear.')}": v for k, v in cifar.items()}
    narrow = build("resnet20", 10, widths=(16, 32, 64), shortcut="pad").backbone.state_dict()
    akamaster = {f"module.{k.replace('fc.', 'linear.')}": v for k, v in narrow.items()}
    return {
        "torchvision": (imagenet, "resnet18", "imagenet", IMAGENET_MEAN),
        "kuangliu": ({"net": kuangliu, "acc": 95.0, "epoch": 1}, "resnet18", "cifar", None),
        "akamaster": ({"state_dict": akamaster, "best_prec1": 91.7}, "resnet20", None, None),
    }


@pytest.mark.parametrize("kind", ["torchvision", "kuangliu", "akamaster"])
def test_public_weights_are_adopted_and_continued(kind, photos, tmp_path):
    """The file says which network it is; its trunk is taken over, its head is new, and it goes on learning."""
    held, name, stem, mean = public_files()[kind]
    path = tmp_path / f"{kind}.pth"
    torch.save(held, path)
    more = from_recipe("finetune") | {"weights": str(path), "epochs": 1, "widths": (32, 64, 128)}
    dataset = job.open_split_data(settings(photos, tmp_path))
    chosen = choose(settings(photos, tmp_path, **more | {"size": None}), dataset)
    assert chosen.size == (224 if kind == "torchvision" else 128)
    job.train(settings(photos, tmp_path / "run", **more))
    run = Run.load(tmp_path / "run")
    assert (run.config["model"]["name"], run.config["model"].get("stem")) == (name, stem)
    if mean is not None:
        assert run.model.mean.flatten().tolist() == pytest.approx(mean)
    start = adopt(path).backbone.state_dict()
    kept = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"]
    for key in ("layer1.0.conv1.weight", "layer3.0.conv2.weight"):
        before, after = start[key], kept[f"backbone.{key}"]
        assert 0 < (after - before).norm() < 0.2 * before.norm()  # it went on from there
    assert kept["backbone.fc.weight"].shape[0] == 3


def test_cutout_ends_with_the_epochs_that_are_left_without(photos, tmp_path, monkeypatch):
    seen = []
    batches = job.Pictures.batches

    def note(self, *args, augment=None, epoch=0, **more):
        if augment is not None:
            seen.append((epoch, augment.cutout))
        return batches(self, *args, augment=augment, epoch=epoch, **more)

    monkeypatch.setattr(job.Pictures, "batches", note)
    job.train(settings(photos, tmp_path / "run", epochs=4, cutout=4, cutout_off=0.5))
    assert seen == [(0, 4), (1, 4), (2, 0), (3, 0)]


def test_compiling_that_fails_goes_on_with_a_word(photos, tmp_path, monkeypatch, capsys):
    def broken(module, **more):
        raise RuntimeError("no compiler on this machine\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    config = dataclasses.replace(settings(photos, tmp_path / "run", compile=True), json=False)
    assert job.train(config)["exit_code"] == 0
    assert "--compile: RuntimeError: no compiler on this machine; going on without it" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_the_system(photos, tmp_path, monkeypatch, capsys):
    save = Session.save

    def full(self, state):
        def refuse(path, data):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
        save(self, state)

    monkeypatch.setattr(Session, "save", full)
    code, _, said = run(capsys, "train", photos, "--out", tmp_path / "run", *TINY)
    assert code == 1
    assert said.splitlines()[-1].endswith("No space left on device")
    assert not list((tmp_path / "run").rglob("*.part"))
