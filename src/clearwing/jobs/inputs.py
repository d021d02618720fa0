"""What several jobs begin with: the MODEL and the PICTURES that a command names."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearwing.config import TrainConfig, split_settings
from clearwing.data.loader import Pictures, load_pictures, load_sizes, spread
from clearwing.data.preprocess import read_mask
from clearwing.data.sources import ALL, BUILT_IN, EXTENSIONS, Dataset, Sample, open_data
from clearwing.jobs.progress import Progress
from clearwing.models.classifier import Classifier, wrap
from clearwing.models.zoo import load_model
from clearwing.run import WEIGHTS, Run
from clearwing.settings import class_list
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
    if size is not None and size < 1:
        raise ClearwingError("--size", size, "give at least 1 pixel")
    if Path(spec).is_dir():
        run = Run.load(spec)
        if classes is not None:
            raise ClearwingError("--classes", classes, "the run knows its classes; leave it out")
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


def full_name(where: str) -> str:
    """The absolute path of a data set that is a file or folder; the name of a built-in one."""
    return str(Path(where).resolve()) if Path(where).exists() else where


def own_data(run: Run, where: str | None) -> bool:
    """Whether this is the data that the run was trained on."""
    stored = run.config["data"]["where"]
    return where is None or where == stored or full_name(where) == stored


def weights_hash(run: Run, weights: str = "last") -> str | None:
    """Sixteen hex digits that change with the run's weights file; None where there is none."""
    path = run.file(WEIGHTS[weights])
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def current(run: Run, result: dict[str, Any], name: str, progress: Progress) -> bool:
    """Whether a result is of the weights that the run holds now, or does not say of which."""
    held = weights_hash(run, result.get("weights", "last"))
    if result.get("weights_sha256") in (None, held):
        return True
    progress.say(f"note: the results in {name} are of other weights; left out")
    return False


def open_like_run(
    run: Run, where: str | None, classes: str | None = None, pattern: str | None = None, masks: str | None = None
) -> Dataset:
    """Data split with the run's settings; its classes and pattern are used for its own data, and for no other."""
    settings = run_settings(run)
    own = own_data(run, where)
    return open_data(
        where or run.config["data"]["where"],
        classes=class_list(classes or (settings.classes if own else None)),
        pattern=pattern or (settings.pattern if own else None),
        masks=masks,
        **split_settings(settings),
    )


def open_run_data(
    run: Run, where: str | None, classes: str | None = None, pattern: str | None = None, masks: str | None = None
) -> Dataset:
    """What a job on a run works on: split as in training where it is the same data, labelled as the run knows it."""
    return open_like_run(run, where, classes, pattern, masks).relabelled(run.class_names)


def split_of(dataset: Dataset, split: str) -> tuple[Sample, ...]:
    """The samples of a split, or "all" of them; an unlabelled folder has one part only, which serves for any name."""
    if split in dataset.splits:
        return dataset.splits[split]
    if split == ALL or tuple(dataset.splits) == (ALL,):
        return tuple(sample for samples in dataset.splits.values() for sample in samples)
    raise ClearwingError("--split", split, f"this data has {', '.join(dataset.splits)}; or take all")


def split_name(dataset: Dataset, split: str) -> str:
    """The split that `split_of` gives for this name."""
    return ALL if tuple(dataset.splits) == (ALL,) else split


def split_notes(dataset: Dataset, split: str, run: Run, where: str) -> list[str]:
    """What a reader must know of the split before quoting a figure."""
    if split == ALL and "train" in dataset.splits and own_data(run, where):
        return [f"{ALL} holds pictures that the network was trained on"]
    return []


def left_out_notes(dataset: Dataset, split: str) -> list[str]:
    """What to say to those who did not ask for a part of their pictures."""
    left = sum(len(samples) for name, samples in dataset.splits.items() if name != split)
    if left and any(note.startswith(f"no {split}:") for note in dataset.notes):
        return [f"{left} of {left + len(dataset.splits[split])} pictures are left out; --split all takes all"]
    return []


def limited(samples: tuple[Sample, ...], limit: int | None) -> tuple[Sample, ...]:
    """At most `limit` samples, spread over all of them so that every class stays."""
    if limit is not None and limit < 1:
        raise ClearwingError("--limit", limit, "give at least 1 picture")
    return samples if limit is None else tuple(samples[i] for i in spread(len(samples), limit))


def load_for(loaded: Loaded, samples: tuple[Sample, ...], limit: int | None, progress: Progress) -> Pictures:
    """The samples decoded at the network's size."""
    told = progress.task("reading pictures")
    return load_pictures(limited(samples, limit), loaded.size, fit=loaded.fit, channels=loaded.channels, progress=told)


def load_with_fine(
    loaded: Loaded, samples: tuple[Sample, ...], side: int, progress: Progress
) -> tuple[Pictures, Pictures]:
    """The samples decoded once, at the network's size and at this one."""
    told, sizes = progress.task("reading pictures"), (loaded.size, side)
    pictures, fine = load_sizes(samples, sizes, fit=loaded.fit, channels=loaded.channels, progress=told)
    return pictures, fine


def load_blocks(loaded: Loaded, samples: tuple[Sample, ...], block: int = 256) -> Iterator[Pictures]:
    """The same a block at a time, in constant memory.

    Raises ClearwingError where none of all can be read, and gives nothing before that is known.
    """
    read = 0
    skipped: tuple[tuple[str, str], ...] = ()
    for start in range(0, len(samples), block):
        part = samples[start : start + block]
        pictures = load_pictures(part, loaded.size, fit=loaded.fit, channels=loaded.channels, empty=True)
        read, skipped = read + len(pictures), skipped + pictures.skipped
        if read:
            yield dataclasses.replace(pictures, skipped=skipped)
            skipped = ()
    if not read:
        key, reason = skipped[0]
        raise ClearwingError("pictures", key, f"none of {len(samples)} can be read: {reason}")


def open_pictures(names: tuple[str, ...], progress: Progress, out: str | None = None) -> tuple[Sample, ...]:
    """Files and folders of pictures, in the order given; folders with all below them but the results in `out`."""
    samples: list[Sample] = []
    for name in names:
        dataset = open_data(name, val_fraction=0.0) if name in BUILT_IN else open_below(name, out)
        samples += split_of(dataset, ALL)
        for note in dataset.notes:
            progress.say(f"note: {note}")
    if not samples:
        raise ClearwingError("PICTURES", "none", "name at least one file or folder")
    return unique_keys(samples)


def open_below(name: str, out: str | None = None) -> Dataset:
    """One picture, Parquet, or every picture below a folder with its path from there as key; labels do not matter."""
    folder = Path(name)
    if folder.is_dir():
        samples = tuple(Sample(path.relative_to(folder).as_posix(), path) for path in pictures_below(folder, out))
        if samples:
            return Dataset(folder.resolve().name, (), {ALL: samples})
    return open_data(name, val_fraction=0.0)


def pictures_below(folder: Path, out: str | None = None) -> list[Path]:
    """The picture files below a folder, sorted; hidden ones, folders of masks and the folder `out` are left out."""
    found, results = [], None if out is None else Path(out).resolve()
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and name.lower() != "masks"]
        folders[:] = [name for name in folders if Path(at, name).resolve() != results]
        found += [Path(at, name) for name in files if not name.startswith(".") and name.lower().endswith(EXTENSIONS)]
    return sorted(found)


def unique_keys(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """The samples, with a number as folder before the keys that occurred already."""
    given, seen = {sample.key for sample in samples}, set[str]()
    made = []
    for sample in samples:
        key = sample.key
        if key in seen:
            tries = (f"{count}/{sample.key}" for count in itertools.count(2))
            key = next(one for one in tries if one not in given and one not in seen)
        seen.add(key)
        made.append(dataclasses.replace(sample, key=key))
    return tuple(made)


def result_paths(keys: Sequence[str], suffix: str) -> dict[str, Path]:
    """Where the result of each picture is written, below the output folder: its key with another suffix.

    Pictures that differ in their suffix alone keep it (`a.jpg.png`); no name leads out of the folder.
    """
    stems = {key: Path(*[part for part in Path(key).with_suffix("").parts if part not in ("/", "..")]) for key in keys}
    count, taken = Counter(stems.values()), set[Path]()
    found = {}
    for key, stem in stems.items():
        full = Path(key).name
        tries = itertools.chain(
            [] if count[stem] > 1 else [stem.name], [full], (f"{full}.{number}" for number in itertools.count(2))
        )
        found[key] = next(path for path in (stem.with_name(one + suffix) for one in tries) if path not in taken)
        taken.add(found[key])
    return found


def keep_sources(
    out: str | Path, files: Iterable[Path], samples: Iterable[Sample], *, grown: bool = False, beside: bool = False
) -> None:
    """Refuse an output folder in which one of the files to write is a picture or a true mask that is read.

    With `grown`, a file `a` stands for all that is called `a.png` or `a.<anything>.png`. With `beside`, files are also
    refused in a folder of the pictures, where the next call would read them as pictures.
    """
    written = {(Path(out) / file).resolve() for file in files}
    folders = {path.parent for path in written if path.suffix == ".png"} if beside else set()
    there: dict[Path, Path] = {}  # folders as they are named, and as they are
    for sample in samples:
        for source in (sample.source, sample.mask):
            if not isinstance(source, str | Path):
                continue
            path = Path(source).resolve()
            names = [path.name]
            if grown:
                parts = path.name.split(".") if path.suffix.lower() == ".png" else []
                names = [".".join(parts[:end]) for end in range(1, len(parts))]
            if any(path.with_name(name) in written for name in names if name):
                raise ClearwingError("--out", out, f"would replace {source}; give another folder")
            if folders and source is sample.source:
                named = Path(source).parent  # of a link, where it lies
                if named not in there:
                    there[named] = named.resolve()
                if there[named] in folders:
                    mend = f"would put masks among the pictures of {named}; give another folder"
                    raise ClearwingError("--out", out, mend)


def told_skipped(pictures: Pictures, progress: Progress) -> list[list[str]]:
    """Say which pictures were passed over; the list for the result."""
    for key, reason in pictures.skipped:
        progress.say(f"skipped {key}: {reason}")
    return [[key, reason] for key, reason in pictures.skipped]


def pick_device(device: str) -> torch.device:
    """The device that a job computes on, as Fabric chooses it."""
    from clearwing.train.devices import make_fabric

    return make_fabric(device, "float32").device


def read_truths(pictures: Pictures, progress: Progress) -> tuple[list[Tensor | None], list[list[str]]]:
    """The true masks that fit their pictures, None for the others; the others that should have one, with the reason."""
    truths: list[Tensor | None] = []
    unscored: list[list[str]] = []
    for sample, place in zip(pictures.samples, pictures.geometry, strict=True):
        truth, reason = None, "no mask for this picture"
        if sample.mask is not None:
            try:
                truth = read_mask(sample.mask)
            except ClearwingError as error:
                reason = error.mend
            if truth is not None and truth.shape != (place.height, place.width):
                size = f"{truth.shape[0]}x{truth.shape[1]}"
                reason = f"mask of {size}, picture of {place.height}x{place.width}; give a mask of the picture's size"
                truth = None
        if truth is None:
            unscored.append([sample.key, reason])
            if sample.mask is not None:
                progress.say(f"not scored {sample.key}: {reason}")
        truths.append(truth)
    return truths, unscored
