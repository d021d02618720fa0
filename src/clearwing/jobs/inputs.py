"""What several jobs begin with: the MODEL and the PICTURES that a command names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clearwing.config import TrainConfig, class_list, split_settings
from clearwing.data.loader import Pictures, load_pictures, spread
from clearwing.data.sources import ALL, Dataset, Sample, open_data
from clearwing.jobs.progress import Progress
from clearwing.models.classifier import Classifier, wrap
from clearwing.models.zoo import load_model
from clearwing.run import Run
from clearwing.types import ClearwingError


@dataclass(frozen=True)
class Loaded:
    """A network ready for pictures, and how pictures meet it."""

    model: Classifier
    name: str
    size: int
    fit: str
    channels: int
    run: Run | None = None


def open_model(
    spec: str, *, size: int | None = None, fit: str | None = None, classes: str | None = None, weights: str = "last"
) -> Loaded:
    """A RUN, torchvision:NAME, timm:NAME, a weights file, or file.py:factory, in eval mode on the CPU."""
    if Path(spec).is_dir():
        run = Run.load(spec)
        model = run.load_model(weights)
        settings = run.config["train"]
        fit = fit or settings["fit"]
        return Loaded(model, run.path.name, size or run.config["model"]["input_size"], fit, settings["channels"], run)
    model = load_model(spec)
    names = class_list(classes)
    if names is not None:
        model = wrap(model, class_names=names)
    if size is None and model.input_size is None:
        raise ClearwingError("--size", None, f"{spec} does not say its picture size; give one")
    return Loaded(model.eval(), spec, size or int(model.input_size or 0), fit or "squash", model.in_channels or 3)


def run_settings(run: Run) -> TrainConfig:
    """The settings that a run was trained with."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    known = {key: value for key, value in run.config["train"].items() if key in names}
    return TrainConfig(**known)


def open_run_data(
    run: Run, where: str | None, classes: str | None = None, pattern: str | None = None, masks: str | None = None
) -> Dataset:
    """What a job on a run works on: split as in training where it is the same data, labelled as the run knows it."""
    settings = run_settings(run)
    dataset = open_data(
        where or run.config["data"]["where"],
        classes=class_list(classes or settings.classes),
        pattern=pattern or settings.pattern,
        masks=masks,
        **split_settings(settings),
    )
    return dataset.relabelled(run.class_names)


def split_of(dataset: Dataset, split: str) -> tuple[Sample, ...]:
    """The samples of a split, or "all" of them; an unlabelled folder has one part only, which serves for any name."""
    if split in dataset.splits:
        return dataset.splits[split]
    if split == ALL or tuple(dataset.splits) == (ALL,):
        return tuple(sample for samples in dataset.splits.values() for sample in samples)
    raise ClearwingError("--split", split, f"this data has {', '.join(dataset.splits)}; or take all")


def limited(samples: tuple[Sample, ...], limit: int | None) -> tuple[Sample, ...]:
    """At most `limit` samples, spread over all of them so that every class stays."""
    return samples if limit is None else tuple(samples[i] for i in spread(len(samples), limit))


def load_for(loaded: Loaded, samples: tuple[Sample, ...], limit: int | None, progress: Progress) -> Pictures:
    """The samples decoded at the network's size."""
    return load_pictures(
        limited(samples, limit),
        loaded.size,
        fit=loaded.fit,
        channels=loaded.channels,
        progress=progress.task("reading pictures"),
    )


def open_pictures(loaded: Loaded, names: tuple[str, ...], limit: int | None, progress: Progress) -> Pictures:
    """Files and folders of pictures, in the order given."""
    samples: list[Sample] = []
    for name in names:
        dataset = open_data(name)
        samples += [sample for split in dataset.splits.values() for sample in split]
    if not samples:
        raise ClearwingError("PICTURES", "none", "name at least one file or folder")
    return load_for(loaded, unique_keys(samples), limit, progress)


def unique_keys(samples: list[Sample]) -> tuple[Sample, ...]:
    """The samples with the folder's name in front of keys that occur twice."""
    seen: dict[str, int] = {}
    made = []
    for sample in samples:
        count = seen[sample.key] = seen.get(sample.key, 0) + 1
        made.append(sample if count == 1 else dataclasses.replace(sample, key=f"{count}/{sample.key}"))
    return tuple(made)


def result_paths(keys: Sequence[str], suffix: str) -> dict[str, Path]:
    """Where the result of each picture is written, below the output folder: its key with another suffix.

    Pictures that differ in their suffix alone keep it (`a.jpg.png`); no name leads out of the folder.
    """
    stems = {key: Path(*[part for part in Path(key).with_suffix("").parts if part not in ("/", "..")]) for key in keys}
    count = Counter(stems.values())
    return {
        key: stem.with_name((Path(key).name if count[stem] > 1 else stem.name) + suffix) for key, stem in stems.items()
    }


def told_skipped(pictures: Pictures, progress: Progress) -> list[list[str]]:
    """Say which pictures were passed over; the list for the result."""
    for key, reason in pictures.skipped:
        progress.say(f"skipped {key}: {reason}")
    return [[key, reason] for key, reason in pictures.skipped]


def pick_device(device: str) -> torch.device:
    """The device that a job computes on, as Fabric chooses it."""
    from clearwing.train.fit import make_fabric

    return make_fabric(device, "float32").device
