"""What in a network can fool an explanation: `examine` looks at any classifier and tries the identities on it."""

from __future__ import annotations

import dataclasses
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clearwing.attribution import cams
from clearwing.attribution.anatomy import (
    ITSELF,
    SICK,
    Activation,
    Guided,
    Layer,
    Seen,
    Strided,
    candidates,
    guided,
    layer_facts,
    watch,
)
from clearwing.attribution.modules import pictures, ready, shown_name
from clearwing.attribution.network import exact, like_the_model
from clearwing.attribution.selfcheck import Check, self_check, twin
from clearwing.attribution.trace import Trace, record
from clearwing.types import Batch, ClearwingError


@dataclass(frozen=True)
class Finding:
    """Something that can fool an explanation, and what to do about it."""

    verdict: Literal["failed", "warning"]  # failed: maps are refused, or wrong
    about: str
    mend: str


@dataclass(frozen=True)
class Head:
    """Whether mean pooling and a linear map follow the default layer: logits = mean(A) W^T + b, on these pictures."""

    closed_form: bool
    about: str


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found. What could not be found out is None or empty; `findings` say why."""

    network: str  # its class
    pictures: tuple[int, ...]  # (N, C, H, W)
    arithmetic: str  # floating type and device
    findings: tuple[Finding, ...]
    classes: int | None = None
    activations: tuple[Activation, ...] = ()
    strided: tuple[Strided, ...] = ()
    reused: dict[str, int] = dataclasses.field(default_factory=dict)  # modules that run more than once -> calls
    guided: Guided | None = None
    layer: str | None = None  # the default one
    layers: tuple[Layer, ...] = ()  # "input", then the default layer at each resolution
    head: Head | None = None
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # methods -> why
    checks: tuple[Check, ...] = ()

    @property
    def verdict(self) -> Literal["passed", "warning", "failed"]:
        verdicts: set[str] = {one.verdict for one in self.findings} | {one.verdict for one in self.checks}
        return "failed" if "failed" in verdicts else "warning" if "warning" in verdicts else "passed"

    def plain(self) -> dict[str, Any]:
        """The same in dicts, lists, strings and numbers."""
        return {"verdict": self.verdict, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def examine(
    model: nn.Module, images: Tensor | Batch | None = None, progress: Callable[[int, int], None] | None = None
) -> Diagnosis:
    """What in a network can fool an explanation, and the identities of explanations tried on it.

    model: any network; one that is sick is described, not refused. A model in training mode or with compiled modules
        is examined as a copy that shares its weights, in evaluation mode and not compiled.
    images: (N, C, H, W) or a Batch, as the model takes them; a few are plenty. None draws four blurred random ones, of
        the model's `input_size` or 224 pixels.
    progress: called with the number of identities tried, and of all.

    The model is left as it was. `str` of the answer is a readable report.

    >>> diagnosis = examine(torchvision.models.resnet18().eval(), torch.rand(4, 3, 64, 64))
    >>> diagnosis.verdict, diagnosis.layer, diagnosis.guided.replaced
    ('warning', 'layer4', 17)

    Raises ClearwingError where `model` is no module, or `images` are no pictures.
    """
    if not isinstance(model, nn.Module):
        raise ClearwingError("model", type(model).__name__, "give a torch.nn.Module that maps (N, C, H, W) to (N, K)")
    images = _random_pictures(model) if images is None else pictures(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what explain warns of is among the findings
        healthy, findings = _made_ready(model)
        images = like_the_model(healthy or model, images)
        found = _examined(healthy, images, findings, progress) if healthy is not None else {}
    arithmetic = f"{str(images.dtype).removeprefix('torch.')} on {images.device}"
    kind = type(getattr(healthy or model, "backbone", healthy or model)).__name__
    return Diagnosis(kind, tuple(images.shape), arithmetic, tuple(findings), **found)


def _made_ready(model: nn.Module) -> tuple[nn.Module | None, list[Finding]]:
    """The network as `explain` takes it, or a copy that it would take; None where there is none."""
    findings = list(_of_modes(model))
    try:
        return ready(twin(model).eval() if findings else model), findings
    except ClearwingError as error:
        findings.append(Finding("failed", f"{error.argument}: {error.value}", error.mend))
    except SICK as error:
        findings.append(Finding("failed", f"the network cannot be copied: {error}", "mend the above first"))
    return None, findings


def _examined(
    model: nn.Module, images: Tensor, findings: list[Finding], progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """The other fields of a Diagnosis, as far as they can be found out; adds findings."""
    found: dict[str, Any] = {}
    findings += _of_weights(model)
    try:
        seen = watch(model, images)
    except ClearwingError as error:
        findings.append(Finding("failed", f"{error.argument}: {error.value}", error.mend))
        return found
    findings += _of_the_pass(seen)
    found |= {"classes": seen.logits.shape[1], "activations": seen.activations, "strided": seen.strided}
    found["reused"] = {name: calls for name, calls in seen.calls.items() if calls > 1}
    if not seen.graph:
        return found
    layers, refused = candidates(model, images)
    findings += _of_layers(refused, layers)
    classes, layer = seen.logits.argmax(1), layers[-1] if layers else None
    with exact(images.device.type):
        trace = record(model, images, layers)
        found |= {"layer": layer, "layers": tuple(layer_facts(trace, seen.strided)), "guided": guided(trace)}
        finite = seen.logits.isfinite().all() and not seen.nonfinite_gradients
        found["head"] = _head(trace, layer) if finite and layer is not None else None
    del trace
    findings += [*_of_guided(found["guided"]), *_of_strides(found["layers"], seen.strided)]
    if finite:
        tried = self_check(model, images, classes, layer, progress)
        found |= {"checks": tried.checks, "refused": tried.refused}
    return found


def _head(trace: Trace, layer: str) -> Head:
    try:
        cams.linear_head(trace, layer)
    except ClearwingError as error:
        return Head(False, error.value)
    return Head(True, f"the logits are the mean of {layer} over its places times a matrix, plus a bias")


def _random_pictures(model: nn.Module) -> Tensor:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    size = getattr(model, "input_size", None) or 224
    side = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    noise = torch.rand(4, first.in_channels if first else 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, side, mode="bicubic").clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------
# Findings


def _of_modes(model: nn.Module) -> Iterator[Finding]:
    try:
        ready(model)
        return
    except ClearwingError:
        modules = {shown_name(model, name) or ITSELF: module for name, module in model.named_modules()}
    copied = "what follows was found on such a copy"
    compiled = [name for name, one in modules.items() if one._compiled_call_impl or hasattr(one, "_orig_mod")]
    if compiled:
        mend = f"explain the network as it is before compiling; {copied}"
        yield Finding("failed", f"compiled, and closed to hooks and ReLU rules: {_some(compiled)}", mend)
    training = [name for name, module in modules.items() if module.training]
    if training:
        yield Finding("failed", f"in training mode: {_some(training)}", f"call model.eval() first; {copied}")


def _of_weights(model: nn.Module) -> Iterator[Finding]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    sick = [shown_name(model, name) for name, tensor in tensors if tensor.isnan().any()]
    learnt = [(name, tensor) for name, tensor in tensors if isinstance(tensor, nn.Parameter) or ".running_" in name]
    sick += [shown_name(model, name) for name, tensor in learnt if tensor.isinf().any()]  # masks may
    if sick:
        mend = "load weights of before the training went wrong"
        yield Finding("failed", f"{_some(sick)} {_verb(sick, 'holds', 'hold')} NaN or infinity", mend)
    coupled = [
        shown_name(model, name)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    if coupled:
        about = f"{_some(coupled)} {_verb(coupled, 'has', 'have')} no running statistics: a picture's map depends on"
        mend = "explain one picture at a time, or train with track_running_stats=True"
        yield Finding("failed", f"{about} the others of its batch", mend)


def _of_the_pass(seen: Seen) -> Iterator[Finding]:
    names, what = seen.nonfinite_outputs, "gives"
    if not names:
        names, what = seen.nonfinite_gradients, "receives a gradient of"
    if names:
        more = f" (the first of {len(names)} modules)" if len(names) > 1 else ""
        mend = "look at its weights, at what enters it, and at divisions, roots and logarithms near it"
        yield Finding("failed", f"{names[0]} {what} NaN or infinity{more}", mend)
    if seen.random:
        about = f"the forward pass draws random numbers: {_some(seen.random)}"
        mend = "switch it off in evaluation mode, as F.dropout(x, p, self.training) does"
        yield Finding("failed", f"{about}; maps differ from call to call", mend)
    if not seen.graph:
        about = "the logits have no graph down to the pictures: the forward pass detaches, or disables gradients"
        yield Finding("failed", about, "take torch.no_grad, detach and numpy out of the forward pass")
    logits = seen.logits.double()
    if logits.shape[1] > 1 and (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all():
        about = "the outputs are probabilities, as a softmax gives them, where logits are expected"
        mend = (
            "leave the softmax out: gradients fade where the network is sure, and a softmax is taken of what it gives"
        )
        yield Finding("warning", about, mend)
    if len(logits) > 1 and (logits == logits[:1]).all():
        about = "the logits are the same for all pictures: no map holds evidence, and every identity holds"
        yield Finding("warning", about, "load trained weights; some networks start with a head of zeros")


def _of_layers(refused: dict[str, str], layers: Sequence[str]) -> Iterator[Finding]:
    mend = f"name a layer, such as {layers[-1]}" if layers else "take methods at the input, or name a layer"
    for name, why in refused.items():
        yield Finding("warning", f"layer {name}: {why}" if name else why, mend)


def _of_guided(met: Guided) -> Iterator[Finding]:
    kept = ", ".join(f"{count} {name}" for name, count in sorted(met.kept.items()))
    if met.refused:
        about = f"guided backprop, guided Grad-CAM and deconvnet are refused: {met.refused.partition(';')[0]}"
        yield Finding("warning", about, "take saliency, SmoothGrad, integrated gradients or methods at a layer")
    elif kept:
        about = f"guided backprop changes {met.replaced} ReLUs, and leaves other non-linearities alone: {kept}"
        yield Finding("warning", about, "read its maps as partly guided; methods at a layer do not depend on this")


def _of_strides(layers: Sequence[Layer], strided: Sequence[Strided]) -> Iterator[Finding]:
    uneven = [layer for layer in layers if layer.before]
    if uneven:
        names = _some([layer.name for layer in uneven], 6)
        about = (
            f"strided convolutions read some places of {names} more often than others: the gradient there has a grid"
        )
        before = {module for layer in uneven for module in layer.before}
        blind = [f"{one.module} {one.unread:.0%}" for one in strided if one.unread and one.module in before]
        about += f"; never read: {_some(blind)} of the places" if blind else ""
        mend = "Grad-CAM averages it out; for LayerCAM, HiResCAM and maps at the input smooth, or take another layer"
        yield Finding("warning", about, mend)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _verb(names: Sequence[str], one: str, many: str) -> str:
    return one if len(names) == 1 else many


# ---------------------------------------------------------------------------------------------------------------
# The report


WIDTH = 110


def _lines(d: Diagnosis) -> Iterator[str]:
    N, C, H, W = d.pictures
    classes = "" if d.classes is None else f", {_count(d.classes, 'class', 'classes')}"
    yield f"{d.network}{classes}; {_count(N, 'picture', 'pictures')} of {C} x {H} x {W}, {d.arithmetic}"
    yield _verdict(d)
    for finding in d.findings:
        yield from ("", *_wrapped(f"{finding.verdict}: ", finding.about), *_wrapped("  do: ", finding.mend))
    if d.layers:
        yield from ("", *_layer_lines(d))
    if d.activations:
        yield from ("", *_activation_lines(d))
    if d.refused:
        yield from ("", "Methods that are refused on this network (all others run)")
        for why in dict.fromkeys(d.refused.values()):
            names = [name for name in d.refused if d.refused[name] == why]
            yield from _wrapped("  ", f"{', '.join(names)}: {why}")
    if d.checks:
        yield from ("", *_check_lines(d))


def _verdict(d: Diagnosis) -> str:
    counts = Counter(one.verdict for one in d.checks)
    held = counts["passed"] + counts["warning"]
    tried = f"{held} of {held + counts['failed']} identities hold"
    failed = sum(finding.verdict == "failed" for finding in d.findings)
    warned = len(d.findings) - failed + counts["warning"]
    parts = [tried if d.checks else "the identities were not tried"]
    parts += [_count(failed, "fault", "faults")] if failed else []
    parts += [_count(warned, "warning", "warnings")] if warned else []
    words = {"passed": "Healthy", "warning": "Healthy", "failed": "Sick"}
    return f"{words[d.verdict]}: {', '.join(parts)}"


def _layer_lines(d: Diagnosis) -> Iterator[str]:
    width = max(len(layer.name) for layer in d.layers)
    yield f"{'Layers':<{width + 2}} channels        map  stride    sees  grid in the gradient"
    for layer in d.layers:
        h, w = layer.map
        sees = (">= " if layer.field_at_least else "") + _size(layer.field)
        facts = f"{layer.channels:8} {f'{h} x {w}':>10} {_size(layer.stride):>7} {sees:>7}"
        grid = "-" if layer.grid is None else f"{layer.grid:.1f} : 1, from {_some(layer.before, 2)}"
        yield f"  {layer.name:<{width}} {facts}  {grid}{'  <- default' if layer.name == d.layer else ''}"
    yield "  map: places; stride (from place to place) and sees (receptive field): pixels of the picture"
    if d.head is not None:
        yield from _wrapped(f"  CAM in closed form: {'yes' if d.head.closed_form else 'no'}, ", d.head.about)


def _activation_lines(d: Diagnosis) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Activation]] = {}
    for one in d.activations:
        how = ", ".join(["functional"] * one.functional + ["in place"] * one.in_place)
        groups.setdefault((one.operator if one.functional else one.kind, how), []).append(one)
    yield "Activations"
    for (name, how), some in groups.items():
        calls = sum(one.calls for one in some)
        only = some[0].module
        where = f"{len(some)} modules" if len(some) > 1 else only if only == ITSELF else f"module {only}"
        yield f"  {calls} x {name} in {where}{f' ({how})' if how else ''}"
    if d.reused:
        names = _some([f"{name} x {calls}" for name, calls in d.reused.items()])
        first = next(iter(d.reused))
        yield from _wrapped("  run more than once: ", f"{names}; as a layer, name the call, as in {first}#0")
    if d.guided is not None and not d.guided.refused:
        only = "" if d.guided.kept else "; it meets no other non-linearity"
        yield f"  guided backprop changes {_count(d.guided.replaced, 'ReLU', 'ReLUs')}{only}"


def _check_lines(d: Diagnosis) -> Iterator[str]:
    width = max(len(check.name) for check in d.checks)
    yield f"{'Identities':<{width + 11}} error  allowed"
    for check in d.checks:
        if check.verdict == "not applicable":
            yield from _wrapped("  -      ", f"{check.name}: not applicable, {check.about}")
            continue
        verdict = "warned" if check.verdict == "warning" else check.verdict  # six letters each
        line = f"  {verdict} {check.name:<{width}} {_figure(check.error):>7}  {_figure(check.tolerance):>7}"
        beside = len(line) + len(check.about) < WIDTH
        yield f"{line}  {check.about}".rstrip() if beside else line.rstrip()
        yield from () if beside else _wrapped("         ", check.about)
        yield from _wrapped("         do: ", check.mend) if check.mend else ()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value == int(value) else f"{value:.0e}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _size(pair: Sequence[float]) -> str:
    one, two = (f"{side:.1f}".removesuffix(".0") for side in pair)
    return one if one == two else f"{one} x {two}"


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, break_on_hyphens=False, initial_indent=start, subsequent_indent=" " * len(start)
    ) or [start]
