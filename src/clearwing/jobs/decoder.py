"""The second course: the classifier's masks of its training pictures teach a decoder on its own features."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from clearwing.attribution.cams import named_head
from clearwing.attribution.methods import explain
from clearwing.attribution.network import exact
from clearwing.attribution.trace import record
from clearwing.data.augment import seed_of
from clearwing.data.loader import Pictures, epoch_order
from clearwing.data.sources import BUILT_IN
from clearwing.jobs import inputs
from clearwing.jobs.maskers import stages
from clearwing.jobs.progress import Progress, TrainingBar
from clearwing.masks.pipeline import RECIPES, VOTERS, cut_likely, resized, segment_with, vote
from clearwing.models.decoder import Decoder, Segmenter
from clearwing.models.evidence import with_evidence
from clearwing.run import Run
from clearwing.train.devices import is_child, make_fabric
from clearwing.train.ema import EMA
from clearwing.train.fit import fit
from clearwing.train.masks import MaskAugment, lessons, mask_loss, with_masks
from clearwing.train.optim import optimizer
from clearwing.train.schedule import Steps, schedule
from clearwing.types import Batch, ClearwingError

REFINE = RECIPES["refine"]
LEVELS = 5
"""Sizes of features that the decoder takes, at most: all of a ResNet's."""
COARSEST = 4
"""Pixels of the decoder's coarsest level, about: from there it sees the whole picture."""
CHUNK = 4
"""Batches that pass the classifier together, to be learned from in mixed company."""
CUTS = ((0.99, 0.2), (0.99, 0.35), (0.95, 0.2))
"""Probabilities that are sure foreground and sure background where a decoder's masks are cut for the next round."""


@dataclass(frozen=True)
class Course:
    """How a decoder is taught: in rounds, the first on the masks of the network's maps, each next one on the masks of
    the decoder so far, cut along the pictures' edges. Rounds and trust were chosen on drawn pictures and on
    training photographs without their masks, `times` by the time it takes (benchmarks/RESULTS.md); the others are usual
    values, not searched."""

    pictures: int = 4000  # at the most, spread over the training pictures
    rounds: int = 3
    steps: int = 600  # a round
    batch: int = 32
    times: int = 4  # that a batch is learned from, once it has passed the classifier
    trust: float = 4.0  # the power of their agreement that masks count by
    lr: float = 2e-3
    weight_decay: float = 1e-2
    ema: float = 0.99
    scale: float = 0.5  # the smallest crop, as a share of the picture
    width: int = 16


def teach(run: Run, device: str, progress: Progress, anew: bool = False, *, course: Course = Course()) -> Segmenter:
    """Train the run's decoder on the masks that its own network gives of its training pictures, and save it after each
    round; go on with one whose training was broken off, unless it is to be trained `anew`.

    No drawn mask is read. Raises ClearwingError where the training pictures are not there any more.
    """
    loaded = inputs.open_model(str(run.path))
    where = run.config["data"]["where"]
    try:
        dataset = inputs.open_like_run(run, None)
        samples = dataset.split("train")
    except ClearwingError as error:
        if Path(where).exists() or where in BUILT_IN:
            raise
        mend = f"learns from the run's training pictures, which are not at {where} any more; bring them back"
        raise ClearwingError("--pipeline", "decoder", mend) from error
    samples = inputs.limited(samples, course.pictures)
    pictures, fine = inputs.load_with_fine(loaded, samples, REFINE.side(loaded.size), progress)
    about = {
        "weights_sha256": inputs.weights_hash(run),
        "pictures": len(pictures),
        "masks_used": 0,
        "takes": "features, and evidence where the head is linear",
        "course": vars(course),
    }
    kept, started = run.decoder_about(), None
    if kept is not None and not anew:
        if about.items() <= kept.items() and unfinished(kept):
            progress.say("note: the decoder's training was broken off; it goes on with the next round")
            started = run.load_segmenter(), kept["rounds"]
        else:
            progress.say("note: the decoder of this run is of other weights, pictures or settings; it is trained anew")
    for segmenter, rounds in taught(loaded.model, pictures, fine, make_fabric(device), course, progress, started):
        run.save_decoder(segmenter, about | {"rounds": rounds})
    return segmenter


def taught(
    model: nn.Module,
    pictures: Pictures,
    fine: Pictures,
    fabric: Fabric,
    course: Course,
    progress: Progress,
    started: tuple[Segmenter, list[dict[str, float]]] | None = None,
) -> Iterator[tuple[Segmenter, list[dict[str, float]]]]:
    """A decoder on a classifier's features, taught by what the classifier itself makes of the pictures, as it takes
    them and as they are refined: after each round of the course, with what is told of every round so far, how well its
    masks agreed (0 where a cut failed) and how many pictures had none. `started` is what an earlier call gave last."""
    model = model.to(fabric.device)
    segmenter, told = started or (new_decoder(model, pictures, fabric.device, course.width), [])
    segmenter = segmenter.to(fabric.device)
    if segmenter.head is None:
        progress.say("note: no linear head takes the mean of the last features; the decoder sees these, not the class")
    for count in range(len(told) + 1, course.rounds + 1):
        if count == 1:
            shares, agreement = votes(model, pictures, fine, fabric.device, progress)
        else:
            shares, agreement = revised(segmenter, pictures, fine, fabric, progress)
        found = (shares > 0.5).flatten(1).any(1)
        told = [*told, {"agreement": float(agreement.mean()), "without_mask": int((~found).sum())}]
        progress.say(f"round {count} of {course.rounds}: the masks agree by {agreement.mean():.2f}, of 1")
        weights = agreement**course.trust * found  # a picture without a mask does not say: no object
        if (weights * 255).round().any():
            segmenter = trained_decoder(
                segmenter, with_masks(pictures, shares, weights), fabric, course, progress, seed=count
            )
        elif count == 1:
            raise ClearwingError("--pipeline", "decoder", "the network gives no mask to teach with; train it longer")
        else:
            progress.say("no revised mask is fit to learn from: the decoder stays as it is")
        del shares, agreement, found, weights  # the next round makes its own, beside these they would be many
        yield segmenter, told


def new_decoder(model: nn.Module, pictures: Pictures, device: torch.device, width: int) -> Segmenter:
    """An untrained decoder on the classifier's features of such pictures, deep enough to see the whole of them."""
    one = next(iter(pictures.subset(1).batches(1, device=device))).images
    layers = stages(model, one, LEVELS)
    with exact(device.type):
        trace = record(model, one, layers, inputs=False)
    features, head = [trace.features[layer] for layer in layers], None
    with suppress(ClearwingError):  # of another head, the features alone have to do
        head, weight, _ = named_head(trace, layers[-1])
    if head is not None:
        features = with_evidence(features, weight[trace.logits.argmax(1)].float())
    context = max(0, round(math.log2(max(features[-1].shape[2:]) / COARSEST)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = Decoder([x.shape[1] for x in features], width, context)
    return Segmenter(model, decoder, layers, head).to(device).to(memory_format=torch.channels_last)


def votes(
    model: nn.Module, pictures: Pictures, fine: Pictures, device: torch.device, progress: Progress, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """What VOTERS make of the pictures: the share that says foreground (N, H, W), at the network's size, and how well
    they agree, (N,)."""
    methods = list(dict.fromkeys(voter.method for voter in VOTERS))
    one = next(pictures.subset(1).batches(1, device=device)).images
    layers = stages(model, one, max(voter.layers for voter in VOTERS))

    def voted(batch: Batch, finer: Batch) -> tuple[Tensor, Tensor]:
        found = explain(model, batch, methods, layers=layers, target="pred", average=VOTERS[0].average)
        made = []
        for voter in VOTERS:
            own = layers[-voter.layers :]
            maps = [found[f"{voter.method}@{layer}"] for layer in own]
            recipe = replace(voter, layers=len(own), weights=voter.weights[-len(own) :])
            made.append(segment_with(recipe, maps, finer).masks)
        return vote(made)

    told = progress.task("making masks to learn from")
    return batch_by_batch(voted, pictures, fine, batch_size, device, told)


def revised(
    segmenter: Segmenter, pictures: Pictures, fine: Pictures, fabric: Fabric, progress: Progress, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """What a decoder makes of the pictures it was taught by, cut along the edges of the finer ones, as `votes` gives
    it: the voters are the mask itself and its CUTS. Its probabilities are averaged over the picture and its mirror
    image."""

    def voted(batch: Batch, finer: Batch) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), fabric.autocast():
            mirrored = segmenter(batch.images.flip(3), finer.images.flip(3))[1].flip(2)
            views = [segmenter(batch.images, finer.images)[1], mirrored]
        likely = torch.stack(views).float().sigmoid().mean(0)
        made, fell_back = [likely > 0.5], torch.zeros(len(batch), dtype=torch.bool, device=likely.device)
        for sure in CUTS:
            cut, failed = cut_likely(likely, finer.images, sure)
            fell_back |= failed
            made.append(cut)
        share, agreement = vote(made)
        return share, torch.where(fell_back, 0, agreement)  # who repeats the decoder does not agree with it

    return batch_by_batch(voted, pictures, fine, batch_size, fabric.device, progress.task("revising the masks"))


def batch_by_batch(
    voted: Callable[[Batch, Batch], tuple[Tensor, Tensor]],
    pictures: Pictures,
    fine: Pictures,
    batch_size: int,
    device: torch.device,
    told: Callable[[int, int], object],
) -> tuple[Tensor, Tensor]:
    """Shares (N, H, W) at the network's size, and agreement (N,), of a vote on all pictures; on the CPU."""
    size = (pictures.images.shape[2], pictures.images.shape[3])
    shares, agreements, done = [], [], 0
    for batch, finer in zip(*(p.batches(batch_size, device=device) for p in (pictures, fine)), strict=True):
        share, agreement = voted(batch, finer)
        shares.append(resized(share, size).clamp(0, 1).cpu())
        agreements.append(agreement.cpu())
        done += len(batch)
        told(done, len(pictures))
    return torch.cat(shares), torch.cat(agreements)


def trained_decoder(
    segmenter: Segmenter, pictures: Pictures, fabric: Fabric, course: Course, progress: Progress, seed: int = 0
) -> Segmenter:
    """A copy whose decoder has learned from pictures with masks (see `with_masks`) for one round; in eval mode. The
    seed draws the order and the changes of the pictures."""
    segmenter = copy.deepcopy(segmenter)
    augment = MaskAugment(pictures.images.shape[2], (course.scale, 1.0))
    batch = min(course.batch, len(pictures))
    ema = EMA(segmenter.decoder, course.ema)

    def batches(epoch: int, start: int) -> Iterator[Batch]:
        chunks = pictures.batches(
            CHUNK * batch,
            device=fabric.device,
            order=epoch_order(len(pictures), seed, epoch),
            augment=augment,
            seed=seed,
            epoch=epoch,
            ahead=1,
        )
        shuffle, precise = seed_of(seed, epoch), fabric.autocast
        return lessons(segmenter, chunks, batch, times=course.times, seed=shuffle, autocast=precise)

    state = fit(
        segmenter.decoder,
        batches,
        mask_loss(),
        optimizer=optimizer(segmenter.decoder, "adamw", course.lr, weight_decay=course.weight_decay),
        schedule=schedule("cosine"),
        plan=Steps(course.steps),
        fabric=fabric,
        ema=ema,
        watchers=[TrainingBar(progress, len(pictures) * course.times, "IoU")],
    )
    if state.interrupted:
        raise KeyboardInterrupt
    segmenter.decoder.load_state_dict(ema.module.state_dict())
    return segmenter.eval()


def has_decoder(run: Run) -> bool:
    """Whether the run has a decoder of its present weights, taught to the end."""
    about = run.decoder_about()
    return about is not None and about.get("weights_sha256") == inputs.weights_hash(run) and not unfinished(about)


def unfinished(about: dict[str, Any]) -> bool:
    """Whether rounds of its course are left, because the teaching was killed."""
    return len(about.get("rounds", [])) < about.get("course", {}).get("rounds", 1)


def decoder_of(run: Run, device: str, retrain: bool, progress: Progress) -> None:
    """See to it that the run has a decoder of its present weights: train one where it has none.

    In a process on its own: raises ClearwingError where one of a group would have to train while the others wait.
    """
    if has_decoder(run) and not retrain:
        return
    if is_child():
        mend = "has to be trained by one process first: call this once without torchrun or srun, with --limit 1"
        raise ClearwingError("--pipeline", "decoder", mend)
    progress.say("training the decoder on masks of the training pictures, made from the network alone")
    teach(run, device, progress, retrain)
