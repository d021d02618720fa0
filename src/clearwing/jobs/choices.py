"""What a training run is told, checked, and what follows from it and the data."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from clearwing.config import MODELS, TrainConfig, as_json
from clearwing.data.augment import Augment
from clearwing.data.sources import Dataset
from clearwing.models.zoo import BLOCKS, settings_of
from clearwing.run import Run, plain, read_json
from clearwing.settings import seconds
from clearwing.train.schedule import schedule
from clearwing.types import ClearwingError, near


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The settings that depend on the data or the model, decided."""

    size: int  # of the network's input
    train_size: int  # of the crops that are trained on
    cache_size: int  # of the pictures that are kept: larger where random resized crops are taken from them
    crop: str
    batch_size: int  # over all devices; 0 until what fits the memory is found
    lr: float
    epochs: int | None
    fine_tuned: bool
    watch: str  # the split watched while training
    model: dict[str, Any]  # what `build` is told


def check(config: TrainConfig) -> None:
    """Refuse what cannot be meant, before anything is read."""
    if config.epochs is not None and config.time_budget is not None:
        raise ClearwingError("--time-budget", config.time_budget, "give --epochs or --time-budget, not both")
    if config.model not in MODELS:
        raise ClearwingError("--model", config.model, near(config.model, MODELS))
    if config.weights not in (None, "imagenet") and not Path(str(config.weights)).is_file():
        raise ClearwingError("--weights", config.weights, "no such file; give imagenet or a weights file")
    if config.replay is not None:
        read_plan(config)
    if config.val == "train":
        raise ClearwingError("--val", "train", "watch another split than the one that is learned")
    if config.resume and config.overwrite:
        raise ClearwingError("--resume", "with --overwrite", "give one of them")
    limits: dict[str, tuple[float, float]] = {
        "epochs": (1, 1e6),
        "size": (8, 4096),
        "batch_size": (2, 65536),  # batch norm has nothing to measure in one picture
        "lr": (1e-12, 1e3),
        "label_smoothing": (0, 0.99),
        "crop_scale": (0.01, 1),
        "val_fraction": (0.01, 0.9),
        "test_fraction": (0, 0.9),
        "jitter": (0, 1),
        "cutout": (0, 4096),
        "padding": (0, 4096),
        "rotate": (0, 180),
        "momentum": (0, 0.9999),
        "weight_decay": (0, 1),
        "limit": (1, 1e9),
        "threads": (1, 4096),
        "train_size": (8, 4096),
        "freeze": (0, 100),
        "thaw": (0, 1e6),
        "layer_decay": (1e-6, 1),
        "head_factor": (1e-6, 1e6),
        "accumulate": (1, 65536),
        "warmup": (0, 0.999),
        "ema": (0, 0.99999),
        "sam": (0, 10),
        "clip": (0, 1e9),
        "patience": (0, 1e6),
        "cutout_off": (0, 1),
        "mixup": (0, 100),
        "cutmix": (0, 100),
        "devices": (1, 4096),
        "nodes": (1, 65536),
        "explain": (0, 256),
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not low <= value <= high:
            raise ClearwingError(f"--{name.replace('_', '-')}", value, f"give a number from {low:g} to {high:g}")
    if config.time_budget is not None:
        seconds(config.time_budget)
    seconds(config.save_every, "--save-every")
    schedule(config.schedule, config.warmup)
    conflicts(config)


def conflicts(config: TrainConfig) -> None:
    """Refuse settings that contradict each other."""
    if config.sam and config.accumulate > 1:
        raise ClearwingError("--sam", config.sam, "needs whole batches; leave --accumulate out")
    if config.thaw and not config.freeze:
        raise ClearwingError("--thaw", config.thaw, "nothing is frozen; give --freeze, too")
    if config.freeze and config.weights is None:
        raise ClearwingError("--freeze", config.freeze, "an untrained network has nothing to keep; give --weights")
    if config.whiten and config.weights is not None:
        raise ClearwingError("--whiten", True, "would overwrite the first convolution of --weights; leave one out")
    if config.cutout_off and not config.cutout:
        raise ClearwingError("--cutout-off", config.cutout_off, "there is no cutout; give --cutout, too")
    if (config.class_weights, config.sampling) == ("balanced", "balanced"):
        raise ClearwingError("--class-weights", "balanced", "and --sampling balanced correct twice; give one of them")
    if config.train_size is not None and config.crop == "none":
        raise ClearwingError("--train-size", config.train_size, "needs a crop; leave --crop none out")
    if config.stream and config.sampling != "shuffled":
        raise ClearwingError("--sampling", config.sampling, "a stream gives every picture once; leave it out")
    if config.stream and config.limit is not None:
        raise ClearwingError("--limit", config.limit, "a stream is read whole; leave it out")
    if config.stream and config.pattern is not None:
        raise ClearwingError("--pattern", config.pattern, "a stream is Parquet, which holds its labels; leave it out")


def read_plan(config: TrainConfig) -> list[float]:
    """The progress of every step of the run that is repeated."""
    if config.epochs is not None or config.time_budget is not None:
        raise ClearwingError("--replay", config.replay, "has a length of its own; leave --epochs and --time-budget out")
    path = Path(str(config.replay))
    plan = read_json(path) if path.is_file() else {}
    plan = plan if isinstance(plan, dict) else {}
    progress = plan.get("progress")
    if not isinstance(progress, list) or not all(isinstance(p, int | float) and 0 <= p <= 1 for p in progress):
        raise ClearwingError("--replay", config.replay, "give the plan.json of a run under a time budget")
    if plan.get("seed") != config.seed:
        raise ClearwingError("--replay", config.replay, f"is the plan of seed {plan.get('seed')}; give --seed, too")
    return progress


def same_run(run: Run, config: TrainConfig, dataset: Dataset) -> None:
    """Refuse to go on with other classes or other settings than the run began with; it may be made longer."""
    if run.class_names != dataset.class_names:
        raise ClearwingError("--resume", run.path, f"the run has the classes {', '.join(run.class_names[:10])}")
    free = {"epochs", "time_budget", "device", "devices", "nodes", "threads", "json", "tensorboard", "data", "out"}
    free |= {"resume", "overwrite", "config", "save_every", "patience", "compile"}
    before = run.config["train"]
    for name in ("epochs", "time_budget", "replay"):
        if (before.get(name) is None) != (getattr(config, name) is None) and name != "epochs":
            mend = "the run's length was given in another way; give --epochs, --time-budget or --replay as then"
            raise ClearwingError(f"--{name.replace('_', '-')}", getattr(config, name), mend)
    count, counted = len(dataset.splits["train"]), run.config["data"]["splits"].get("train")
    if count != counted:
        raise ClearwingError("--resume", run.path, f"the run has {counted} pictures to train on, DATA {count}")
    for name, value in plain(as_json(config)).items():
        if name not in free and before.get(name, value) != value:
            was = "the default" if before[name] is None else before[name]
            mend = f"the run has another {name}, {was}; leave it out, or start afresh"
            raise ClearwingError("--resume", run.path, mend)


def choose(config: TrainConfig, dataset: Dataset) -> Chosen:
    """Defaults by data set and model."""
    cifar = dataset.name.startswith("cifar")
    fine_tuned = config.weights is not None
    known = settings_of(config.weights) if config.weights not in (None, "imagenet") else {}
    imagenet = config.weights == "imagenet" or known.get("stem") == "imagenet"
    usual = 224 if imagenet else 32 if cifar else 64 if dataset.name == "demo" else 128
    size = config.size or usual
    crop = config.crop if config.crop != "auto" else ("padded" if cifar else "resized")
    n = min(len(dataset.splits["train"]), config.limit or 10**9)
    batch = 0 if config.batch_size == "auto" else config.batch_size or usual_batch(n)
    timed = config.time_budget is not None or config.replay is not None
    epochs = None if timed else config.epochs or (30 if fine_tuned else 60)
    model: dict[str, Any] = {"name": config.model, "in_channels": config.channels}
    if known:  # the file knows best
        own = ("name", "stem", "widths", "shortcut", "downsample")
        model |= {key: known[key] for key in own if key in known}
    elif config.model in BLOCKS:
        model["stem"] = config.stem or ("imagenet" if fine_tuned or size >= 96 else "cifar")
    else:
        if config.stem is not None:
            raise ClearwingError("--stem", config.stem, f"{config.model} has one stem only; leave it out")
        model |= {"widths": config.widths, "shortcut": config.shortcut, "downsample": config.downsample}
    if config.residual != "he" and not known:
        model["residual"] = config.residual
    # A quarter more than the input gives random resized crops something to take from, at 1.6 times the memory.
    train_size = config.train_size or size
    cache_size = round(max(train_size, size) * 1.25) if crop == "resized" else train_size
    watch = config.val or ("val" if "val" in dataset.splits else "test")
    lr = learning_rate(config, batch)
    return Chosen(size, train_size, cache_size, crop, batch, lr, epochs, fine_tuned, watch, model)


def usual_batch(pictures: int) -> int:
    """A power of two near a sixteenth of the pictures, from 16 to 128."""
    return min(128, max(16, 1 << round(math.log2(max(pictures / 16, 1)))))


def learning_rate(config: TrainConfig, batch: int) -> float:
    """The peak learning rate for a batch of so many pictures."""
    if config.lr is not None or config.optimizer != "sgd":
        return config.lr or 1e-3
    fine_tuned = 0.1 if config.weights is not None else 1.0
    return 0.2 * batch * config.accumulate / 128 * fine_tuned


def augmentation(config: TrainConfig, chosen: Chosen, mean: tuple[float, ...]) -> Augment:
    return Augment(
        resized_crop=(config.crop_scale, 1.0) if chosen.crop == "resized" else None,
        size=chosen.train_size,
        crop_padding=config.padding if chosen.crop == "padded" else 0,
        padding_mode=config.padding_mode,
        flip=0.0 if config.flip == "none" else 0.5,
        alternate_flip=config.flip == "alternate",
        auto=None if config.auto_augment == "none" else config.auto_augment,
        rotation=config.rotate,
        brightness=config.jitter,
        contrast=config.jitter,
        saturation=config.jitter,
        cutout=config.cutout,
        fill=mean,
    )
