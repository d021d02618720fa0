"""The table of attribution methods, and `explain`: one forward pass, any number of methods, layers and classes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clearwing.attribution import cams, gradients
from clearwing.attribution.trace import INPUT, Trace, check_classes, find_layer, named_layers, pictures, ready, record
from clearwing.types import Batch, ClearwingError, Explanation, Status, near

PRECISIONS = ("float32", "bfloat16")
Layer = str | nn.Module
Target = str | int | Tensor | tuple[str | int, str | int] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One row of the table: what a method computes, and which gradients it needs.

    rule: for kind "cam" (A, G) -> map (N, h, w); for kind "input" (trace, scores) -> channels (N, C, H, W), with the
    rectified and upsampled Grad-CAM (N, H, W) as a third argument where it `needs_layer`.
    relu_rule: of the gradient at the input (kind "input").
    """

    kind: Literal["cam", "input"]
    rule: Callable[..., Tensor]
    paper: str
    needs_layer: bool = False
    relu_rule: str = "plain"
    options: tuple[str, ...] = ()  # names of the rule's own keyword arguments


METHODS: dict[str, Method] = {
    "saliency": Method("input", gradients.saliency, "Simonyan et al. 2014"),
    "guided-backprop": Method("input", gradients.guided_backprop, "Springenberg et al. 2015", relu_rule="guided"),
    "grad-cam": Method("cam", cams.grad_cam, "Selvaraju et al. 2017", needs_layer=True),
    "layer-cam": Method("cam", cams.layer_cam, "Jiang et al. 2021", needs_layer=True),
    "guided-grad-cam": Method(
        "input", gradients.guided_grad_cam, "Selvaraju et al. 2017", needs_layer=True, relu_rule="guided"
    ),
}

FUSE: dict[str, Callable[[Tensor], Tensor]] = {  # (L, N, H, W) -> (N, H, W)
    "max": lambda maps: maps.amax(0),
    "mean": lambda maps: maps.mean(0),
    "product": lambda maps: maps.prod(0),
}


def explain(
    model: nn.Module,
    images: Tensor | Batch,
    methods: str | Sequence[str] = "grad-cam",
    layers: Layer | Sequence[Layer] | None = None,
    target: Target = "pred",
    labels: Tensor | Sequence[int] | None = None,
    relu: bool = True,
    precision: str | None = None,
    seed: int = 0,
    chunk: int | None = None,
    fuse: str | None = None,
    options: Mapping[str, Any] | None = None,
    larger_than: int | None = None,
) -> Any:
    """Where the model looks: raw attribution maps at the size of the images, never scaled.

    model: any network in evaluation mode that maps (N, C, H, W) to logits (N, K).
    images: (N, C, H, W) floating, or a Batch, whose labels, keys and geometry go along.
    methods: names of METHODS. Input methods give one map whatever the layers; "guided-grad-cam" gives one a layer.
    layers: names or modules; None is `find_layer(model, images, larger_than)`, one more forward pass of one picture.
    target: "pred"; "label"; "top-3"; a class number or name; a tensor (N,) with a class for each picture, or (N, M);
        a pair ("cat", "dog") for the evidence for the first against the second (names or numbers); or a function of
        the logits (N, K) that gives scores (N,), each of its own picture alone. A class whose name is one of the
        words here is asked for by its number.
    labels: (N,) for "label"; a Batch brings its own.
    relu: rectify CAM maps as their papers do, before upsampling (bilinear); False keeps the sign. The maps of input
        methods are the largest magnitude over the colour channels either way; the signed values are in `channels`.
    precision: None runs the model in its own floating type without TF32; "float32" in float32, without TF32;
        "bfloat16" under autocast, for speed. Maps are float32, of a float64 model float64.
    seed: of methods that sample; none of these does yet.
    chunk: pictures at a time; None is all at once. The maps are the same.
    fuse: "max", "mean" or "product" joins the layers' maps of each method to one. Each rectified map is first divided
        by its own maximum, for the layers' scales differ. "guided-grad-cam" takes the joined Grad-CAM.
    options: settings of a method's own.

    One forward pass serves all; one backward pass for each asked class all methods on the gradient, and one more for
    each asked class those on the guided gradient. No `.grad` is filled, and no graph outlives the call.

    Returns an Explanation for one method and at most one layer; where methods or layers is a list, a dict in the order
    asked, keyed "grad-cam@layer3", "saliency", or with fuse "grad-cam@layer2+layer3".

    >>> e = explain(model, images, "grad-cam", target="top-3")
    >>> e.maps.shape, e.classes.shape
    (torch.Size([8, 3, 224, 224]), torch.Size([8, 3]))
    >>> list(explain(model, images, ["layer-cam", "saliency"], layers=["layer2", "layer3"]))
    ['layer-cam@layer2', 'layer-cam@layer3', 'saliency']

    Raises ClearwingError for what `record` refuses, an unknown method, class or setting, labels that are missing, and a
    network without ReLU under a guided method. Warns where a guided method met other non-linearities than ReLU.
    """
    if isinstance(images, Batch):
        labels = images.labels if labels is None else labels
        geometry, keys = images.geometry, images.keys
    else:
        geometry, keys = (), ()
    names = _method_names(methods, options or {})
    if precision not in (None, *PRECISIONS):
        raise ClearwingError("precision", precision, near(str(precision), PRECISIONS))
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ClearwingError("chunk", chunk, "give how many pictures to run at a time, at least 1")
    model = ready(model)
    images = _like_the_model(model, pictures(images))
    class_names = tuple(getattr(model, "class_names", ()))
    asked = _asked(target, labels, class_names, images)
    jobs = _jobs(model, images, names, layers, larger_than, fuse, relu)
    parameters = _float32_parameters(model) if precision else {}
    images = images.float() if precision else images

    parts: list[list[Explanation]] = [[] for _ in jobs]
    told: set[str] = set()
    step = chunk or len(images)
    own_type = torch.autocast(images.device.type, enabled=False)  # whatever the caller's is
    with own_type, _FULL_FLOAT32.get(images.device.type, nullcontext()):
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            trace = partial(_record, model, images[part], jobs, precision, parameters, told)
            for found, made in zip(parts, _explain_part(trace, jobs, asked, part, relu, options or {}), strict=True):
                found.append(replace(made, geometry=geometry[part], keys=keys[part], class_names=class_names))
    whole = [Explanation.cat(found) if len(found) > 1 else found[0] for found in parts]
    if isinstance(methods, str) and (layers is None or isinstance(layers, str | nn.Module)):
        return whole[0]
    return {job.key: explanation for job, explanation in zip(jobs, whole, strict=True)}


@dataclass(frozen=True)
class _Job:
    """One Explanation to make: a method at no layer, at one, or at several that are fused."""

    method: str
    layers: tuple[str, ...] = ()
    fuse: str | None = None

    @property
    def key(self) -> str:
        return f"{self.method}@{'+'.join(self.layers)}" if self.layers else self.method

    @property
    def row(self) -> Method:
        return METHODS[self.method]


@dataclass(frozen=True)
class _Asked:
    """What is to be explained, read from `target`: one of the three."""

    classes: Tensor | None = None  # (N, M)
    against: Tensor | None = None  # (N, M)
    top: int = 0  # the so many largest logits
    score: Callable[[Tensor], Tensor] | None = None
    argument: str = "target"  # to name in an error


def _record(
    model: nn.Module,
    images: Tensor,
    jobs: Sequence[_Job],
    precision: str | None,
    parameters: Mapping[str, Tensor],
    told: set[str],
) -> Trace:
    """One forward pass for all jobs, cut at the first layer where none of them needs the input."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        needs_input = any(job.row.kind == "input" for job in jobs)
        trace = record(model, images, _recorded(jobs), needs_input, parameters)
    trace.told = told
    return trace


def _explain_part(
    recorded: Callable[[], Trace],
    jobs: Sequence[_Job],
    asked: _Asked,
    part: slice,
    relu: bool,
    options: Mapping[str, Any],
) -> list[Explanation]:
    """The Explanations of some of the pictures; the graph ends with this function."""
    trace = recorded()
    classes, against, scores = _scores(trace, asked, part)
    logits = _wide(trace.logits)
    found = []
    for job, (maps, channels) in zip(jobs, _maps(trace, scores, jobs, relu, options), strict=True):
        layer = "+".join(job.layers) or None
        status = _status(maps)
        found.append(Explanation(maps, classes, logits, job.method, layer, status, against=against, channels=channels))
    return found


def _method_names(methods: str | Sequence[str], options: Mapping[str, Any]) -> list[str]:
    names = [methods] if isinstance(methods, str) else list(methods)
    if not names:
        raise ClearwingError("methods", "[]", near("", list(METHODS)))
    for name in names:
        if name not in METHODS:
            raise ClearwingError("methods", name, near(str(name), list(METHODS)))
    known = [option for name in names for option in METHODS[name].options]
    for option in options:
        if option not in known:
            mend = near(option, known) if known else "these methods have no options"
            raise ClearwingError("options", option, mend)
    return list(dict.fromkeys(names))


def _jobs(
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str],
    layers: Layer | Sequence[Layer] | None,
    larger_than: int | None,
    fuse: str | None,
    relu: bool,
) -> list[_Job]:
    """The Explanations to make, in the order asked: methods first, layers within."""
    if fuse is not None and fuse not in FUSE:
        raise ClearwingError("fuse", fuse, near(str(fuse), list(FUSE)))
    if fuse is not None and not relu:
        raise ClearwingError("fuse", fuse, "it joins rectified maps; leave relu=True")
    if layers is not None and larger_than is not None:
        raise ClearwingError(
            "larger_than", larger_than, "it chooses a layer where none is named; leave one of the two out"
        )
    need = any(METHODS[name].needs_layer for name in methods)
    if layers is not None:
        chosen = tuple(named_layers(model, layers))
    else:
        chosen = (find_layer(model, images, larger_than),) if need else ()
    if need and not chosen:
        raise ClearwingError("layers", "[]", "name at least one layer, or leave it out for the default")
    if fuse is not None and need and len(chosen) < 2:
        raise ClearwingError("fuse", fuse, "name at least two layers to join")
    jobs = []
    for name in methods:
        if not METHODS[name].needs_layer:
            jobs.append(_Job(name))
        elif fuse is not None:
            jobs.append(_Job(name, chosen, fuse))
        else:
            jobs += [_Job(name, (layer,)) for layer in chosen]
    return jobs


def _recorded(jobs: Sequence[_Job]) -> list[str]:
    return list(dict.fromkeys(layer for job in jobs for layer in job.layers))


def _asked(target: Target, labels: Any, class_names: tuple[str, ...], images: Tensor) -> _Asked:
    """Read `target`; everything but the number of classes is checked before the network runs."""
    n, device = len(images), images.device

    def same(one: Any) -> Tensor:
        return torch.full((n, 1), _class_number(one, class_names), device=device)

    if isinstance(target, str):
        if target == "pred":
            return _Asked(top=1)
        if target == "label":
            if labels is None:
                raise ClearwingError("target", "label", "give labels=, or a Batch that has them")
            return _Asked(_class_tensor("labels", torch.as_tensor(labels, device=device), n, (1,)), argument="labels")
        if top := re.fullmatch(r"top-([1-9]\d*)", target):
            return _Asked(top=int(top[1]))
        return _Asked(same(target))
    if isinstance(target, Tensor) and target.ndim > 0:
        return _Asked(_class_tensor("target", target.to(device), n))
    if isinstance(target, Tensor):
        return _asked(target.item(), labels, class_names, images)  # type: ignore[arg-type]
    if isinstance(target, Integral) and not isinstance(target, bool):
        return _Asked(same(target))
    if isinstance(target, tuple) and len(target) == 2:
        return _Asked(same(target[0]), same(target[1]))
    if callable(target):
        return _Asked(score=target)
    mend = 'give "pred", "label", "top-3", a class, a pair of them, a tensor (N,) of them or a function of the logits'
    raise ClearwingError("target", target, mend)


def _class_number(one: Any, class_names: tuple[str, ...]) -> int:
    if isinstance(one, Integral) and not isinstance(one, bool):
        return int(one)
    if one in class_names:
        return class_names.index(one)
    if class_names:
        raise ClearwingError("target", one, near(str(one), class_names))
    mend = 'the model has no class names; give "pred", "label", "top-3" or a number, or clearwing.wrap it with names'
    raise ClearwingError("target", one, mend)


def _class_tensor(argument: str, classes: Tensor, n: int, dimensions: tuple[int, ...] = (1, 2)) -> Tensor:
    inexact = classes.is_floating_point() or classes.dtype == torch.bool
    if inexact or classes.ndim not in dimensions or len(classes) != n:
        mend = f"give class numbers, one for each picture: ({n},)"
        raise ClearwingError(argument, f"{classes.dtype} {tuple(classes.shape)}", mend)
    return classes.long().reshape(n, -1)


def _scores(trace: Trace, asked: _Asked, part: slice) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The classes (n, M), what they are held against, and M scores (n,), of the pictures in `part`."""
    n, k = trace.logits.shape
    if asked.score is not None:
        with torch.inference_mode(False), torch.enable_grad():
            scores = asked.score(trace.logits)
        if not isinstance(scores, Tensor) or scores.shape != (n,) or scores.grad_fn is None:
            what = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            mend = f"the function must give one differentiable score a picture, ({n},)"
            raise ClearwingError("target", what, mend)
        return torch.full((n, 1), -1, device=trace.logits.device), None, [scores]
    if asked.top > k:
        raise ClearwingError("target", f"top-{asked.top}", f"the model has {k} classes")
    if asked.classes is None:
        # stable: of equal logits the first comes first, as argmax has it
        order = trace.logits.detach().argsort(dim=1, descending=True, stable=True)
        classes, against = order[:, : asked.top], None
    else:
        classes, against = asked.classes[part], None if asked.against is None else asked.against[part]
        for wanted in (classes, against):
            if wanted is not None:
                check_classes(asked.argument, wanted, k)
    with torch.inference_mode(False), torch.enable_grad():
        scores = trace.logits.gather(1, classes.clone())  # a clone: autograd does not save an inference tensor
        if against is not None:
            scores = scores - trace.logits.gather(1, against.clone())
        return classes, against, list(scores.unbind(1))


def _maps(
    trace: Trace, scores: Sequence[Tensor], jobs: Sequence[_Job], relu: bool, options: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor | None]]:
    """For each job the maps (N, M, H, W), and the channels (N, M, C, H, W) of an input method."""
    made: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in jobs]
    for score in scores:
        for rule, names in _gradients_needed(jobs).items():
            trace.gradients(score, rule, of=names)  # kept by the trace: the rules below only look them up
        for job, found in zip(jobs, made, strict=True):
            found.append(_one_map(trace, score, job, relu, options))
    stacked = []
    for found in made:
        maps, channels = zip(*found, strict=True)
        stacked.append((torch.stack(maps, 1), None if channels[0] is None else torch.stack(channels, 1)))
    return stacked


def _gradients_needed(jobs: Sequence[_Job]) -> dict[str, list[str]]:
    """The names at which each ReLU rule is wanted: one backward pass a rule."""
    needed: dict[str, list[str]] = {}
    if layers := _recorded(jobs):
        needed["plain"] = layers
    for rule in dict.fromkeys(job.row.relu_rule for job in jobs if job.row.kind == "input"):
        needed[rule] = [INPUT, *needed.get(rule, [])]
    return needed


def _one_map(
    trace: Trace, score: Tensor, job: _Job, relu: bool, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The map (N, H, W) of one class, and the channels (N, C, H, W) of an input method."""
    rule = partial(job.row.rule, **{name: value for name, value in options.items() if name in job.row.options})
    if job.row.kind == "cam":
        return _cam_map(trace, score, job, rule, relu), None
    cam = [_cam_map(trace, score, job, cams.grad_cam, relu=True)] if job.row.needs_layer else []
    channels = _wide(rule(trace, score, *cam))
    return gradients.strongest(channels), channels


def _cam_map(trace: Trace, score: Tensor, job: _Job, rule: Callable[..., Tensor], relu: bool) -> Tensor:
    """The job's layers to one map (N, H, W): the rule, ReLU on the coarse map, bilinear upsampling, fusion."""
    G = trace.gradients(score, of=job.layers)
    maps = []
    for layer in job.layers:
        coarse = rule(_wide(trace.features[layer]), _wide(G[layer]))  # (N, h, w)
        coarse = coarse.clamp(min=0) if relu else coarse
        size = tuple(trace.images.shape[2:])
        maps.append(F.interpolate(coarse[:, None], size, mode="bilinear", align_corners=False)[:, 0])
    if job.fuse is None:
        return maps[0]
    stacked = torch.stack(maps)  # (L, N, H, W)
    largest = stacked.amax((2, 3), keepdim=True)
    return FUSE[job.fuse](stacked / torch.where(largest > 0, largest, 1))


def _wide(tensor: Tensor) -> Tensor:
    """Detached, in float32, or in float64 where it was: sums over bfloat16 channels would lose digits."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def _status(maps: Tensor) -> Tensor:
    """Codes of `Status`, uint8 (N, M), of maps (N, M, H, W). Constant is meant up to the rounding of the upsampling."""
    low, high = maps.amin((2, 3)), maps.amax((2, 3))
    scale = torch.maximum(low.abs(), high.abs())
    status = torch.full(low.shape, Status.OK, dtype=torch.uint8, device=maps.device)
    status[high - low <= 8 * torch.finfo(maps.dtype).eps * scale] = Status.CONSTANT
    status[scale == 0] = Status.ZERO
    status[~maps.isfinite().all(3).all(2)] = Status.NONFINITE
    return status


def _like_the_model(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the device and in the floating type of the model's first parameter."""
    own = next((p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()), images)
    return images.detach().to(own.device, own.dtype)


def _float32_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Float32 copies of the parameters and buffers that are of another floating type."""
    with torch.inference_mode(False), torch.no_grad():
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {n: t.float() for n, t in named.items() if t.is_floating_point() and t.dtype != torch.float32}


class _FullFloat32:
    """Switch reduced float32 arithmetic (TF32, and bfloat16 products on CPU) off while at least one thread is inside.

    The switches are of the whole process: the first thread in keeps what they were, and the last one out restores it.
    """

    def __init__(self, *switches: Any) -> None:
        self.switches, self.before, self.inside, self.lock = switches, list[tuple[Any, str]](), 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = [(switch, switch.fp32_precision) for switch in self.switches]
                self.before = [(switch, value) for switch, value in self.before if value not in ("none", "ieee")]
                for switch, _ in self.before:
                    switch.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for switch, value in self.before:
                    switch.fp32_precision = "none"  # perhaps it had this value from the setting above it
                    if switch.fp32_precision != value:
                        switch.fp32_precision = value


_BACKENDS: Any = torch.backends
_FULL_FLOAT32 = {
    "cuda": _FullFloat32(_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn),
    "cpu": _FullFloat32(_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn),
}
