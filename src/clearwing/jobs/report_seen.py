"""The parts of a report that show where a network looks: at its mistakes, by several methods, and after each epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import METHODS, explain
from clearwing.attribution.views import upsample
from clearwing.config import ReportConfig
from clearwing.data.loader import Pictures, spread
from clearwing.data.preprocess import fit_geometry, read_picture, restore
from clearwing.jobs import inputs
from clearwing.jobs.progress import Progress
from clearwing.jobs.timeline import Glance, read_timeline
from clearwing.run import Run
from clearwing.show import draw
from clearwing.show import report as page
from clearwing.train.devices import make_fabric
from clearwing.train.predict import predict_logits
from clearwing.types import Batch, ClearwingError

LOOKS = 8  # epochs that the timeline shows, the first and the last among them
EXPLAINED = 6  # pictures that several methods are shown on
METHODS_SHOWN = ("saliency", "grad-cam", "layer-cam", "guided-backprop", "guided-grad-cam")  # quick, and asked for most


class Seen:
    """A split as the network sees it: the pictures, its logits, and the true classes where they are known."""

    def __init__(self, run: Run, pictures: Pictures, logits: Tensor, labels: Tensor | None, larger_than: int | None):
        self.run, self.pictures, self.logits, self.labels = run, pictures, logits, labels
        self.skipped = len(pictures.skipped)
        self.names = run.class_names
        self.predicted = logits.argmax(1)
        self.confidence = logits.softmax(1).amax(1)
        self.model = run.model
        one = next(iter(pictures.subset(1).batches(1))).images
        self.layer = find_layer(self.model, one, larger_than=larger_than)

    def wrong(self) -> list[int]:
        """The misclassified, the most confident first."""
        if self.labels is None:
            return []
        found = (self.predicted != self.labels).nonzero().flatten().tolist()
        return sorted(found, key=lambda i: -float(self.confidence[i]))

    def batch(self, indices: list[int]) -> Batch:
        return next(iter(self.pictures.subset(indices).batches(len(indices))))

    def picture(self, i: int) -> Any:
        """The original picture, uint8 (H, W, 3)."""
        return draw.to_rgb(read_picture(self.pictures.samples[i].source))

    def overlays(self, indices: list[int], method: str, target: Any = "pred") -> list[Any]:
        """The method's overlay on the original picture, for each."""
        made = explain(
            self.model, self.batch(indices), method, self.layer if METHODS[method].needs_layer else None, target
        )
        full = restore(made.maps[:, 0], made.geometry)
        return [draw.overlay(self.picture(i), item) for i, item in zip(indices, full, strict=True)]

    def named(self, i: int) -> str:
        return f"{self.names[int(self.predicted[i])]} ({float(self.confidence[i]):.0%})"

    def about(self, i: int) -> str:
        said = f"predicted {self.named(i)}"
        return said if self.labels is None else f"true {self.names[int(self.labels[i])]}, {said}"


def look(run: Run, config: ReportConfig, split: str, progress: Progress) -> Seen | None:
    """The split through the network; None where its pictures are not there any more."""
    try:
        dataset = inputs.open_run_data(run, config.data, config.classes, config.pattern)
        samples = inputs.split_of(dataset, split)
    except ClearwingError as error:
        if config.data is not None or config.split is not None:
            raise
        progress.say(f"note: the report has no pictures: {error}")
        return None
    loaded = inputs.open_model(config.run)
    pictures = inputs.load_for(loaded, samples, config.limit, progress)
    inputs.told_skipped(pictures, progress)
    fabric = make_fabric(config.device, "float32")
    logits, labels = predict_logits(run.model.to(fabric.device), pictures, fabric)
    run.model.cpu()  # the galleries are a few dozen pictures
    return Seen(run, pictures, logits, labels if len(labels) else None, config.larger_than)


def mistakes(seen: Seen, config: ReportConfig) -> tuple[page.Mistake, ...]:
    """The misclassified with the Grad-CAM of the class they were taken for and of the class they are."""
    wrong = seen.wrong()[: config.most]
    if not wrong or seen.labels is None:
        return ()
    taken = seen.overlays(wrong, "grad-cam", seen.predicted[wrong])
    true = seen.overlays(wrong, "grad-cam", seen.labels[wrong])
    return tuple(
        page.Mistake(
            seen.pictures.keys[i],
            seen.names[int(seen.labels[i])],
            seen.names[int(seen.predicted[i])],
            float(seen.confidence[i]),
            seen.picture(i),
            taken[at],
            true[at],
        )
        for at, i in enumerate(wrong)
    )


def method_rows(seen: Seen) -> tuple[page.MethodRow, ...]:
    """Pictures spread over the split as several methods see them."""
    shown = spread(len(seen.pictures), EXPLAINED)
    drawn = {name: seen.overlays(shown, name) for name in METHODS_SHOWN}
    return tuple(
        page.MethodRow(seen.pictures.keys[i], seen.picture(i), {name: drawn[name][at] for name in drawn}, seen.about(i))
        for at, i in enumerate(shown)
    )


def timeline(run: Run, config: ReportConfig) -> page.Timeline | None:
    """Where the network looked after some of the epochs, and how well that covered the drawn masks; None without."""
    glances = read_timeline(run)
    if not glances:
        return None
    about = "A mask is where the map lies above its own Otsu threshold, at the network's size; nothing was fitted to"
    about += " the drawn masks. The dashed line is the same rule on a Gaussian in the centre, without a network."
    return page.Timeline(
        timeline_rows(run, glances, config),
        {one.epoch: one.mask_iou for one in glances if one.mask_iou is not None},
        len(glances[-1].iou),
        glances[-1].baseline,
        about,
    )


def timeline_rows(run: Run, glances: list[Glance], config: ReportConfig) -> tuple[page.TimelineRow, ...]:
    """The pictures that are still there, with their maps after epochs spread over the run."""
    watch, size = run.config["resolved"]["watch"], run.config["resolved"]["size"]
    try:
        dataset = inputs.open_run_data(run, config.data, config.classes, config.pattern)
        samples = {sample.key: sample for sample in inputs.split_of(dataset, watch)}
    except ClearwingError:
        return ()  # `look` has said it
    last = len(glances) - 1
    shown = [glances[i] for i in sorted({round(k * last / (LOOKS - 1)) for k in range(LOOKS)})]
    rows = []
    for i, key in enumerate(shown[-1].keys):
        if key not in samples:
            continue
        picture = draw.to_rgb(read_picture(samples[key].source))
        place = fit_geometry(picture.shape[0], picture.shape[1], size, run.config["train"]["fit"])
        maps = torch.stack([upsample(one.maps[i], *place.size) for one in shown])
        looks = {
            one.epoch: (draw.overlay(picture, full), float(one.probabilities[i]))
            for one, full in zip(shown, restore(maps[None], [place])[0], strict=True)
        }
        rows.append(page.TimelineRow(key, run.class_names[int(shown[-1].labels[i])], picture, looks))
    return tuple(rows)
