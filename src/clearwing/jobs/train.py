"""The job `train`: pictures to a trained Run."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.config import MODELS, TrainConfig, as_json, class_list, seconds, split_settings
from clearwing.data.augment import Augment
from clearwing.data.loader import Pictures, load_pictures
from clearwing.data.sources import BUILT_IN, Dataset, open_data
from clearwing.jobs.inputs import limited
from clearwing.jobs.progress import Progress, TensorBoard, TrainingBar
from clearwing.measure.accuracy import wilson_interval
from clearwing.models.classifier import Classifier, wrap
from clearwing.models.zoo import BLOCKS, build
from clearwing.run import Run, plain, read_json, write_json
from clearwing.train.fit import FitState, Watcher, classification, fit, make_fabric
from clearwing.train.optim import optimizer as make_optimizer
from clearwing.train.schedule import Budget, FirstEpoch, Plan, Replay, Steps, schedule
from clearwing.types import Batch, ClearwingError, atomic_path, near


def train(
    config: TrainConfig, *, clock: Callable[[], float] = time.monotonic, began: float | None = None
) -> dict[str, Any]:
    """Train as `config` says; returns what the command prints. A time budget counts from `began`, or from now."""
    began = clock() if began is None else began
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run.load(config.out) if config.resume else None
    dataset = open_split_data(config)
    chosen = choose(config, dataset)
    fabric = make_fabric(config.device, config.precision)
    if run is not None:
        same_run(run, config, dataset)
    run = run or Run.create(config.out, overwrite=config.overwrite)
    with Progress(config.json) as progress:
        pictures, watched = load_train_and_val(config, dataset, chosen, progress)
        torch.manual_seed(config.seed)
        model = make_model(config, dataset, chosen, pictures)
        session = _Session(config, chosen, run, model, pictures, watched, fabric, progress, began, clock)
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
        state = session.train()
    return summarise(run, session, state, clock() - began)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The settings that depend on the data or the model, decided."""

    size: int  # of the network's input
    cache_size: int  # of the pictures that are kept: larger where random resized crops are taken from them
    crop: str
    batch_size: int
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
    if config.replay is not None and not Path(config.replay).is_file():
        raise ClearwingError("--replay", config.replay, "no such file; give the plan.json of a run")
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
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ClearwingError(f"--{name.replace('_', '-')}", value, f"give a number from {low:g} to {high:g}")
    if config.time_budget is not None:
        seconds(config.time_budget)


def same_run(run: Run, config: TrainConfig, dataset: Dataset) -> None:
    """Refuse to go on with other classes or other settings than the run began with; it may be made longer."""
    if run.class_names != dataset.class_names:
        raise ClearwingError("--resume", run.path, f"the run has the classes {', '.join(run.class_names[:10])}")
    free = {"epochs", "time_budget", "device", "threads", "json", "tensorboard", "data", "out"}
    free |= {"resume", "overwrite", "config"}
    before = run.config["train"]
    for name, value in plain(as_json(config)).items():
        if name not in free and before.get(name, value) != value:
            mend = f"the run has another {name}, {before[name]}; leave it out, or start afresh"
            raise ClearwingError("--resume", run.path, mend)


def open_split_data(config: TrainConfig) -> Dataset:
    """The data with a train split and one to watch."""
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


def choose(config: TrainConfig, dataset: Dataset) -> Chosen:
    """Defaults by data set and model."""
    cifar = dataset.name.startswith("cifar")
    fine_tuned = config.weights is not None
    usual = 32 if cifar else 64 if dataset.name == "demo" else 224 if config.weights == "imagenet" else 128
    size = config.size or usual
    crop = config.crop if config.crop != "auto" else ("padded" if cifar else "resized")
    n = min(len(dataset.splits["train"]), config.limit or 10**9)
    batch = config.batch_size or min(128, max(16, 1 << round(math.log2(max(n / 16, 1)))))
    lr = config.lr or (0.2 * batch / 128 * (0.1 if fine_tuned else 1) if config.optimizer == "sgd" else 1e-3)
    timed = config.time_budget is not None or config.replay is not None
    epochs = None if timed else config.epochs or (30 if fine_tuned else 60)
    model: dict[str, Any] = {"name": config.model, "in_channels": config.channels}
    if config.model in BLOCKS:
        model["stem"] = config.stem or ("imagenet" if fine_tuned or size >= 96 else "cifar")
    else:
        if config.stem is not None:
            raise ClearwingError("--stem", config.stem, f"{config.model} has one stem only; leave it out")
        model |= {"widths": config.widths, "shortcut": config.shortcut, "downsample": config.downsample}
    # A quarter more than the input gives random resized crops something to take from, at 1.6 times the memory.
    cache_size = round(size * 1.25) if crop == "resized" else size
    watch = config.val or ("val" if "val" in dataset.splits else "test")
    return Chosen(size, cache_size, crop, batch, lr, epochs, fine_tuned, watch, model)


def augmentation(config: TrainConfig, chosen: Chosen, mean: tuple[float, ...]) -> Augment:
    return Augment(
        resized_crop=(config.crop_scale, 1.0) if chosen.crop == "resized" else None,
        size=chosen.size,
        crop_padding=config.padding if chosen.crop == "padded" else 0,
        padding_mode="zero",
        flip=0.5 if config.flip else 0.0,
        rotation=config.rotate,
        brightness=config.jitter,
        contrast=config.jitter,
        saturation=config.jitter,
        cutout=config.cutout,
        fill=mean,
    )


def load_train_and_val(
    config: TrainConfig, dataset: Dataset, chosen: Chosen, progress: Progress
) -> tuple[Pictures, Pictures | None]:
    """The decoded pictures: those to train on at the cache's size, those to watch at the network's."""

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


def make_model(config: TrainConfig, dataset: Dataset, chosen: Chosen, pictures: Pictures) -> Classifier:
    """The untrained network, or the given weights with a new head; mean and std are those of the training pictures."""
    names, made = dataset.class_names, dict(chosen.model)
    name = made.pop("name")
    if config.weights is None:
        mean, std = pictures.mean_std()
        return build(name, len(names), class_names=names, mean=mean, std=std, input_size=chosen.size, **made)
    made |= {"class_names": names, "weights": config.weights, "new_head": True, "input_size": chosen.size}
    model = build(name, len(names), **made)
    if bool((model.mean == 0).all() and (model.std == 1).all()):  # the weights came without their own
        mean, std = pictures.mean_std()
        model = wrap(model, mean=mean, std=std)
    return model


def describe(dataset: Dataset, pictures: Pictures, watched: Pictures | None, config: TrainConfig) -> dict[str, Any]:
    """What was met in the data: for config.json and the report."""
    counts = {split: len(samples) for split, samples in dataset.splits.items()}
    used = {"train": len(pictures.keys)} | ({} if watched is None else {"watched": len(watched.keys)})
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


def environment(fabric: Any) -> dict[str, Any]:
    """Where it ran, for whoever wants the same figures."""
    from clearwing import __version__

    about = {
        "clearwing": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "device": str(fabric.device),
        "precision": str(fabric._precision.precision),
    }
    if fabric.device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(fabric.device)
    return about


def processor_name() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


class _Session:
    """One call of `train`: what is made once and used by batches, validation and saving."""

    def __init__(
        self,
        config: TrainConfig,
        chosen: Chosen,
        run: Run,
        model: Classifier,
        pictures: Pictures,
        watched: Pictures | None,
        fabric: Any,
        progress: Progress,
        began: float,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.chosen, self.run, self.pictures, self.watched = config, chosen, run, pictures, watched
        self.fabric, self.progress, self.began, self.clock = fabric, progress, began, clock
        self.model = model.to(fabric.device).to(memory_format=torch.channels_last)
        self.mean = tuple(self.model.mean.flatten().tolist())
        self.augment = augmentation(config, chosen, self.mean)
        self.optimizer = make_optimizer(
            model, config.optimizer, chosen.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        # A last batch of one picture would teach batch norm nothing but noise.
        self.drops_remainder = len(pictures) % chosen.batch_size == 1 and len(pictures) > 1
        self.plan = self.make_plan()
        self.best: tuple[float, float] | None = None  # (accuracy, -loss) of the best epoch

    def make_plan(self) -> Plan:
        n, batch = len(self.pictures), self.chosen.batch_size
        steps = max(n // batch, 1) if self.drops_remainder else -(-n // batch)
        if self.config.replay is not None:
            return Replay(read_json(Path(self.config.replay)).get("progress", []))
        if self.config.time_budget is None:
            return Steps(steps * (self.chosen.epochs or 1))
        total = seconds(self.config.time_budget)
        # Starting Python and leaving the process are outside of what is timed here.
        left = total - (self.clock() - self.began) - min(8.0, 0.05 * total)
        kind = Budget if self.config.plan == "share" else FirstEpoch
        return kind(left, clock=self.clock)

    def train(self) -> FitState:
        state = self.restore() if self.config.resume else FitState()
        n = len(self.pictures.keys)
        self.progress.say(
            f"{self.chosen.model['name']}: {sum(p.numel() for p in self.model.parameters()):,} parameters, "
            f"{n:,} pictures of {len(self.run.class_names)} classes at {self.chosen.size} px, "
            f"batch {self.chosen.batch_size}, {self.fabric.device}, {self.fabric._precision.precision}"
        )
        if self.watched is not None and isinstance(self.plan, Budget):
            self.reserve_validation(self.plan, self.watched)
        watchers: list[Watcher] = [TrainingBar(self.progress, n)]
        board = TensorBoard(self.run.file("tensorboard")) if self.config.tensorboard else None
        if board is not None:
            watchers.append(board)
        try:
            state = fit(
                self.model,
                self.batches,
                classification(self.config.label_smoothing),
                optimizer=self.optimizer,
                schedule=schedule(self.config.schedule),
                plan=self.plan,
                fabric=self.fabric,
                validate=self.validate if self.watched is not None else None,
                # Under a time budget the time belongs to learning; counted epochs must not depend on the clock.
                validation_share=0.05 if isinstance(self.plan, Budget) else 1.0,
                watchers=watchers,
                save=self.save,
                state=state,
            )
        finally:
            if board is not None:
                board.close()
        if state.interrupted:
            self.run.save_weights(self.model)
        return state

    def batches(self, epoch: int) -> Iterator[Batch]:
        """An epoch's batches; what is drawn depends on the seed and the epoch alone."""
        # The order is drawn on the CPU, the augmentation where the pictures are.
        seed = int.from_bytes(hashlib.sha256(f"{self.config.seed}/{epoch}".encode()).digest()[:7], "big")
        order = torch.Generator().manual_seed(seed)
        drawn = torch.Generator(self.fabric.device).manual_seed(seed + 1)
        return self.pictures.batches(
            self.chosen.batch_size,
            device=self.fabric.device,
            shuffle=order,
            augment=self.augment,
            generator=drawn,
            drop_last=self.drops_remainder,
        )

    def reserve_validation(self, plan: Budget, watched: Pictures) -> None:
        """Hold back the time of a validation, estimated from one batch, for a run that ends in its first epoch."""
        some = watched.subset(min(len(watched), 32))
        predict_logits(self.model, some, self.fabric)  # the first call is slower
        began = self.clock()
        predict_logits(self.model, some, self.fabric)
        plan.hold_back(1.5 * (self.clock() - began) * len(watched) / len(some) + 0.5)

    def validate(self, module: nn.Module) -> dict[str, float]:
        if self.watched is None:
            return {}
        began = self.clock()
        logits, labels = predict_logits(module, self.watched, self.fabric)
        value = nn.functional.cross_entropy(logits, labels).item()
        right = (logits.argmax(1) == labels).double().mean().item()
        if isinstance(self.plan, Budget):
            # The last epoch is validated and saved once more after training; a half more for a busier moment.
            self.plan.hold_back(1.5 * (self.clock() - began) + 1.0)
        return {"val_loss": value, "val_accuracy": right}

    def save(self, state: FitState) -> None:
        self.run.save_weights(self.model)
        row = state.rows[-1]
        if "val_accuracy" in row:
            score = (row["val_accuracy"], -row["val_loss"])
            if self.best is None or score > self.best:
                self.best = score
                self.run.save_weights(self.model, "best")
        self.run.write_metrics(state.rows)
        plan = self.plan.state()
        if "history" in plan:
            write_json(self.run.file("plan.json"), {"seed": self.config.seed, "progress": plan["history"]})
        with atomic_path(self.run.file("state.pt")) as temporary:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "epoch": state.epoch,
                    "step": state.step,
                    "rows": state.rows,
                    "plan": plan,
                    "best": None if self.best is None else list(self.best),
                },
                temporary,
            )

    def restore(self) -> FitState:
        path = self.run.file("state.pt")
        if not path.is_file():
            self.progress.say("nothing to resume: no epoch was finished; starting from the beginning")
            return FitState()
        kept = torch.load(path, map_location=self.fabric.device, weights_only=True)
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.plan.restore(kept["plan"])
        self.best = None if kept["best"] is None else (kept["best"][0], kept["best"][1])
        return FitState(epoch=kept["epoch"], step=kept["step"], rows=kept["rows"])


@torch.inference_mode()
def predict_logits(module: nn.Module, pictures: Pictures, fabric: Any, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in float32 and labels (N,), on the CPU; the module is used in eval mode."""
    module.eval()
    logits, labels = [], []
    for batch in pictures.batches(batch_size, device=fabric.device):
        with fabric.autocast():
            logits.append(module(batch.images).float())
        if batch.labels is not None:
            labels.append(batch.labels)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu() if labels else torch.empty(0, dtype=torch.long)


def summarise(run: Run, session: _Session, state: FitState, elapsed: float) -> dict[str, Any]:
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
    lines = [f"trained {state.epoch} epochs ({state.step} steps) in {elapsed:.0f} s"]
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
