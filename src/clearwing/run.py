"""Run: the directory that commands hand on, written a file at a time under a temporary name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from clearwing.models.classifier import Classifier
from clearwing.models.decoder import Decoder, Segmenter
from clearwing.models.zoo import build
from clearwing.types import ClearwingError, atomic_path

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
DECODER = "decoder.safetensors"
_DECODER_MADE = ("channels", "width", "context")
_FILES = (DECODER, "config.json", "classes.json", "metrics.jsonl", "state.pt", "plan.json", "predictions.csv")
_PAGES = ("report.html", "compare.html")
_FOLDERS = {
    "evaluation": ("*.json", "*.csv"),
    "tensorboard": ("events.out.tfevents.*",),
    "pictures": (
        "curves.png",
        "confusion.png",
        "per_class.png",
        "misclassified.png",
        "methods.png",
        "timeline.png",
        "masks.png",
    ),
    "timeline": ("epoch_*.safetensors",),
}


class Run:
    """A directory with a trained network and its results.

    >>> run = Run.load("runs/moths")
    >>> run.model, run.class_names, run.metrics[-1]["val_accuracy"]
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config  # "train": the settings; "model": how to build it; "data", "environment": what was met

    @staticmethod
    def load(path: str | Path) -> Run:
        """The run at `path`; ClearwingError where there is none."""
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ClearwingError("run", path, "give a folder that clearwing train wrote (with config.json in it)")
        config = read_json(path / "config.json")
        parts = ("train", "model", "resolved", "data", "environment")
        if not isinstance(config, dict) or any(not isinstance(config.get(part), dict) for part in parts):
            raise ClearwingError("run", path, "its config.json is not one that clearwing train wrote")
        return Run(path, config)

    @staticmethod
    def create(path: str | Path, *, overwrite: bool = False) -> Run:
        """A run to be made at `path`; nothing is written or deleted yet (see `clear`).

        A folder that holds anything is refused; with `overwrite` it must hold a run.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ClearwingError("--out", path, "a file is in the way; give another name")
        if path.is_dir() and any(path.iterdir()):
            if not (path / "config.json").is_file():
                raise ClearwingError("--out", path, "holds other files than a run's; give another --out")
            Run.load(path)  # raises where config.json is somebody else's
            if not overwrite:
                raise ClearwingError("--out", path, "holds a run already; use --resume, --overwrite or another --out")
        return Run(path, {})

    def clear(self) -> None:
        """Make the folder, and delete what an earlier run wrote there, by name; the user's own files stay."""
        make_folder(self.path, "--out")
        gone = [self.file(name) for name in (*_FILES, *_PAGES, *WEIGHTS.values())]
        for folder, patterns in _FOLDERS.items():
            gone += [file for pattern in patterns for file in self.file(folder).glob(pattern)]
        for file in gone:
            file.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete the temporary files of a process that was killed while it wrote."""
        for file in self.path.rglob(".*.part"):
            file.unlink(missing_ok=True)

    def file(self, *names: str) -> Path:
        return self.path.joinpath(*names)

    def write_config(self, **parts: Any) -> None:
        """Add parts to config.json."""
        self.config = {**self.config, **parts}
        write_json(self.file("config.json"), self.config)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(read_json(self.file("classes.json")))

    @cached_property
    def model(self) -> Classifier:
        """The network with the last weights, in eval mode on the CPU."""
        return self.load_model("last")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary an epoch, in order."""
        path = self.file("metrics.jsonl")
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def build_model(self) -> Classifier:
        """The network as it was before training: untrained weights from torch's random generator, in eval mode."""
        made = dict(self.config["model"])
        return build(made.pop("name"), made.pop("num_classes"), class_names=self.class_names, **made).eval()

    def load_model(self, weights: str = "last") -> Classifier:
        path = self.file(WEIGHTS[weights])
        if not path.is_file():
            raise ClearwingError("run", path, "has no weights; train it to its first epoch")
        with torch.random.fork_rng(devices=[]):  # the random start is thrown away: it must not move the caller's RNG
            model = self.build_model()
        try:
            model.load_state_dict(load_file(path))
        except SafetensorError as error:
            raise ClearwingError("run", path, f"is broken ({error}); restore it, or train the run anew") from error
        except RuntimeError as error:
            mend = f"the weights do not fit config.json ({error}); take both from one run"
            raise ClearwingError("run", path, mend) from error
        return model.to(memory_format=torch.channels_last).eval()

    def save_weights(self, state: Mapping[str, Tensor], weights: str = "last") -> None:
        held = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        with atomic_path(self.file(WEIGHTS[weights])) as temporary:
            temporary.write_bytes(save(held, metadata={"format": "pt"}))

    def save_decoder(self, segmenter: Segmenter, about: Mapping[str, Any]) -> None:
        """Write the decoder alone, with `about` (plain values: what it was taught, by which weights)."""
        held = {name: value.detach().cpu().contiguous() for name, value in segmenter.decoder.state_dict().items()}
        made = {k: getattr(segmenter.decoder, k) for k in _DECODER_MADE}
        made |= {"layers": segmenter.layers, "head": segmenter.head}
        with atomic_path(self.file(DECODER)) as temporary:
            temporary.write_bytes(save(held, metadata={"made": json.dumps(made), "about": json.dumps(plain(about))}))

    def decoder_about(self) -> dict[str, Any] | None:
        """What `save_decoder` was told of the decoder; None where the run has none."""
        path = self.file(DECODER)
        return self._decoder_metadata("about") if path.is_file() else None

    def load_segmenter(self, weights: str = "last") -> Segmenter:
        """The network with its decoder, in eval mode on the CPU; ClearwingError where there is none."""
        path = self.file(DECODER)
        if not path.is_file():
            raise ClearwingError(
                "run", path, "has no decoder; clearwing segment RUN DATA --pipeline decoder trains one"
            )
        made = self._decoder_metadata("made")
        with torch.random.fork_rng(devices=[]):
            decoder = Decoder(**{k: made[k] for k in _DECODER_MADE if k in made})
        try:
            decoder.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ClearwingError("run", path, f"does not fit what it says of itself ({error}); delete it") from error
        segmenter = Segmenter(self.load_model(weights), decoder, made["layers"], made.get("head"))
        return segmenter.to(memory_format=torch.channels_last).eval()

    def _decoder_metadata(self, key: str) -> dict[str, Any]:
        path = self.file(DECODER)
        try:
            with safe_open(str(path), framework="pt") as file:
                return json.loads((file.metadata() or {})[key])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ClearwingError("run", path, f"is no decoder that clearwing wrote ({error}); delete it") from error

    def write_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        write_text(self.file("metrics.jsonl"), "".join(json.dumps(plain(row)) + "\n" for row in rows))

    def results(self, folder: str = "evaluation") -> dict[str, dict[str, Any]]:
        """What evaluate wrote, by split."""
        return {path.stem: read_json(path) for path in sorted(self.file(folder).glob("*.json"))}


def plain(value: Any) -> Any:
    """The same in what JSON has: no tensors, tuples or paths; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(plain(value), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may be no text


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClearwingError("run", path, f"cannot be read ({error}); restore it, or make it anew") from error


def make_folder(path: str | Path, argument: str = "--out") -> Path:
    """The folder, made where it is missing; ClearwingError where it cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClearwingError(argument, path, f"cannot be made ({error.strerror}); give another folder") from error
    return path


def free_folder(path: str | Path, overwrite: bool, argument: str = "--out") -> Path:
    """A folder to write results into: refused when it holds anything, unless `overwrite`."""
    check_free(path, overwrite, argument)
    return make_folder(path, argument)


def check_free(path: str | Path, overwrite: bool, argument: str = "--out") -> None:
    """Raise ClearwingError for a folder of results that holds something, unless `overwrite`, and for a file."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ClearwingError(argument, path, "a file is in the way; give another name")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ClearwingError(argument, path, "exists and is not empty; use --overwrite or another folder")
