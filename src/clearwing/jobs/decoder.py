"""The second course: the classifier's masks of its training pictures teach a decoder on its own features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.data.loader import Pictures, epoch_order
from clearwing.jobs import inputs
from clearwing.jobs.maskers import stages
from clearwing.jobs.progress import Progress, TrainingBar
from clearwing.masks.pipeline import VOTERS, resized, segment_with, vote
from clearwing.models.decoder import Decoder, Segmenter
from clearwing.run import Run
from clearwing.train.devices import is_child, make_fabric
from clearwing.train.ema import EMA
from clearwing.train.fit import fit
from clearwing.train.masks import MaskAugment, mask_loss, with_masks
from clearwing.train.optim import optimizer
from clearwing.train.schedule import Steps, schedule
from clearwing.types import Batch, ClearwingError

LEVELS = 5
"""Sizes of features that the decoder takes, at most: all of a ResNet's."""


@dataclass(frozen=True)
class Course:
    """How a decoder is taught. Usual values, set without a search."""

    pictures: int = 4000  # at the most, spread over the training pictures
    steps: int = 500
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-2
    ema: float = 0.99
    scale: float = 0.5  # the smallest crop, as a share of the picture
    width: int = 32


def teach(run: Run, device: str, progress: Progress, course: Course = Course()) -> Segmenter:
    """Train the run's decoder on the masks that its own network gives of its training pictures, and save it.

    No drawn mask is read. Raises ClearwingError where the training pictures are not there any more.
    """
    loaded = inputs.open_model(str(run.path))
    dataset = inputs.open_like_run(run, None)
    if "train" not in dataset.splits:
        raise ClearwingError("--pipeline", "decoder", f"the training pictures of {run.path} are not there any more")
    samples = inputs.limited(dataset.splits["train"], course.pictures)
    pictures = inputs.load_for(loaded, samples, None, progress)
    side = VOTERS[0].side(loaded.size)
    fine = inputs.load_for(replace(loaded, size=side), samples, None, progress) if side > loaded.size else pictures
    fabric = make_fabric(device)
    model = loaded.model.to(fabric.device)
    shares, agreement = votes(model, pictures, fine, fabric.device, progress)
    found = (shares > 0.5).flatten(1).any(1)
    if not found.any():
        raise ClearwingError("--pipeline", "decoder", "the network gives no mask to teach with; train it longer")
    taught = with_masks(pictures, shares, agreement * found)  # a picture without a mask does not say: no object
    segmenter = trained_decoder(model, taught, fabric, course, progress)
    about = {
        "weights_sha256": inputs.weights_hash(run),
        "pictures": len(pictures),
        "without_mask": int((~found).sum()),
        "agreement": float(agreement.mean()),
        "masks_used": 0,
        "course": vars(course),
    }
    run.save_decoder(segmenter, about)
    return segmenter


def votes(
    model: nn.Module, pictures: Pictures, fine: Pictures, device: torch.device, progress: Progress, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """What VOTERS make of the pictures: the share that says foreground (N, H, W), at the network's size, and how well
    they agree, (N,)."""
    told, shares, agreements = progress.task("making masks to learn from"), [], []
    size = (pictures.images.shape[2], pictures.images.shape[3])
    methods = list(dict.fromkeys(voter.method for voter in VOTERS))
    layers: list[str] = []
    done = 0
    for batch, finer in zip(*(p.batches(batch_size, device=device) for p in (pictures, fine)), strict=True):
        layers = layers or stages(model, batch.images, max(voter.layers for voter in VOTERS))
        found = explain(model, batch, methods, layers=layers, target="pred", average=VOTERS[0].average)
        made = []
        for voter in VOTERS:
            own = layers[-voter.layers :]
            maps = [found[f"{voter.method}@{layer}"] for layer in own]
            recipe = replace(voter, layers=len(own), weights=voter.weights[-len(own) :])
            made.append(segment_with(recipe, maps, finer).masks)
        share, agreement = vote(made)
        shares.append(resized(share, size).clamp(0, 1).cpu())
        agreements.append(agreement.cpu())
        done += len(batch)
        told(done, len(pictures))
    return torch.cat(shares), torch.cat(agreements)


def trained_decoder(
    model: nn.Module, pictures: Pictures, fabric: Fabric, course: Course, progress: Progress, seed: int = 0
) -> Segmenter:
    """A decoder on a classifier's features, taught by pictures with masks (see `with_masks`); in eval mode."""
    one = next(iter(pictures.subset(1).batches(1, device=fabric.device))).images[:, :-2]
    layers = stages(model, one, LEVELS)
    features = record(model, one, layers, inputs=False).features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder([features[layer].shape[1] for layer in layers], course.width)
    segmenter = Segmenter(model, decoder, layers).to(fabric.device).to(memory_format=torch.channels_last)
    augment = MaskAugment(one.shape[2], (course.scale, 1.0))
    batch = min(course.batch, len(pictures))
    per_epoch = max(1, len(pictures) // batch)
    ema = EMA(segmenter, course.ema)

    def batches(epoch: int, start: int) -> Iterator[Batch]:
        order = epoch_order(len(pictures), seed, epoch)
        return pictures.batches(
            batch,
            device=fabric.device,
            order=order,
            augment=augment,
            seed=seed,
            epoch=epoch,
            start=start,
            drop_last=True,
            ahead=1,
        )

    fit(
        segmenter,
        batches,
        mask_loss(),
        optimizer=optimizer(segmenter.decoder, "adamw", course.lr, weight_decay=course.weight_decay),
        schedule=schedule("cosine"),
        plan=Steps(max(course.steps, per_epoch)),
        fabric=fabric,
        ema=ema,
        watchers=[TrainingBar(progress, len(pictures))],
    )
    averaged = ema.module
    return Segmenter(model, averaged.decoder, layers).eval() if isinstance(averaged, Segmenter) else segmenter


def has_decoder(run: Run) -> bool:
    """Whether the run has a decoder of its present weights."""
    about = run.decoder_about()
    return about is not None and about.get("weights_sha256") == inputs.weights_hash(run)


def decoder_of(run: Run, device: str, retrain: bool, progress: Progress) -> None:
    """See to it that the run has a decoder of its present weights: train one where it has none.

    In a process on its own: raises ClearwingError where one of a group would have to train while the others wait.
    """
    if has_decoder(run) and not retrain:
        return
    if is_child():
        mend = "has to be trained by one process first: call this once without torchrun or srun, with --limit 1"
        raise ClearwingError("--pipeline", "decoder", mend)
    if run.decoder_about() is not None and not retrain:
        progress.say("note: the decoder is of earlier weights of this run; it is trained anew")
    progress.say("training the decoder on masks of the training pictures, made from the network alone")
    teach(run, device, progress)
