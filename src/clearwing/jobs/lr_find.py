"""The job `lr-find`: the learning rate to give to `clearwing train` with the same settings."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from clearwing.config import LrFindConfig, TrainConfig
from clearwing.jobs.choices import Chosen, check, choose
from clearwing.jobs.progress import Progress
from clearwing.jobs.session import Session
from clearwing.jobs.train import fitting, load_train_and_val, make_model, open_split_data
from clearwing.run import Run, plain, write_json
from clearwing.settings import from_file, from_recipe
from clearwing.show.draw import range_curve
from clearwing.train.devices import make_fabric
from clearwing.train.optim import SAM
from clearwing.train.range_test import RangeTest, range_test
from clearwing.types import ClearwingError

NOT_OF_TRAIN = {"out", "lr", "json", "overwrite", "config", "recipe", "data"}
"""Settings that are not handed on as they are to the command that trains."""


def lr_find(config: LrFindConfig) -> dict[str, Any]:
    """Run the test on what `clearwing train` would train; returns what the command prints. Val takes no part."""
    check_range(config)
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    dataset = open_split_data(config)
    chosen = choose(config, dataset)
    fabric = make_fabric(config.device, config.precision)
    with Progress(config.json) as progress:
        training = dataclasses.replace(dataset, splits={"train": dataset.splits["train"]})
        pictures, _ = load_train_and_val(config, training, chosen, progress)
        torch.manual_seed(config.seed)
        model = make_model(config, dataset, chosen, pictures)
        if not chosen.batch_size:
            chosen = fitting(config, chosen, model, len(pictures), fabric)
        run = Run(Path(config.out), {})  # never written
        run.class_names = dataset.class_names
        session = Session(
            config, chosen, run, model, pictures, None, fabric, progress, time.monotonic(), time.monotonic
        )
        session.tell_what_begins()
        found = range_test(
            session.model,
            session.batches,
            session.loss(),
            optimizer=session.optimizer,
            fabric=fabric,
            reference=chosen.lr,
            low=config.low,
            high=config.high,
            steps=config.steps,
            accumulate=config.accumulate,
            clip=config.clip,
            sam=SAM(config.sam) if config.sam else None,
            prepare=lambda module, epoch: session.prepare(module, 0),  # what is thawed later stays frozen here
            progress=progress.task("learning rates"),
        )
    return finish(config, chosen, found, dataset.name, [list(item) for item in pictures.skipped])


def check_range(config: LrFindConfig) -> None:
    """Refuse what cannot be meant, and files that are in the way."""
    if not 0 < config.low < config.high <= 1e6:
        raise ClearwingError("--low", f"{config.low:g} to --high {config.high:g}", "give 0 < low < high, at most 1e6")
    if not 20 <= config.steps <= 100_000:
        raise ClearwingError("--steps", config.steps, "give a number from 20 to 100000")
    if config.resume:
        raise ClearwingError("--resume", True, "the test trains a new network or that of --weights; leave it out")
    if not config.out:
        return
    path = Path(config.out)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ClearwingError("--out", path, "give a file that ends in .png or .svg")
    for file in (path, path.with_suffix(".json")):
        if file.exists() and not config.overwrite:
            raise ClearwingError("--out", file, "exists; use --overwrite or another name")


def finish(
    config: LrFindConfig, chosen: Chosen, found: RangeTest, data: str, skipped: list[list[str]]
) -> dict[str, Any]:
    """What the command prints, after writing the plot where one is asked for."""
    words = None if found.suggestion is None else command(config, found.suggestion)
    lines = [str(found), *([words] if words else [])]
    result = plain(dataclasses.asdict(found)) | {
        "command": words,
        "model": chosen.model["name"],
        "data": data,
        "batch_size": chosen.batch_size,
        "skipped": len(skipped),
        "skipped_pictures": skipped,
    }
    if config.out:
        path = Path(config.out)
        batch = f"{chosen.batch_size} x {config.accumulate}" if config.accumulate > 1 else str(chosen.batch_size)
        range_curve(
            found.lrs,
            found.losses,
            found.smoothed,
            path,
            suggestion=found.suggestion,
            minimum_tenth=found.minimum_tenth,
            title=f"{chosen.model['name']} on {data}: {config.optimizer}, batch {batch}, {chosen.train_size} px",
        )
        write_json(path.with_suffix(".json"), result)
        lines.append(f"plot: {path}")
        result["out"] = str(path)
    return {"json": result, "text": "\n".join(lines)}


def command(config: LrFindConfig, lr: float) -> str:
    """The `clearwing train` of the same settings with this learning rate."""
    usual = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    words = ["clearwing", "train", config.data]
    if config.config is not None:
        usual |= from_file(TrainConfig, config.config)
        words += ["--config", config.config]
    elif config.recipe is not None:
        usual |= from_recipe(config.recipe)
        words += ["--recipe", config.recipe]
    for name, default in usual.items():
        value, option = getattr(config, name), name.replace("_", "-")
        if name in NOT_OF_TRAIN or value == default or value is None:  # None: another option here puts it out
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join([*words, "--lr", f"{lr:.2g}", "--out", "RUN"])
