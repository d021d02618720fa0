"""Where pictures come from: folders, name-labelled files, Parquet, CIFAR, plain lists and the built-in set."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

import numpy as np

from clearwing.data.rows import ParquetRow, parquet_columns, parquet_rows
from clearwing.types import ClearwingError, near

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
SPLITS: dict[str, str] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
BUILT_IN = ("demo", "cifar10", "cifar100")
PATTERN = "{class}_{id}.jpg"
ALL = "all"
"""The split of pictures that have no labels."""

Source = Path | ParquetRow | bytes | np.ndarray


@dataclass(frozen=True)
class Sample:
    """One picture, not read yet."""

    key: str  # unique in its data set; a posix path below the data set's folder
    source: Source  # a file, the bytes of one, or uint8 (H, W, C)
    label: int | None = None
    mask: Path | bytes | np.ndarray | None = None


@dataclass(frozen=True)
class Dataset:
    """The samples of every split, and what was decided on the way (`notes`, for the log and the report)."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Sample, ...]]
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of a split; raises where there is none of that name."""
        if name not in self.splits:
            raise ClearwingError("split", name, f"{self.name} has {', '.join(self.splits)}")
        return self.splits[name]

    def relabelled(self, class_names: Sequence[str]) -> Dataset:
        """The same pictures with the labels of a trained network's classes, matched by name."""
        position = {name: i for i, name in enumerate(class_names)}
        used = {s.label for samples in self.splits.values() for s in samples if s.label is not None}
        for label in sorted(used):
            if self.class_names[label] not in position:
                known = near(self.class_names[label], class_names)
                raise ClearwingError("class", self.class_names[label], f"the network does not know it; {known}")

        def moved(sample: Sample) -> Sample:
            if sample.label is None:
                return sample
            return replace(sample, label=position[self.class_names[sample.label]])

        splits = {name: tuple(moved(s) for s in samples) for name, samples in self.splits.items()}
        return replace(self, class_names=tuple(class_names), splits=splits)


@dataclass(frozen=True)
class _Item:
    """A sample whose class is still a name."""

    key: str
    source: Source
    class_name: str | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class _Listing:
    """What an opener found; `class_names` where the source itself fixes them and their order."""

    title: str
    splits: dict[str, list[_Item]]
    class_names: tuple[str, ...] = ()
    root: Path | None = None  # where a MASKS folder may lie


def cache_home() -> Path:
    """The folder for downloads and caches: CLEARWING_HOME, or ~/.cache/clearwing."""
    return Path(os.environ.get("CLEARWING_HOME") or Path.home() / ".cache" / "clearwing")


def open_data(
    where: str | Path | Sequence[str | Path],
    *,
    classes: Sequence[str] | str | Path | None = None,
    pattern: str | None = None,
    masks: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    test_fraction: float = 0.0,
) -> Dataset:
    """List the pictures of a data set; none is read yet.

    `where` is a folder with `train/ val/ test/`, of class folders, of files named after `pattern`
    (`{class}_{id}.jpg`), or of unlabelled pictures; a Parquet file or folder in the schema of a Hugging Face image
    data set; `demo`, `cifar10` or `cifar100`; one picture; or a list of pictures. `classes` gives the class names and
    their order, as a sequence or as a file with one a line. `masks` is a folder that mirrors the pictures, or holds
    the same stems; without it a folder `MASKS` of the data set is taken. What has labels and no val gets a stratified,
    seeded share `val_fraction` of train as val, and without a test a share `test_fraction` as test; this is noted.
    Unlabelled pictures are the split `all`.

    Raises ClearwingError where a folder, a class or a split is empty or unknown.
    """
    for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= share < 1:
            raise ClearwingError(name, share, "give a share from 0 to below 1")
    names = read_classes(classes)
    notes: list[str] = []
    if isinstance(where, str | Path):
        found = _open_one(where, names, pattern, seed, notes)
    else:
        found = _Listing("pictures", {ALL: _listed_files(where)})
    class_names, splits = _numbered(found, names)
    if "train" in splits:
        shares = {"val": val_fraction, "test": test_fraction}
        splits = _sliced(splits, class_names, {k: v for k, v in shares.items() if v and k not in splits}, seed, notes)
    splits = _with_masks(splits, found.root, masks, notes)
    return Dataset(found.title, class_names, splits, tuple(notes))


def read_classes(classes: Sequence[str] | str | Path | None) -> tuple[str, ...] | None:
    """Class names from a sequence, or from a file with one a line (or a JSON list)."""
    if classes is None:
        return None
    if isinstance(classes, str | Path):
        if not Path(classes).is_file():
            raise ClearwingError("classes", classes, "give names, or a file with one name a line")
        text = Path(classes).read_text("utf-8")
        lines = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
        classes = [str(line).strip() for line in lines if str(line).strip()]
    names = tuple(str(name) for name in classes)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or twice:
        raise ClearwingError("classes", ", ".join(twice) or "[]", "give every class once, and at least one")
    return names


def _open_one(
    where: str | Path, names: Sequence[str] | None, pattern: str | None, seed: int, notes: list[str]
) -> _Listing:
    if where == "demo":
        return _open_demo(seed)
    if where in ("cifar10", "cifar100"):
        return _open_cifar(str(where))
    path = Path(where)
    if not path.exists():
        raise ClearwingError("data", where, f"no such file or folder; give one, or {', '.join(BUILT_IN)}")
    title = path.resolve().name
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return _open_parquet(path.stem, [path], path.parent, names, notes)
        if path.suffix.lower() in EXTENSIONS:
            return _Listing(title, {ALL: [_Item(path.name, path)]})
        raise ClearwingError("data", where, "not a picture, a Parquet file or a folder")
    folders = _folders(path)
    by_split = {SPLITS[f.name.lower()]: f for f in folders if f.name.lower() in SPLITS}
    others = [f.name for f in folders if f.name.lower() not in SPLITS]
    if others and not any(_folders(f) for f in by_split.values()):
        by_split = {}  # bus, car, train: classes, one of which is called like a split
    parquet = sorted(p for p in path.rglob("*.parquet") if not hidden(p.relative_to(path)))
    if parquet and next(iter(_pictures(path)), None) is None:
        return _open_parquet(title, parquet, path, names, notes)
    if by_split:
        order: list[str] = [split for split in ("train", "val", "test") if split in by_split]
        if others:
            notes.append(f"folders beside the splits were left out: {', '.join(others)}")
        listed: dict[str, list[_Item]] = {}
        for split in order:
            known, folder = {item.class_name for item in listed.get("train", ())}, by_split[split]
            named = _folders(folder)  # otherwise named files, or (test, most often) pictures without labels
            listed[split] = (
                _class_folders(path, folder, notes) if named else _flat(path, folder, names, pattern, notes, known)
            )
        return _Listing(title, listed, root=path)
    if folders:
        return _Listing(title, {"train": _class_folders(path, path, notes)}, root=path)
    items = _flat(path, path, names, pattern, notes)
    return _Listing(title, {ALL if items[0].class_name is None else "train": items}, root=path)


def hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _folders(path: Path) -> list[Path]:  # without hidden ones and MASKS
    found = (p for p in path.iterdir() if p.is_dir() and not hidden(Path(p.name)) and p.name.lower() != "masks")
    return sorted(found, key=lambda p: p.name)


def _pictures(folder: Path, deep: bool = True) -> Iterable[Path]:
    """The picture files of a folder, sorted; other files and hidden ones are not looked at."""
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not hidden(Path(f)) and f.lower() != "masks") if deep else []
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS):
                yield Path(at, name)


def _class_folders(root: Path, folder: Path, notes: list[str]) -> list[_Item]:
    items: list[_Item] = []
    for class_folder in _folders(folder):
        found = [_Item(p.relative_to(root).as_posix(), p, class_folder.name) for p in _pictures(class_folder)]
        if not found:
            shown = class_folder.relative_to(root.parent if root == folder else root)
            raise ClearwingError("data", shown, "this class folder holds no picture; fill or remove it")
        items += found
    beside = sum(1 for _ in _pictures(folder, deep=False))
    if beside:
        notes.append(f"{beside} pictures beside the class folders of {folder.name} were left out")
    return items


def _flat(
    root: Path,
    folder: Path,
    names: Sequence[str] | None,
    pattern: str | None,
    notes: list[str],
    known: Set[str | None] = frozenset(),
) -> list[_Item]:
    """Files of one folder, labelled by their names where these follow the pattern, otherwise without labels; `known`
    are the classes of train, for the folders beside it."""
    files = list(_pictures(folder, deep=False))
    if not files:
        extensions = " ".join(EXTENSIONS)
        raise ClearwingError("data", folder, f"no picture here; give a folder with pictures ({extensions})")
    match = _matcher(pattern or PATTERN, names)
    labels = {file: match(file.name) for file in files}
    asked = pattern is not None or names is not None
    unmatched = [file for file in files if labels[file] is None]
    counts = Counter(label for label in labels.values() if label is not None)
    if asked and unmatched:
        raise ClearwingError("pattern", unmatched[0].name, f"this name does not follow {pattern or PATTERN}")
    # unasked, labels are read from names only where names plainly hold them: IMG_0001.jpg is no class IMG
    plain = len(unmatched) <= 0.05 * len(files) and (1 < len(counts) <= len(files) / 2 or known >= counts.keys())
    if not asked and not plain:
        return [_Item(p.relative_to(root).as_posix(), p) for p in files]
    if unmatched:
        notes.append(
            f"{len(unmatched)} files whose names do not follow {PATTERN} were left out ({unmatched[0].name} ...)"
        )
    return [_Item(p.relative_to(root).as_posix(), p, labels[p]) for p in files if labels[p] is not None]


def _matcher(pattern: str, names: Sequence[str] | None) -> Callable[[str], str | None]:
    """File name -> class name or None. `{class}` takes as much as it can, so that `bald_eagle_12` splits at the last
    underscore; names that are given are tried first, the longest first. Any picture extension matches."""
    if pattern.count("{class}") != 1:
        raise ClearwingError("pattern", pattern, f"it must hold {{class}} once, as in {PATTERN}")
    stem = PurePosixPath(pattern).stem if pattern.lower().endswith(EXTENSIONS) else pattern
    parts = re.split(r"(\{\w+\})", stem)

    def regex(wanted: str) -> re.Pattern[str]:
        held = {"{class}": f"({wanted})"}
        return re.compile("".join(held.get(p, ".+?" if p.startswith("{") else re.escape(p)) for p in parts))

    tries = [regex(".+")]
    if names:
        tries.insert(0, regex("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))))

    def match(name: str) -> str | None:
        found = (one.fullmatch(PurePosixPath(name).stem) for one in tries)
        return next((hit[1] for hit in found if hit), None)

    return match


def _listed_files(files: Sequence[str | Path]) -> list[_Item]:
    """Pictures named one by one; a folder among them stands for all its pictures."""
    paths: dict[Path, None] = {}  # an ordered set: a picture named twice is taken once
    for file in map(Path, files):
        if file.is_dir():
            paths.update(dict.fromkeys(_pictures(file)))
        elif file.is_file():
            paths[file] = None
        else:
            raise ClearwingError("pictures", file, "no such file or folder")
    if not paths:
        raise ClearwingError("pictures", ", ".join(map(str, files)) or "[]", "no picture here; name at least one")
    unique = {Path(os.path.abspath(p)): p for p in paths}
    shared = os.path.commonpath([p.parent for p in unique])
    return [_Item(p.relative_to(shared).as_posix(), given) for p, given in unique.items()]


@lru_cache(maxsize=1)  # the commands of `clearwing demo` all open it, and drawing takes seconds
def _open_demo(seed: int) -> _Listing:
    from clearwing.data import synthetic

    splits: dict[str, list[_Item]] = {}
    for split in synthetic.SPLITS:
        images, labels, masks = synthetic.draw_split(split, synthetic.SPLITS[split], seed, synthetic.SIZE)
        classes = [synthetic.CLASS_NAMES[int(label)] for label in labels]
        rows = enumerate(zip(classes, images, masks, strict=True))
        splits[split] = [_Item(f"{split}/{name}/{i:06d}", image, name, mask) for i, (name, image, mask) in rows]
    return _Listing("demo", splits, tuple(synthetic.CLASS_NAMES))


def _open_cifar(name: str) -> _Listing:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = cache_home() / name
    splits: dict[str, list[_Item]] = {}
    for split in ("train", "test"):
        try:
            data = kind(str(folder), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:  # no network, a server's refusal; a broken archive
            raise ClearwingError("data", name, f"download failed ({error}); put the archive in {folder}") from error
        rows = enumerate(zip(data.data, data.targets, strict=True))
        splits[split] = [_Item(f"{split}/{i:06d}", image, data.classes[label]) for i, (image, label) in rows]
    return _Listing(name, splits, tuple(data.classes))


def _open_parquet(
    title: str, files: Sequence[Path], root: Path, given: Sequence[str] | None, notes: list[str]
) -> _Listing:
    """Files in the schema of a Hugging Face image data set; a file's name, or its folder's, says the split."""
    from pyarrow import ArrowException, parquet

    rows: dict[str, list[tuple[Any, Any]]] = {}
    names: tuple[str, ...] = ()
    for path, split in parquet_splits(files, root, notes).items():
        listed = rows.setdefault(split, [])
        try:
            with parquet.ParquetFile(path) as file:
                image, label, names = parquet_columns(path, file.schema_arrow)
                first = 0
                for group in range(file.num_row_groups):
                    listed += parquet_rows(path, file, group, first, image, label)
                    first += file.metadata.row_group(group).num_rows
        except (ArrowException, OSError) as error:
            raise ClearwingError("data", path, f"cannot be read as Parquet ({error})") from error
    numbers = {label for part in rows.values() for _, label in part if isinstance(label, int) and label != -1}
    fixed = names or (() if given else tuple(map(str, sorted(numbers))))
    return _Listing(title, _parquet_items(rows, names or tuple(given or ()), root), fixed)


def parquet_splits(files: Sequence[Path], root: Path, notes: list[str]) -> dict[Path, str]:
    """The split of every file that is part of one; `train`, where no file names any."""
    named = {path: split for path in files if (split := _parquet_split(path.relative_to(root)))}
    if named and (odd := [path.name for path in files if path not in named]):
        notes.append(f"{len(odd)} files that name no split were left out ({odd[0]} ...)")
    return named or dict.fromkeys(files, "train")


def _parquet_split(path: Path) -> str | None:
    """`data/test-00000-of-00001.parquet`, `test.parquet` and `test/0000.parquet` are test."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.findall("[a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _parquet_items(rows: dict[str, list[tuple[Any, Any]]], names: Sequence[str], root: Path) -> dict[str, list[_Item]]:
    paths = [picture.get("path") for part in rows.values() for picture, _ in part if isinstance(picture, dict)]
    total = sum(map(len, rows.values()))
    # otherwise, and where a path would lead out of a folder of results, pictures are called split/row
    inside = all(path and not Path(path).is_absolute() and ".." not in Path(path).parts for path in paths)
    by_path = inside and len(set(paths)) == total
    splits: dict[str, list[_Item]] = {}
    for split, part in rows.items():
        items = splits[split] = []
        for i, (picture, label) in enumerate(part):
            held = picture if isinstance(picture, dict) else {"bytes": picture}
            source = held["bytes"] if held["bytes"] is not None else root / (held.get("path") or "missing")
            class_name = None
            if label is not None and label != -1:  # -1: the label of a test set is withheld
                if names and isinstance(label, int) and not 0 <= label < len(names):
                    raise ClearwingError("data", f"{root.name}: label {label}", f"there are {len(names)} class names")
                class_name = names[label] if names and isinstance(label, int) else str(label)
            items.append(_Item(str(held["path"]) if by_path else f"{split}/{i:06d}", source, class_name))
    if list(splits) == ["train"] and splits["train"] and all(item.class_name is None for item in splits["train"]):
        splits = {ALL: splits["train"]}
    order = ["train", "val", "test", ALL]
    return {split: splits[split] for split in order if split in splits}


def _numbered(found: _Listing, given: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, tuple[Sample, ...]]]:
    """Class names become numbers: in the order given, else the source's own, else sorted as torchvision sorts."""
    present = {item.class_name for items in found.splits.values() for item in items if item.class_name is not None}
    names = tuple(given or found.class_names or sorted(present))  # plain order, as torchvision's ImageFolder
    empty = [name for name in given or () if name not in present]
    if empty and present:
        raise ClearwingError("classes", ", ".join(empty), f"no picture of this class in {found.title}; remove it")
    trained = {item.class_name for item in found.splits.get("train", ())} - {None}
    number = {name: i for i, name in enumerate(names)}
    splits: dict[str, tuple[Sample, ...]] = {}
    for split, items in found.splits.items():
        if not items:
            raise ClearwingError("data", f"{found.title}/{split}", "this split holds no picture; fill or remove it")
        for item in items:
            name = item.class_name
            if name is not None and name not in number:
                raise ClearwingError("class", f"{name} ({item.key})", f"not among the classes; {near(name, names)}")
            if name is not None and trained and name not in trained:
                raise ClearwingError("class", f"{name} ({item.key})", "train has no picture of this class; add some")
        splits[split] = tuple(
            Sample(i.key, i.source, None if i.class_name is None else number[i.class_name], i.mask) for i in items
        )
    return names, splits


def _sliced(
    splits: dict[str, tuple[Sample, ...]], names: Sequence[str], shares: dict[str, float], seed: int, notes: list[str]
) -> dict[str, tuple[Sample, ...]]:
    """Take shares of every class of train as other splits. A class's draw depends on the seed and its name alone; a
    class keeps one picture in train."""
    train = splits["train"]
    place = ["train"] * len(train)  # of each picture
    for label, name in enumerate(names):
        left = [i for i, sample in enumerate(train) if sample.label == label]
        count = len(left)
        Random(f"{seed}:{name}").shuffle(left)
        for split, share in shares.items():
            for i in left[: min(max(1, round(share * count)), len(left) - 1)]:
                place[i] = split
            left = [i for i in left if place[i] == "train"]
    taken = {split: tuple(s for s, at in zip(train, place, strict=True) if at == split) for split in ("train", *shares)}
    for split in shares:
        if taken[split]:
            part = f"{len(taken[split])} of {len(train)}"
            notes.append(f"no {split}: {part} pictures of train, stratified, seed {seed}, are {split}")
    found = {**splits, **taken}
    return {split: found[split] for split in ("train", "val", "test") if found.get(split)}


def _with_masks(
    splits: dict[str, tuple[Sample, ...]], root: Path | None, masks: str | Path | None, notes: list[str]
) -> dict[str, tuple[Sample, ...]]:
    """Give each sample its mask: the same path in the folder of masks, without the split, or the same stem alone."""
    beside = sorted(p for p in root.iterdir() if p.is_dir() and p.name.lower() == "masks") if root else []
    if masks is None and not beside:
        return splits
    folder = Path(masks) if masks is not None else beside[0]
    if not folder.is_dir():
        raise ClearwingError("masks", folder, "no such folder")
    files = {p.relative_to(folder).with_suffix("").as_posix(): p for p in _pictures(folder)}
    claims: dict[str, list[str]] = {}
    for samples in splits.values():
        for sample in samples:
            for name in _mask_names(sample.key):
                if name in files:
                    claims.setdefault(name, []).append(sample.key)
                    break
    shared = {name: keys for name, keys in claims.items() if len(keys) > 1}
    for name, keys in shared.items():
        if masks is not None:
            raise ClearwingError("masks", files[name], f"{keys[0]} and {keys[1]} share it; mirror their folders")
    if not claims and masks is not None:
        raise ClearwingError("masks", folder, "no mask bears the name of a picture; give <class>/<stem>.png")
    if shared:
        notes.append(f"{len(shared)} masks that several pictures would share were left out")
    owner = {keys[0]: files[name] for name, keys in claims.items() if len(keys) == 1}
    return {
        split: tuple(replace(s, mask=owner.get(s.key, s.mask)) for s in samples) for split, samples in splits.items()
    }


def _mask_names(key: str) -> list[str]:
    """`val/Cat/12.jpg` -> `val/Cat/12`, `Cat/12`, `val/12`, `12`."""
    *lead, stem = PurePosixPath(key).with_suffix("").parts
    trails = [lead[i:] for i in range(len(lead))] + ([lead[:1]] if len(lead) > 1 else []) + [[]]
    return ["/".join([*trail, stem]) for trail in trails]
