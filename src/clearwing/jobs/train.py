"""The job `train`: pictures to a trained Run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from clearwing.config import TrainConfig, as_json, split_settings
from clearwing.data.loader import Pictures, load_pictures
from clearwing.data.preprocess import square
from clearwing.data.sources import BUILT_IN, Dataset, Sample, open_data
from clearwing.data.stream import Stream, open_stream
from clearwing.jobs.choices import Chosen, check, choose, learning_rate, same_run, usual_batch
from clearwing.jobs.environment import environment
from clearwing.jobs.inputs import limited
from clearwing.jobs.progress import Progress
from clearwing.jobs.session import Session, stalled
from clearwing.measure.accuracy import wilson_interval
from clearwing.models.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, wrap
from clearwing.models.whiten import whiten_stem
from clearwing.models.zoo import build, settings_of
from clearwing.run import Run, write_json
from clearwing.settings import class_list
from clearwing.train.collectives import everyone, one_fails_all_stop
from clearwing.train.devices import check_devices, is_child, is_first, make_fabric
from clearwing.train.fit import FitState
from clearwing.train.memory import largest_batch
from clearwing.train.processes import in_processes
from clearwing.types import ClearwingError

PATCHES = 500
"""Pictures whose patches say how the first convolution is to whiten."""
WATCHED = 5000
"""Pictures of the watched split that a run with --stream holds in memory, at most."""


def train(
    config: TrainConfig, *, clock: Callable[[], float] = time.monotonic, began: float | None = None
) -> dict[str, Any]:
    """Train as `config` says; returns what the command prints. A time budget counts from `began`, or from now.

    With several processes, the first one writes and tells; the others return their exit code alone.
    """
    began = clock() if began is None else began
    check(config)
    run = Run.load(config.out) if config.resume else None
    dataset = open_split_data(config)
    chosen = choose(config, dataset)
    if run is None and is_first():
        Run.create(config.out, overwrite=config.overwrite)  # refused before anything is begun
    if not is_child():
        check_devices(config.device, config.devices)
        if config.devices > 1 or config.nodes > 1:
            result = in_processes(train, config, devices=config.devices, nodes=config.nodes, began=began)
            return result or {"exit_code": 0}
    fabric = make_fabric(config.device, config.precision, devices=config.devices, nodes=config.nodes)
    if config.threads:
        torch.set_num_threads(config.threads)
    if run is not None:
        same_run(run, config, dataset)
        before = run.config["resolved"]  # the batch may have been found by the memory, or by the number of processes
        chosen = dataclasses.replace(chosen, batch_size=int(before["batch_size"]), lr=float(before["lr"]))
    chosen = shared_equally(config, chosen, fabric.world_size, run is not None)
    run = run or Run(Path(config.out), {})
    with one_fails_all_stop(fabric), Progress(config.json or not fabric.is_global_zero) as progress:
        if (name := chosen.model["name"]) != config.model:
            progress.say(f"note: {config.weights} holds a {name}, which is trained")
        pictures, watched = load_train_and_val(config, dataset, chosen, progress)
        torch.manual_seed(config.seed)
        model = make_model(config, dataset, chosen, pictures)
        if not chosen.batch_size:
            chosen = fitting(config, chosen, model, len(pictures), fabric)
        if fabric.is_global_zero:
            run.sweep()
            if not config.resume:
                run.clear()  # an earlier run goes only now, when this one is known to begin
            run.write_config(
                train=as_json(config) | {"resume": False, "overwrite": False, "config": None},
                model=chosen.model | {"num_classes": len(dataset.class_names), "input_size": chosen.size},
                resolved=dataclasses.asdict(chosen),
                data=describe(dataset, pictures, watched, config),
                environment=environment(fabric),
            )
            write_json(run.file("classes.json"), list(dataset.class_names))
        fabric.barrier()
        session = Session(config, chosen, run, model, pictures, watched, fabric, progress, began, clock)
        try:
            state = session.train()
        except torch.OutOfMemoryError as error:
            mend = "a step does not fit the memory of the device; give a smaller one, or auto"
            raise ClearwingError("--batch-size", chosen.batch_size, mend, exit_code=1) from error
        if config.stream:  # it finds only now what cannot be read, each process among its own pictures
            found = describe(dataset, pictures, watched, config)
            found["skipped"] = sorted({tuple(item) for part in everyone(fabric, found["skipped"]) for item in part})
            if fabric.is_global_zero:
                run.write_config(data=found)
    if not fabric.is_global_zero:
        return {"exit_code": int(state.interrupted)}
    return summarise(run, session, state, clock() - began)


@dataclasses.dataclass(frozen=True)
class Streamed(Dataset):
    """Data whose train split is a stream; `splits` says how many pictures there are, not which."""

    stream: Stream | None = None
    watched: Stream | None = None  # None: what the stream holds out


def open_streamed(config: TrainConfig) -> Streamed:
    """The data of a run with --stream: nothing but its labels is read."""
    settings: dict[str, Any] = {"fit": config.fit, "channels": config.channels, "classes": class_list(config.classes)}
    found = open_stream(config.data, size=config.size or 128, **settings)
    watch = config.val or ("val" if "val" in found.splits else None)
    if watch is None:
        stream = open_stream(config.data, size=found.size, **settings, holdout=config.val_fraction, seed=config.seed)
        counts, watched = {"train": len(stream), "val": len(found) - len(stream)}, None
    else:
        stream, watched = found, open_stream(config.data, watch, size=found.size, **settings)
        counts = {"train": len(found), watch: len(watched)}
    splits = cast("dict[str, tuple[Sample, ...]]", {name: range(count) for name, count in counts.items()})
    return Streamed(stream.name, stream.class_names, splits, stream.notes, stream, watched)


def open_split_data(config: TrainConfig) -> Dataset:
    """The data with a train split and one to watch."""
    if config.stream:
        return open_streamed(config)
    dataset = open_data(
        config.data,
        classes=class_list(config.classes),
        pattern=config.pattern,
        **split_settings(config),
    )
    if "train" not in dataset.splits:
        raise ClearwingError(
            "DATA", config.data, f"has no pictures with labels to train on ({', '.join(dataset.splits)})"
        )
    if config.val is not None and config.val not in dataset.splits:
        raise ClearwingError("--val", config.val, f"this data has {', '.join(dataset.splits)}")
    if len(dataset.class_names) < 2:
        raise ClearwingError("DATA", config.data, f"has {len(dataset.class_names)} class; give at least two")
    return dataset


def load_train_and_val(
    config: TrainConfig, dataset: Dataset, chosen: Chosen, progress: Progress
) -> tuple[Pictures | Stream, Pictures | None]:
    """The decoded pictures: those to train on at the cache's size, those to watch at the network's."""
    if isinstance(dataset, Streamed) and dataset.stream is not None:
        for note in dataset.notes:
            progress.say(f"note: {note}")
        stream = dataclasses.replace(dataset.stream, size=square(chosen.cache_size))
        source = stream.held_out if dataset.watched is None else dataset.watched.some
        return stream, source(WATCHED, chosen.size)

    def load(split: str, size: int) -> Pictures:
        samples = limited(dataset.splits[split], config.limit)
        return load_pictures(
            samples, size, fit=config.fit, channels=config.channels, progress=progress.task(f"reading {split}")
        )

    pictures = load("train", chosen.cache_size)
    watched = load(chosen.watch, chosen.size) if chosen.watch in dataset.splits else None
    for note in dataset.notes:
        progress.say(f"note: {note}")
    for split, part in (("train", pictures), (chosen.watch, watched)):
        for key, reason in part.skipped if part else ():
            progress.say(f"skipped {split}: {key}: {reason}")
    return pictures, watched


def make_model(config: TrainConfig, dataset: Dataset, chosen: Chosen, pictures: Pictures | Stream) -> Classifier:
    """The untrained network, or the given weights with a new head; mean and std are those of the training pictures."""
    names, made = dataset.class_names, dict(chosen.model)
    name = made.pop("name")
    if config.weights is None:
        mean, std = pictures.mean_std()
        model = build(name, len(names), class_names=names, mean=mean, std=std, input_size=chosen.size, **made)
        if config.whiten:
            some = pictures.subset(PATCHES) if isinstance(pictures, Pictures) else pictures.some(PATCHES)
            whiten_stem(model, next(some.batches(PATCHES)).images)
        return model
    made |= {"class_names": names, "weights": config.weights, "new_head": True, "input_size": chosen.size}
    model = build(name, len(names), **made)
    if bool((model.mean == 0).all() and (model.std == 1).all()):  # the weights came without their own
        imagenet = made.get("stem") == "imagenet" and settings_of(config.weights)["num_classes"] == 1000
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else pictures.mean_std()
        model = wrap(model, mean=mean, std=std)
    return model


def shared_equally(config: TrainConfig, chosen: Chosen, processes: int, fixed: bool) -> Chosen:
    """The choices with a batch that the processes can share in equal parts."""
    if chosen.batch_size % processes == 0:
        return chosen
    if fixed:
        raise ClearwingError("--devices", processes, f"cannot share the run's batches of {chosen.batch_size} equally")
    if config.batch_size is not None:
        raise ClearwingError("--batch-size", chosen.batch_size, f"give a multiple of the {processes} processes")
    batch = max(chosen.batch_size // processes, 1) * processes
    return dataclasses.replace(chosen, batch_size=batch, lr=learning_rate(config, batch))


def fitting(config: TrainConfig, chosen: Chosen, model: Classifier, pictures: int, fabric: Any) -> Chosen:
    """The choices with the largest batch that fits the memory, at most the usual one or an eighth of the pictures."""
    most = max(2, usual_batch(pictures) // fabric.world_size, pictures // (8 * fabric.world_size))
    one = largest_batch(model, (config.channels, chosen.train_size, chosen.train_size), fabric, most)
    batch = int(fabric.broadcast(one)) * fabric.world_size
    return dataclasses.replace(chosen, batch_size=batch, lr=learning_rate(config, batch))


def describe(
    dataset: Dataset, pictures: Pictures | Stream, watched: Pictures | None, config: TrainConfig
) -> dict[str, Any]:
    """What was met in the data: for config.json and the report."""
    counts = {split: len(samples) for split, samples in dataset.splits.items()}
    used = {"train": len(pictures)} | ({} if watched is None else {"watched": len(watched)})
    skipped = [list(item) for part in (pictures, watched) if part is not None for item in part.skipped]
    root = config.data if config.data in BUILT_IN else str(Path(config.data).resolve())
    return {
        "name": dataset.name,
        "where": root,
        "splits": counts,
        "used": used,
        "notes": list(dataset.notes),
        "skipped": skipped,
    }


def summarise(run: Run, session: Session, state: FitState, elapsed: float) -> dict[str, Any]:
    """What the command prints."""
    rows = state.rows
    last = rows[-1] if rows else {}
    skipped = run.config["data"]["skipped"]
    result: dict[str, Any] = {
        "run": str(run.path),
        "epochs": state.epoch,
        "steps": state.step,
        "seconds": elapsed,
        "interrupted": state.interrupted,
        "skipped": len(skipped),
        "train_accuracy": last.get("train_accuracy"),
        "watched": session.chosen.watch,
    }
    told = f"{state.epoch} epochs ({state.step} steps)"
    finished = session.config.resume and state.step == session.resumed_at
    lines = [f"was finished already: {told}" if finished else f"trained {told} in {elapsed:.0f} s"]
    if session.config.patience and stalled(rows, session.config.patience):
        lines.append(f"ended by --patience {session.config.patience}: the loss on {session.chosen.watch} fell no more")
    if "val_accuracy" in last and session.watched is not None:
        n = len(session.watched.keys)
        low, high = wilson_interval(round(last["val_accuracy"] * n), n)
        best = max(row["val_accuracy"] for row in rows if "val_accuracy" in row)
        result |= {"val_accuracy": last["val_accuracy"], "ci95": [low, high], "best_val_accuracy": best}
        whose = f"after epoch {state.epoch}" if state.interrupted else "of the last weights"
        lines.append(
            f"accuracy on {session.chosen.watch} {whose}: {last['val_accuracy']:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%}, n = {n})"
        )
    if skipped:
        lines.append(f"skipped {len(skipped)} pictures that cannot be read (named in {run.file('config.json')})")
    if state.interrupted:
        result["error"] = {"argument": "train", "value": "stopped by Ctrl-C", "mend": "go on with --resume"}
        lines.insert(0, "stopped by Ctrl-C; the weights are saved, go on with --resume")
    lines.append(f"run: {run.path}")
    return {"json": result, "text": "\n".join(lines), "exit_code": 1 if state.interrupted else 0}
