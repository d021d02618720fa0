"""Run any number of methods on some pictures: one recorded pass for all that it can serve, and their maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clearwing.attribution import cams, gradients
from clearwing.attribution.modules import INPUT
from clearwing.attribution.network import Network, wide
from clearwing.attribution.targets import Asked, Question
from clearwing.attribution.trace import Trace
from clearwing.attribution.views import View, upsample
from clearwing.types import Explanation, Status


@dataclass(frozen=True)
class Method:
    """One row of the table: what a method computes, and what it needs.

    kind and rule:
    "cam"     (A, G) -> map (N, h, w), of a layer's activation and the gradient of the score there, both (N, C, h, w);
    "layer"   (trace, scores, layer) -> map (N, h, w), for what needs more of the recorded pass, or no gradient;
    "input"   (trace, scores) -> channels (N, C, H, W), or a map (N, h, w); where it `needs_layer`, the rectified and
              upsampled Grad-CAM (N, H, W) is a third argument;
    "passes"  (network, images, question, generator) -> channels or a map, for what runs the network itself; where it
              `needs_layer`, the layer's name is a fifth argument and the answer is a map (N, h, w).
    A rule leaves out the last ReLU, the upsampling and every scale.
    """

    kind: Literal["cam", "layer", "input", "passes"]
    rule: Callable[..., Tensor]
    paper: str
    needs_layer: bool = False
    relu_rule: str = "plain"  # of the gradient at the input (kind "input")
    options: tuple[str, ...] = ()  # names of the rule's own keyword arguments
    reduce: Literal["strongest", "sum"] = "strongest"  # channels to a map: largest magnitude, or their signed sum
    records: Callable[[nn.Module], Sequence[str]] | None = None  # layers the rule reads where they run ("input")
    attention: bool = False  # the rule reads the attention of the recorded pass


@dataclass(frozen=True)
class Job:
    """One Explanation to make: a method at no layer, at one, or at several that are fused."""

    method: str
    row: Method
    layers: tuple[str, ...] = ()
    fuse: str | None = None

    @property
    def key(self) -> str:
        return f"{self.method}@{'+'.join(self.layers)}" if self.layers else self.method


FUSE: dict[str, Callable[[Tensor], Tensor]] = {  # (L, N, H, W) -> (N, H, W)
    "max": lambda maps: maps.amax(0),
    "mean": lambda maps: maps.mean(0),
    "product": lambda maps: maps.prod(0),
}


@dataclass(frozen=True)
class Task:
    """What is asked of every picture: the methods, and how they are to be run."""

    network: Network
    jobs: Sequence[Job]
    relu: bool
    seed: int
    options: Mapping[str, Any]
    views: Sequence[View]  # the plain one first

    def explain(self, images: Tensor, asked: Asked, part: slice, tell: Callable[[float], None]) -> list[Explanation]:
        """An Explanation a job of images (n, C, H, W), which are `part` of all.

        tell: called with the share that is done.
        """
        answers = self._seen(self.views[0], images, lambda logits: asked.questions(logits, part), 0, tell)
        questions = answers.questions
        for number, view in enumerate(self.views[1:], 1):
            more = self._seen(view, images, lambda _: questions, number, tell)
            answers = replace(answers, raws=[a.plus(b) for a, b in zip(answers.raws, more.raws, strict=True)])
        M = len(questions)
        raws = [raw.over(len(self.views)) for raw in answers.raws]
        return [_explanation(job, raws[j * M : j * M + M], answers) for j, job in enumerate(self.jobs)]

    def _seen(
        self,
        view: View,
        images: Tensor,
        ask: Callable[[Tensor], list[Question]],
        number: int,
        tell: Callable[[float], None],
    ) -> _Answers:
        """The raw maps of one view, the number-th, at the size of the images; its graph ends with this function."""
        seen, size = view.see(images), (images.shape[2], images.shape[3])
        trace = self._record(seen)
        logits = self.network.logits(seen) if trace is None else trace.logits
        questions = ask(logits)
        more = [1] * (len(questions) - 1) + [0]  # whether a question follows, which needs the graph
        scores = [] if trace is None else [self._scores(trace, *one) for one in zip(questions, more, strict=True)]
        raws: list[_Raw] = []
        work = len(self.jobs) * len(questions)
        for job in self.jobs:
            for m, question in enumerate(questions):
                done = number * work + len(raws)

                def told(share: float, done: int = done) -> None:
                    tell((done + share) / (work * len(self.views)))

                if trace is None or job.row.kind == "passes":
                    raw = self._from_passes(told, job, seen, question)
                else:
                    raw = self._from_trace(trace, scores[m], job)
                raws.append(raw.back(view, *size, job.row.reduce == "sum"))
                told(1)
        return _Answers(questions, wide(logits), raws)

    def _record(self, images: Tensor) -> Trace | None:
        """One forward pass for all methods that it can serve, cut at the first layer where none needs the input."""
        served = [job for job in self.jobs if job.row.kind != "passes"]
        if not served:
            return None
        needs_input = any(job.row.kind == "input" for job in served)
        attention = any(job.row.attention for job in served)
        layers = list(dict.fromkeys(layer for job in served for layer in job.layers))
        more = [layer for job in served if job.row.records for layer in job.row.records(self.network.model)]
        return self.network.record(images, layers, needs_input, attention, more)

    def _scores(self, trace: Trace, question: Question, more: int) -> Tensor:
        """The scores (N,), and all their gradients that the methods will look up: one backward pass a ReLU rule.

        The last backward pass frees the graph on its way, unless a method needs it, or more questions follow.
        """
        scores = question.of(trace.logits)
        needed: dict[str, list[str]] = {}
        reading = [job for job in self.jobs if job.row.kind in ("cam", "input")]
        layers = list(dict.fromkeys(layer for job in reading for layer in job.layers))
        if any(job.row.records for job in reading):
            layers = list(trace.features)
        if layers:
            needed["plain"] = layers
        for job in reading:
            if job.row.kind == "input" and not job.row.attention:
                names = needed.setdefault(job.row.relu_rule, [])
                names += [] if INPUT in names else [INPUT]
        if any(job.row.attention for job in reading):
            needed["plain"] = [*needed.get("plain", []), *trace.attention]
        more += len(needed) + any(job.row.kind == "layer" or job.row.records or job.row.attention for job in self.jobs)
        for rule, names in needed.items():
            more -= 1
            trace.gradients(scores, rule, of=names, keep=more > 0)
        return scores

    def _rule(self, job: Job) -> Callable[..., Tensor]:
        return partial(job.row.rule, **{name: self.options[name] for name in job.row.options if name in self.options})

    def _from_trace(self, trace: Trace, scores: Tensor, job: Job) -> _Raw:
        """What a method makes of the recorded pass."""
        row, rule, size = job.row, self._rule(job), trace.images.shape[2:]
        if row.kind == "cam":
            return _Raw(self._cams(trace, scores, job.layers, rule))
        if row.kind == "layer":
            return _Raw(self._fine([rule(trace, scores, layer) for layer in job.layers], size))
        cam = []
        if row.needs_layer:
            cam.append(joined(self._cams(trace, scores, job.layers, cams.grad_cam).clamp(min=0), job.fuse))
        return _from_input(rule(trace, scores, *cam), row, size)

    def _from_passes(self, tell: Callable[[float], None], job: Job, images: Tensor, question: Question) -> _Raw:
        """What a method finds out by running the network itself."""
        row, rule, size = job.row, self._rule(job), images.shape[2:]

        def ask(number: int, *layer: str) -> Tensor:
            def told(share: float) -> None:
                tell((number + share) / max(1, len(job.layers)))

            # the generator anew, so that no picture, class or method moves another's noise
            generator = torch.Generator().manual_seed(self.seed)
            return rule(replace(self.network, tell=told), images, question, generator, *layer)

        if row.needs_layer:
            return _Raw(self._fine([ask(number, layer) for number, layer in enumerate(job.layers)], size))
        return _from_input(ask(0), row, size)

    def _cams(self, trace: Trace, scores: Tensor, layers: Sequence[str], rule: Callable[..., Tensor]) -> Tensor:
        G = trace.gradients(scores, of=layers)
        coarse = [rule(wide(trace.features[layer]), wide(G[layer])) for layer in layers]
        return self._fine(coarse, trace.images.shape[2:])

    def _fine(self, coarse: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps (N, h, w) of several layers to (L, N, H, W): rectified as they are, then upsampled."""
        return torch.stack([upsample(c.clamp(min=0) if self.relu else c, size[0], size[1]) for c in coarse])


@dataclass(frozen=True)
class _Raw:
    """What one method says of one question: a map for each layer that is still to be joined, else one."""

    maps: Tensor  # (L, N, H, W)
    channels: Tensor | None = None  # (N, C, H, W)

    def back(self, view: View, height: int, width: int, shares: bool) -> _Raw:
        channels = None if self.channels is None else view.back(self.channels, height, width, shares)
        return _Raw(view.back(self.maps, height, width, shares), channels)

    def plus(self, other: _Raw) -> _Raw:
        both = self.channels is not None and other.channels is not None
        return _Raw(self.maps + other.maps, self.channels + other.channels if both else None)  # type: ignore[operator]

    def over(self, views: int) -> _Raw:
        return self if views == 1 else _Raw(self.maps / views, None if self.channels is None else self.channels / views)


@dataclass(frozen=True)
class _Answers:
    """The raw maps of some pictures: of every job in turn, those of all questions."""

    questions: list[Question]
    logits: Tensor
    raws: list[_Raw]


def _from_input(found: Tensor, row: Method, size: Sequence[int]) -> _Raw:
    """Channels (N, C, H, W) and their map, or a map (N, h, w) brought to the size of the images."""
    found = wide(found)
    if found.ndim == 3:
        return _Raw((found if found.shape[1:] == tuple(size) else upsample(found, size[0], size[1]))[None])
    maps = gradients.strongest(found) if row.reduce == "strongest" else found.sum(1)
    return _Raw(maps[None], found)


def joined(maps: Tensor, fuse: str | None) -> Tensor:
    """The maps of the layers (L, N, H, W), each over its own maximum, as one (N, H, W)."""
    if fuse is None:
        return maps[0]
    largest = maps.amax((2, 3), keepdim=True)
    return FUSE[fuse](maps / torch.where(largest > 0, largest, 1))


def _explanation(job: Job, raws: Sequence[_Raw], answers: _Answers) -> Explanation:
    maps = torch.stack([joined(raw.maps, job.fuse if len(raw.maps) > 1 else None) for raw in raws], 1)
    channels = [raw.channels for raw in raws if raw.channels is not None]
    against = [question.against for question in answers.questions if question.against is not None]
    return Explanation(
        maps,
        torch.stack([question.classes for question in answers.questions], 1),
        answers.logits,
        job.method,
        "+".join(job.layers) or None,
        status(maps),
        against=torch.stack(against, 1) if against else None,
        channels=torch.stack(channels, 1) if channels else None,
        peak=torch.stack([raw.maps.amax((0, 2, 3)) for raw in raws], 1),
    )


def status(maps: Tensor) -> Tensor:
    """Codes of `Status`, uint8 (N, M), of maps (N, M, H, W). Constant is meant up to the rounding of the upsampling."""
    low, high = maps.amin((2, 3)), maps.amax((2, 3))
    scale = torch.maximum(low.abs(), high.abs())
    found = torch.full(low.shape, Status.OK, dtype=torch.uint8, device=maps.device)
    found[high - low <= 8 * torch.finfo(maps.dtype).eps * scale] = Status.CONSTANT
    found[scale == 0] = Status.ZERO
    found[~(low.isfinite() & high.isfinite())] = Status.NONFINITE  # NaN passes through both
    return found
