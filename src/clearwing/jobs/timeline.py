"""Explanation during training: where the network looks on fixed pictures, an epoch a file, and how well it covers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clearwing.attribution.cams import grad_cam
from clearwing.attribution.layers import find_layer
from clearwing.attribution.network import wide
from clearwing.attribution.trace import record
from clearwing.attribution.views import upsample
from clearwing.data.loader import Pictures, spread
from clearwing.jobs import inputs
from clearwing.jobs.progress import Progress, TensorBoard
from clearwing.masks.baselines import centre_gaussian
from clearwing.masks.threshold import binarize
from clearwing.measure.overlap import iou
from clearwing.run import Run, make_folder
from clearwing.show import draw
from clearwing.types import FOREGROUND, IGNORE, Batch, ClearwingError, Geometry, atomic_path

FOLDER = "timeline"
MASKED = 64
"""Of so many pictures with a true mask the IoU is taken, at most."""
BATCH = 64
"""Pictures in one pass."""
THRESHOLD = "otsu"
"""Makes a mask of a map (see `binarize`); it has no number that could be fitted to the masks it is scored on."""


@dataclass(frozen=True, eq=False)
class Glance:
    """Where the network looked after one epoch: what one file of RUN/timeline holds."""

    epoch: int
    layer: str
    keys: tuple[str, ...]  # n pictures
    labels: Tensor  # (n,) int64, the classes explained
    maps: Tensor  # (n, h, w) float32: Grad-CAM, rectified, at the layer's own size; `upsample` makes it the picture's
    logits: Tensor  # (n, K)
    iou: Tensor  # (m,), of the pictures with a mask; m may be 0
    baseline: float | None  # the mean IoU of a Gaussian on the centre under the same rule

    @property
    def probabilities(self) -> Tensor:
        """Of the true classes, (n,)."""
        return self.logits.softmax(1).gather(1, self.labels[:, None])[:, 0]

    @property
    def mask_iou(self) -> float | None:
        """The mean over the pictures with a mask; None where there is none."""
        return float(self.iou.double().mean()) if len(self.iou) else None


class Timeline:
    """The Grad-CAM of fixed pictures after every epoch, written to RUN/timeline, and the IoU of masks made of it.

    run: whose folder is written to; an epoch that is done again replaces its file, so a resumed run goes on.
    pictures: the watched split, at the network's size, with labels.
    count: pictures to show, spread evenly over the classes and, within a class, over its pictures: they are chosen
        before the network has seen them. Those with a true mask that are scored, at most `masks`, are chosen likewise.
    board: is given a picture of all maps after every epoch.
    autocast: a context for the forward pass, such as `fabric.autocast`.

    A mask is the Grad-CAM of the true class at the default layer, upsampled to the network's size, where it exceeds
    its own Otsu threshold. It is scored at that size, against the true mask brought there; padding counts nowhere,
    and a true mask of which nothing is left in the picture is not scored.

    Raises ClearwingError for a count below 1, and for pictures without labels.
    """

    def __init__(
        self,
        run: Run,
        pictures: Pictures,
        count: int,
        *,
        masks: int = MASKED,
        progress: Progress | None = None,
        board: TensorBoard | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if count < 1:
            raise ClearwingError("--explain", count, "give at least 1 picture")
        if pictures.labels is None:
            raise ClearwingError("--explain", count, "the watched pictures have no labels to explain")
        self.run, self.board, self.autocast = run, board, autocast
        shown = over_classes(pictures.labels, torch.arange(len(pictures)), count)
        masked, truths = scored(pictures, pictures.labels, masks, progress or Progress(quiet=True))
        self.count, kept = len(shown), list(dict.fromkeys([*shown, *masked]))  # those to show come first
        self.pictures, self.labels = pictures.subset(kept), pictures.labels[kept]
        self.masked = torch.tensor([kept.index(i) for i in masked], dtype=torch.int64)  # (m,), of the P pictures kept
        self.truths = truths  # (m, H, W)
        self.baseline: float | None = None
        if len(masked):
            gaussian = centre_gaussian(truths[:, None])
            self.baseline = float(iou(binarize(gaussian, THRESHOLD), truths).mean())

    def after_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Look at the pictures, write what was seen, and give {"mask_iou": mean}, or {} without masks.

        `epoch` is the number in the metrics; 0 is the network before training. One process of a run calls it.

        Raises ClearwingError for a network without a layer to look at, as `find_layer` does.
        """
        glance = self.look(model, epoch)
        write(self.run, glance)
        if self.board is not None:
            self.board.image("where it looks", self._montage(glance, model), epoch)
        return {} if glance.mask_iou is None else {"mask_iou": glance.mask_iou}

    def look(self, model: nn.Module, epoch: int) -> Glance:
        """One recorded pass over the pictures, and nothing written.

        The modes of the model's modules, its gradients and the random generators are left as they were.
        """
        device = next(model.parameters()).device
        with evaluating(model):
            layer = find_layer(model, next(self.pictures.batches(1, device=device)))
            batches = zip(self.pictures.batches(BATCH, device=device), self.labels.split(BATCH), strict=True)
            parts = [self._seen(model, layer, batch, labels) for batch, labels in batches]
        maps, logits = (torch.cat(part) for part in zip(*parts, strict=True))  # (P, h, w), (P, K)
        values = maps.new_empty(0)
        if len(self.masked):
            self.truths = self.truths.to(device)
            fine = upsample(maps[self.masked.to(device)], *self.truths.shape[1:])
            values = iou(binarize(fine, THRESHOLD), self.truths)
        shown = slice(self.count)
        keys, labels = self.pictures.keys[shown], self.labels[shown]
        maps, logits = maps[shown].cpu(), logits[shown].cpu()
        return Glance(epoch, layer, keys, labels, maps, logits, values.cpu(), self.baseline)

    def _seen(self, model: nn.Module, layer: str, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One recorded pass: maps (N, h, w) of the true classes, rectified, and logits (N, K)."""
        with self.autocast():
            trace = record(model, batch, [layer], inputs=False)
        scores = trace.scores(labels)
        G = trace.gradients(scores, of=[layer], keep=False)[layer]
        maps = grad_cam(wide(trace.features[layer]), wide(G)).clamp(min=0)
        return maps.float(), trace.logits.detach().float()

    def _montage(self, glance: Glance, model: nn.Module) -> draw.Picture:
        """The pictures with their maps, and the probabilities of their true classes: uint8 (H, W, 3)."""
        images = self.pictures.images[: self.count]
        tiles = draw.overlay(images, upsample(glance.maps, *images.shape[2:]))
        names = getattr(model, "class_names", ())
        truths = [names[k] if names else f"class {k}" for k in glance.labels.tolist()]
        shares = glance.probabilities.tolist()
        captions = [f"{name}\n{share:.0%}" for name, share in zip(truths, shares, strict=True)]
        return draw.montage(tiles, captions)


def over_classes(labels: Tensor, index: Tensor, count: int) -> list[int]:
    """`count` of the positions `index`, as many of each class of labels (N,) as there are, evenly within each; or all.

    Where there are more classes than `count`, these are spread over the classes.
    """
    groups = [index[labels[index] == label].tolist() for label in labels[index].unique()]
    if not groups:
        return []
    groups = [groups[k] for k in spread(len(groups), count)]
    take = [0] * len(groups)
    for _ in range(min(count, sum(map(len, groups)))):
        k = min((k for k, group in enumerate(groups) if take[k] < len(group)), key=lambda k: take[k])
        take[k] += 1
    return [group[i] for group, n in zip(groups, take, strict=True) for i in spread(len(group), n)]


def scored(pictures: Pictures, labels: Tensor, most: int, progress: Progress) -> tuple[list[int], Tensor]:
    """The positions of at most `most` pictures with a usable mask, and these masks at the pictures' size (m, H, W)."""
    index = torch.tensor([i for i, sample in enumerate(pictures.samples) if sample.mask is not None], dtype=torch.int64)
    chosen = over_classes(labels, index, most) if most > 0 else []
    kept: dict[int, Tensor] = {}
    if chosen:
        some = pictures.subset(chosen)
        full, _ = inputs.read_truths(some, progress)
        for i, mask, place in zip(chosen, full, some.geometry, strict=True):
            fitted = None if mask is None else fit_mask(mask, place)
            if fitted is not None and bool((fitted == FOREGROUND).any()):
                kept[i] = fitted
    empty = torch.empty(0, *pictures.images.shape[2:], dtype=torch.uint8)
    return list(kept), torch.stack(list(kept.values())) if kept else empty


def fit_mask(mask: Tensor, place: Geometry) -> Tensor:
    """A mask (height, width) of the original picture at the network's size (H, W), each pixel the nearest one's code.

    What lies outside the original picture, as padding does, is to be ignored.
    """
    H, W = place.size
    rows = place.top + ((torch.arange(H) + 0.5) * (place.box_height / H)).floor().long()
    columns = place.left + ((torch.arange(W) + 0.5) * (place.box_width / W)).floor().long()
    columns = columns.flip(0) if place.flip else columns
    inside = ((rows >= 0) & (rows < place.height))[:, None] & (columns >= 0) & (columns < place.width)
    picked = mask[rows.clamp(0, place.height - 1)[:, None], columns.clamp(0, place.width - 1)]
    return torch.where(inside, picked, IGNORE).to(torch.uint8)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode; afterwards each module is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def write(run: Run, glance: Glance) -> None:
    """Write a glance to its file in the run, all or nothing."""
    tensors = {name: getattr(glance, name).contiguous() for name in ("labels", "maps", "logits", "iou")}
    about = {name: getattr(glance, name) for name in ("epoch", "layer", "keys", "baseline")}
    path = make_folder(run.file(FOLDER), "--out") / f"epoch_{glance.epoch:04}.safetensors"
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"about": json.dumps(about)}))


def read_timeline(run: Run) -> list[Glance]:
    """The glances of the run's epochs in their order; those alone that show what the last one shows.

    An epoch that is not in the metrics was not finished, and is left out.
    Raises ClearwingError for a file that is broken.
    """
    glances = []
    for path in run.file(FOLDER).glob("epoch_*.safetensors"):
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in ("labels", "maps", "logits", "iou")}
        except SafetensorError as error:
            raise ClearwingError("run", path, f"is broken ({error}); delete it") from error
        glances.append(Glance(**tensors | about | {"keys": tuple(about["keys"])}))
    last_epoch = max((row["epoch"] for row in run.metrics), default=0)
    glances = sorted((one for one in glances if one.epoch <= last_epoch), key=lambda one: one.epoch)
    return [one for one in glances if one.keys == glances[-1].keys]
