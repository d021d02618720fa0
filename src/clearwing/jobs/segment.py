"""The job `segment`: masks of a split in the pictures' own size, scored beside baselines where true masks are known.

Pictures are read, segmented and written a block at a time, each process its own, so that of their number only names and
results take memory; the manifest says what is done, and `segmentation.json` is made from it at the end.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearwing import __version__
from clearwing.attribution.modules import calls
from clearwing.config import SegmentConfig, as_json
from clearwing.data.loader import Pictures, load_sizes, made_ahead
from clearwing.data.sources import ALL, Dataset, Sample, open_data
from clearwing.jobs import inputs
from clearwing.jobs.calibrate import calibrated, held_out
from clearwing.jobs.decoder import decoder_of
from clearwing.jobs.manifest import Manifest
from clearwing.jobs.mask_files import MaskWriter, check_format
from clearwing.jobs.mask_recipe import chosen_recipe, threshold_value
from clearwing.jobs.mask_results import finished
from clearwing.jobs.maskers import (
    SURE,
    DecoderMasker,
    Masked,
    Masker,
    NetworkMasker,
    Prepared,
    fitted,
    restored,
    rivals,
    whole,
)
from clearwing.jobs.progress import Progress
from clearwing.jobs.tally import curve_sums, scores_of
from clearwing.masks import formats
from clearwing.masks.pipeline import Recipe
from clearwing.run import DECODER, Run, check_free, make_folder, plain
from clearwing.settings import class_list, comma_list
from clearwing.train.collectives import one_fails_all_stop, share
from clearwing.train.devices import check_devices, is_child, is_first, make_fabric
from clearwing.train.processes import in_processes
from clearwing.types import ClearwingError

ONCE = ("out", "resume", "overwrite", "json", "devices", "nodes", "device", "batch_size", "retrain")
"""Settings that say nothing about the masks: a resumed run may have others."""


def segment(config: SegmentConfig) -> dict[str, Any]:
    """Segment a split; returns what the command prints (of several processes, the first one's)."""
    recipe = chosen_recipe(config)
    if config.batch_size < 1:
        raise ClearwingError("--batch-size", config.batch_size, "give at least 1 picture")
    loaded = inputs.open_model(config.run, size=config.size, fit=config.fit)
    if config.pipeline == "decoder":
        check_decoder(config, loaded.run)
    calls(loaded.model, comma_list(config.layers))  # a name that the network does not have is refused before any work
    check_format(config, loaded.model.num_classes or len(loaded.model.class_names))
    dataset = open_samples(config, loaded.run)
    samples = inputs.limited(inputs.split_of(dataset, config.split), config.limit)
    if config.masks is not None and not any(sample.mask is not None for sample in samples):
        raise ClearwingError(
            "--masks", config.masks, f"holds no mask of the {len(samples)} pictures; mirror their folders"
        )
    held = held_out(config, samples)
    writer = MaskWriter(config, [sample.key for sample in samples], loaded.model.class_names)
    check_output(config, writer, inputs.split_of(dataset, ALL))
    if not is_child():
        check_devices(config.device, config.devices)
        if config.devices > 1 or config.nodes > 1:
            if config.nodes == 1:  # a decoder is trained here, for the processes would wait for one of them
                with Progress(config.json) as progress:
                    begin(config, loaded, samples, writer, progress)
                config = replace(config, retrain=False)
            result = in_processes(segment, config, devices=config.devices, nodes=config.nodes)
            return result or {"exit_code": 0}
    fabric = make_fabric(config.device, "float32", devices=config.devices, nodes=config.nodes)
    with one_fails_all_stop(fabric), Progress(config.json or not fabric.is_global_zero) as progress:
        out, rank, world = Path(config.out), fabric.global_rank, fabric.world_size
        if fabric.is_global_zero:
            begin(config, loaded, samples, writer, progress)
        fabric.barrier()
        prepared = prepare(config, recipe, loaded, samples, fabric.device, progress)
        manifest = Manifest(out, settings_of(config, loaded.run), rank)
        fabric.barrier()  # nothing more can be refused: what is to be replaced may go
        if fabric.is_global_zero and not config.resume:
            forget(out, manifest)
        fabric.barrier()
        done = {record["key"] for block in manifest.blocks() for record in block["pictures"]}
        if done:
            going_on(out, manifest, done, {sample.key for sample in samples}, progress)
        left = [s for s in samples if s.key not in done and s.key not in held]
        fabric.barrier()  # all have read what was done before one adds to it
        if mine := [left[i] for i in share(len(left), rank, world)]:
            manifest.start()
        work = Work(config, prepared, loaded, writer, manifest, fabric.device, progress, dataset.class_names)
        began = time.monotonic()
        work.run(mine)
        fabric.barrier()
        rate = round(len(left) / (time.monotonic() - began), 2) if left else None  # of all processes
        if not fabric.is_global_zero:
            return {"exit_code": 0}
    return finished(config, prepared, loaded, dataset, manifest, writer, rate)


def prepare(
    config: SegmentConfig,
    recipe: Recipe,
    loaded: inputs.Loaded,
    samples: Sequence[Sample],
    device: torch.device,
    progress: Progress,
) -> Prepared:
    """The masker, its rivals where there is something to score, and what calibration chose."""
    model = loaded.model.to(device)
    one = some_picture(loaded, samples).to(device)
    layers = comma_list(config.layers)
    if not layers:
        recipe, layers = fitted(recipe, model, one)
    chosen: dict[str, Any] = {}
    cut = 0.5
    if config.calibrate:
        recipe, layers, cut, chosen = calibrated(config, recipe, layers, loaded, samples, device, progress)
    masker: Masker
    if config.pipeline == "decoder" and loaded.run is not None:
        segmenter = loaded.run.load_segmenter().to(device)
        precise = make_fabric(config.device)
        masker = DecoderMasker(segmenter, precise.autocast, cut, config.refine == "grabcut")
        threshold: dict[str, Any] = {"how": "probability", "value": cut, "layers": list(segmenter.layers)}
        if masker.refine:
            threshold |= {"how": "grabcut", "value": None, "sure": list(SURE)}
        threshold["decoder"] = loaded.run.decoder_about()
    else:
        masker = NetworkMasker(model, recipe, layers)
        threshold = {"how": recipe.threshold, "value": threshold_value(recipe), "layers": layers}
    threshold |= {"recipe": plain(vars(recipe)) | {"maps": [f"{recipe.method}@{x}" for x in layers] or [recipe.method]}}
    threshold |= {"chosen_on": chosen} if chosen else {}
    against: dict[str, Masker] = {}
    if config.baselines and any(sample.mask is not None for sample in samples):
        against = rivals(untrained(loaded.run, config.seed, device), recipe, layers)
    return Prepared(masker, against, recipe.side(loaded.size), threshold, chosen.get("masks", 0), cut)


class Work:
    """What one process does: its pictures, a block at a time."""

    def __init__(
        self,
        config: SegmentConfig,
        prepared: Prepared,
        loaded: inputs.Loaded,
        writer: MaskWriter,
        manifest: Manifest,
        device: torch.device,
        progress: Progress,
        label_names: tuple[str, ...],
    ) -> None:
        self.config, self.prepared, self.loaded, self.writer = config, prepared, loaded, writer
        self.manifest, self.device, self.progress = manifest, device, progress
        self.label_names = label_names

    def run(self, samples: Sequence[Sample]) -> None:
        """Segment the samples; what is done is in the manifest even where this is killed."""
        told, size = self.progress.task("segmenting", rate=True), self.config.batch_size
        blocks = (samples[start : start + size] for start in range(0, len(samples), size))
        done = 0
        for pictures, fine in made_ahead(self.read(blocks), 1):
            self.manifest.add(self.block(pictures, fine))
            done += len(pictures) + len(pictures.skipped)
            told(done, len(samples))

    def read(self, blocks: Iterable[Sequence[Sample]]) -> Iterator[tuple[Pictures, Pictures]]:
        """The pictures of each block as the network takes them and as they are refined.

        In one thread beside the work: more would take the cores from it.
        """
        sizes = (self.loaded.size, self.prepared.side)
        common: dict[str, Any] = {"fit": self.loaded.fit, "channels": self.loaded.channels, "workers": 1}
        for block in blocks:
            pictures, fine = load_sizes(block, sizes, empty=True, **common)
            yield pictures, fine

    def block(self, pictures: Pictures, fine: Pictures) -> dict[str, Any]:
        """Make, write and score the masks of one block: its line in the manifest."""
        skipped = [{"key": key, "skipped": why} for key, why in inputs.told_skipped(pictures, self.progress)]
        if not len(pictures):
            return {"pictures": skipped}
        batch, finer = (next(p.batches(len(pictures), device=self.device)) for p in (pictures, fine))
        truths, unscored = inputs.read_truths(pictures, self.progress)
        made = self.prepared.masker(batch, finer)
        full = whole(made, batch, finer, self.prepared.cut)
        records = [self.record(i, sample, made, full[i]) for i, sample in enumerate(pictures.samples)]
        self.manifest.writing(self.writer.paths(pictures.keys))
        self.writer.write(pictures, full, records)
        line: dict[str, Any] = {"unscored": unscored}
        known = {i: truth for i, truth in enumerate(truths) if truth is not None}
        if known:
            masks = {"masks": full} | {
                name: whole(masker(batch, finer), batch, finer) for name, masker in self.prepared.rivals.items()
            }
            right = self.right(pictures, made.logits)
            empty = None if made.empty is None else [bool(made.empty[i]) for i in known]
            scores = scores_of({name: [of[i] for i in known] for name, of in masks.items()}, known, right, empty)
            for i, score in zip(known, scores, strict=True):
                records[i] |= score
            if made.maps is not None:
                maps = restored(made.maps, batch, finer)
                line["curve"] = curve_sums([maps[i] for i in known], list(known.values()))
        return line | {"pictures": [*records, *skipped]}

    def record(self, i: int, sample: Sample, made: Masked, mask: Tensor) -> dict[str, Any]:
        """What the manifest says of one picture."""
        found: dict[str, Any] = {
            "key": sample.key,
            "height": mask.shape[0],
            "width": mask.shape[1],
            "box": formats.box(mask),
            "share": round(float(mask.float().mean()), 6),
            "fell_back": made.fell_back is not None and bool(made.fell_back[i]),
            "empty": made.empty is not None and bool(made.empty[i]),
        }
        if made.logits is not None:
            probability, k = made.logits[i].float().softmax(0).max(0)
            found |= {"class": int(k), "probability": round(float(probability), 6)}
        if (file := self.writer.file(sample.key)) is not None:
            found["file"] = str(file)
        return found

    def right(self, pictures: Pictures, logits: Tensor | None) -> list[bool | None]:
        """Whether the network names each picture rightly; None where its label or its classes are not known."""
        names, known = self.loaded.model.class_names, self.label_names
        if logits is None or not names:
            return [None] * len(pictures)
        said = logits.argmax(1).tolist()
        return [
            None if sample.label is None or not known else known[sample.label] == names[k]
            for sample, k in zip(pictures.samples, said, strict=True)
        ]


def check_decoder(config: SegmentConfig, run: Run | None) -> None:
    """Refuse a decoder where there is no run to train it for, and at another size than it is taught at."""
    if run is None:
        raise ClearwingError("--pipeline", "decoder", "is trained for a RUN; give one, or take refine")
    taught_at = run.config["model"]["input_size"]
    if config.size not in (None, taught_at):
        raise ClearwingError("--size", config.size, f"the decoder is taught at {taught_at} px; leave it out")


def check_output(config: SegmentConfig, writer: MaskWriter, samples: Sequence[Sample]) -> None:
    """Refuse a folder in which something that is read would be replaced, or that holds something, unless it is to be
    gone on with or replaced."""
    inputs.keep_sources(config.out, writer.paths(), samples, beside=True)
    if config.overwrite:  # a call may read what an earlier one wrote, but not put its own in the place of that
        old = Manifest(Path(config.out), {}).written()
        inputs.keep_sources(config.out, [path.relative_to(config.out) for path in old], samples)
    if config.resume and config.overwrite:
        raise ClearwingError("--resume", "with --overwrite", "choose one of them")
    if is_first():
        check_free(config.out, config.overwrite or config.resume)
        make_folder(config.out)


def begin(
    config: SegmentConfig,
    loaded: inputs.Loaded,
    samples: Sequence[Sample],
    writer: MaskWriter,
    progress: Progress,
) -> None:
    """What one process does before all: check that what is there can be gone on with, and see to the decoder."""
    run, manifest = loaded.run, Manifest(Path(config.out), settings_of(config, loaded.run))
    if config.resume:
        tables = (Path("segmentation.json"), *writer.paths())
        if not manifest.there() and (there := next((x for x in tables if (manifest.folder / x).exists()), None)):
            mend = f"holds {there}, and no manifest to go on from; give another --out, or --overwrite"
            raise ClearwingError("--resume", config.out, mend)
        manifest.check()
    if config.pipeline == "decoder" and run is not None:
        some_picture(loaded, samples)  # before a training that may take half an hour
        decoder_of(run, config.device, config.retrain and not (config.resume and manifest.there()), progress)


def going_on(out: Path, manifest: Manifest, done: set[str], keys: set[str], progress: Progress) -> None:
    """Say how much of the pictures is done, by their keys, and what of it is not as it was."""
    progress.say(f"going on: {len(done & keys)} of {len(keys)} pictures are done")
    if gone := len(done - keys):
        progress.say(f"note: {gone} of the pictures done are not in the data any more; they stay in the results")
    made = (record for block in manifest.blocks() for record in block["pictures"])
    if lost := sum("file" in record and not (out / record["file"]).is_file() for record in made):
        progress.say(f"note: {lost} of the masks made are gone from {out}; --overwrite makes all anew")


def forget(out: Path, manifest: Manifest) -> None:
    """Delete what an earlier call left in the folder, as far as its manifest says so, and no other file."""
    for path in manifest.written():
        path.unlink(missing_ok=True)
    manifest.clear()
    for name in ("segmentation.json", "boxes.csv", "coco.json"):
        (out / name).unlink(missing_ok=True)


def settings_of(config: SegmentConfig, run: Run | None) -> dict[str, Any]:
    """What decides the masks: blocks of different settings are not joined."""
    settings = {key: value for key, value in as_json(config).items() if key not in ONCE}
    settings["clearwing"] = __version__  # another one may make other masks
    for name in ("run", "data", "masks"):  # wherever the command is called from
        settings[name] = settings[name] and inputs.full_name(settings[name])
    settings["weights_sha256"] = None if run is None else inputs.weights_hash(run)
    if config.pipeline == "decoder" and run is not None:
        path = run.file(DECODER)
        settings["decoder_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
    return settings


def open_samples(config: SegmentConfig, run: Run | None) -> Dataset:
    """The pictures; labels are not needed, so that they may be of classes the network does not know."""
    if run is None:
        classes = class_list(config.classes)
        return open_data(config.data, classes=classes, pattern=config.pattern, masks=config.masks)
    return inputs.open_like_run(run, config.data, config.classes, config.pattern, config.masks)


def some_picture(loaded: inputs.Loaded, samples: Sequence[Sample]) -> Tensor:
    """The first picture that can be read, (1, C, H, W); ClearwingError where none of all can."""
    found = next(iter(inputs.load_blocks(loaded, tuple(samples), 8)))
    return next(found.subset(1).batches(1)).images


def untrained(run: Run | None, seed: int, device: torch.device) -> Any:
    """The run's network before training, normalised like the trained one."""
    if run is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = run.build_model()
    network.load_state_dict({"mean": run.model.mean, "std": run.model.std}, strict=False)
    return network.to(device).to(memory_format=torch.channels_last)
