"""Record one forward pass with its graph alive: `record`, and the `Trace` it gives.

The model is left as it was found, after exceptions too.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clearwing.attribution.backward import differentiate
from clearwing.attribution.fold import KeepAttention, check_grid, layout_of, refused
from clearwing.attribution.modules import INPUT, calls, hooked, pictures, ready
from clearwing.types import Batch, ClearwingError


class _ByLayer(dict[str, Tensor]):
    """Tensors by the name of their layer; a name that was not recorded is refused."""

    def __missing__(self, name: str) -> Tensor:
        if name.removeprefix("backbone.") in self:
            return self[name.removeprefix("backbone.")]
        if name == INPUT:
            raise ClearwingError(INPUT, "its gradient was not recorded", "call record(..., inputs=True)")
        raise ClearwingError("layer", name, f"it was not recorded; the trace holds {', '.join(self) or 'no layer'}")


@dataclass(eq=False, repr=False)
class Trace:
    """One recorded forward pass, its graph alive until the last reference to it is dropped."""

    model: nn.Module
    images: Tensor  # (N, C, H, W), detached from the caller's; requires grad where `inputs`
    logits: Tensor  # (N, K)
    features: Mapping[str, Tensor]  # layer -> (N, C, h, w), as it left the layer
    inputs: bool  # the graph reaches down to the images
    attention: Mapping[str, Tensor] = field(default_factory=dict)  # "(attention 0)" -> (N, heads, T, T), if asked for
    grid: tuple[int, int] | None = None  # (h, w) of tokens, as it was given
    told: set[str] = field(default_factory=set)  # warnings given: each is said once
    places: Mapping[str, tuple[nn.Module, int]] = field(default_factory=dict)  # layer -> module, which of its calls
    absent: frozenset[str] = frozenset()  # the optional layers that did not run
    _kept: dict[tuple[int, str], tuple[Tensor, _ByLayer]] = field(default_factory=dict)

    def scores(self, classes: Tensor | int, against: Tensor | int | None = None) -> Tensor:
        """The logits (N,) of one class a picture, less those of `against` for a contrast; also under `no_grad`.

        classes, against: (N,) or one number for all. Raises ClearwingError for a class that the model does not have.
        """
        with torch.inference_mode(False), torch.enable_grad():
            picked = self._logits_of("classes", classes)
            return picked if against is None else picked - self._logits_of("against", against)

    def gradients(
        self, scores: Tensor, relu_rule: str = "plain", of: Sequence[str] | None = None, keep: bool = True
    ) -> Mapping[str, Tensor]:
        """The gradient of the scores at the input and at every layer: {"input": (N, C, H, W), layer: (N, C, h, w)}.

        Of a trace that holds attention, at every matrix as well: {"(attention 0)": (N, heads, T, T)}.

        scores: (N,) or a scalar, made of this trace's `logits` (`scores()` does it); their sum is differentiated.
        relu_rule: "plain"; "guided" (Springenberg et al. 2015); "deconvnet" (Zeiler and Fergus 2014), on the way down.
        of: compute these names alone. Without it, all, in one backward pass.
        keep: False frees the graph on the way, for speed and room: no more gradients can be asked of this trace.
        What was computed for the same tensor and rule is kept and not computed again.

        >>> trace = record(model, images, layers=["layer3"])
        >>> trace.gradients(trace.scores(2))["layer3"].shape == trace.features["layer3"].shape
        True

        Warns once where the rule met non-linearities other than ReLU.
        Raises ClearwingError where the scores are not connected to a layer, the rule is unknown, or no ReLU was met.
        """
        sources = _ByLayer({**self.features, **self.attention})
        if self.inputs:
            sources = _ByLayer({INPUT: self.images, **sources})
        if not isinstance(scores, Tensor) or scores.grad_fn is None:
            mend = "make them of trace.logits, where gradients are enabled; trace.scores(classes) does"
            raise ClearwingError("scores", "they have no graph", mend)
        if scores.shape not in ((), (len(self.images),)):
            raise ClearwingError("scores", tuple(scores.shape), f"give one score a picture, ({len(self.images)},)")
        _, kept = self._kept.setdefault((id(scores), relu_rule), (scores, _ByLayer()))  # holding it keeps its id
        missing = [name for name in (sources if of is None else of) if name not in kept]
        if missing:
            kept.update(self._differentiate(scores, relu_rule, {name: sources[name] for name in missing}, keep))
        return kept

    def _differentiate(
        self, scores: Tensor, relu_rule: str, sources: dict[str, Tensor], keep: bool
    ) -> dict[str, Tensor]:
        plainly = torch.autocast(scores.device.type, enabled=False)  # the forward pass alone is autocast
        with torch.inference_mode(False), torch.enable_grad(), plainly:
            found, left = differentiate(scores, list(sources.values()), relu_rule, keep)
        gradients = {}
        for name, gradient in zip(sources, found, strict=True):
            if gradient is None:
                raise ClearwingError("layer", name, "the scores do not depend on its output; name another layer")
            gradients[name] = gradient
        if left:
            _tell(left, self.told)
        return gradients

    def reached(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whether the logits depend on each value of these layers or matrices of attention: bool, of their shapes.

        A NaN comes down in place of a gradient: no weight stops it, not even zero, only what is not read stays zero.
        """
        sources = _ByLayer({**self.features, **self.attention})
        tensors = [sources[name] for name in names]
        plainly = torch.autocast(self.logits.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), plainly, torch.autograd.set_detect_anomaly(False):
            found, _ = differentiate(self.logits.sum(1) * torch.nan, tensors)
        gradients = [torch.zeros_like(at) if G is None else G for at, G in zip(tensors, found, strict=True)]
        return {name: G.isnan() for name, G in zip(names, gradients, strict=True)}

    def _logits_of(self, argument: str, classes: Tensor | int) -> Tensor:
        n, k = self.logits.shape
        index = torch.as_tensor(classes, device=self.logits.device).clone()  # an inference tensor cannot be saved
        if index.is_floating_point() or index.dtype == torch.bool or index.shape not in ((), (n,)):
            raise ClearwingError(argument, f"{index.dtype} {tuple(index.shape)}", f"give class numbers, ({n},)")
        check_classes(argument, index, k)
        return self.logits.gather(1, index.long().expand(n)[:, None])[:, 0]


def check_classes(argument: str, classes: Tensor, k: int) -> None:
    """Raise ClearwingError for the first class that a model with k classes does not have."""
    outside = classes[(classes < 0) | (classes >= k)]
    if len(outside):
        raise ClearwingError(argument, int(outside[0]), f"the model has {k} classes, 0 to {k - 1}")


class _OtherLayoutError(RuntimeError):
    """The network takes no channels-last pictures; it is known now, so that a second try gives it what it takes."""


P = ParamSpec("P")
T = TypeVar("T")


def in_its_layout(work: Callable[P, T]) -> Callable[P, T]:
    """Let work that runs a model be tried again where the model turned out not to take channels-last pictures."""

    @wraps(work)
    def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        except _OtherLayoutError:
            return work(*args, **kwargs)

    return tried


@in_its_layout
def record(
    model: nn.Module,
    images: Tensor | Batch,
    layers: str | nn.Module | Iterable[str | nn.Module] = (),
    inputs: bool = True,
    parameters: Mapping[str, Tensor] | None = None,
    grid: tuple[int, int] | None = None,
    attention: bool = False,
    told: set[str] | None = None,
    optional: Iterable[str] = (),
) -> Trace:
    """Run the model once on images (N, C, H, W) and keep the logits, the layers' outputs and the graph between them.

    layers: names as in `model.named_modules()` (of a Classifier without "backbone."), or the modules themselves. Each
    must give (N, C, h, w), or (N, h, w, C) or tokens (N, T, C), which are recorded as (N, C, h, w) without class and
    register tokens. What is recorded is what left the layer, even where an in-place operation follows. Of a
    module that runs several times, "relu#0" is the first call, "relu#-1" the last; "relu" is the last, with a warning.
    inputs: False cuts the graph: everything before the first of the layers runs without autograd, and no gradient at
    the input can be asked for. Faster and smaller, for CAM methods.
    parameters: tensors to stand in for the model's own of these names during this pass.
    grid: (h, w) of the tokens, where their number does not tell it.
    attention: keep the matrices (N, heads, T, T) of all self-attention; the graph is then not cut.
    told: warnings that were given already, and are not given again; grows.
    optional: more layers, of which those that do not run are left out.

    Works on frozen networks, under the caller's `no_grad` and `inference_mode`, and inside `autocast`. Nothing of the
    caller's changes: not `.grad`, `requires_grad`, modes, buffers, hooks, the state of the random generators, images.
    (That state belongs to the whole process: what another thread draws meanwhile, it draws again.)

    >>> trace = record(torchvision.models.resnet18().eval(), torch.rand(2, 3, 64, 64), ["layer4"], inputs=False)
    >>> trace.features["layer4"].shape
    torch.Size([2, 512, 2, 2])

    Raises ClearwingError for a model in training mode, compiled inside, or that does not give logits (N, K); for
    an unknown layer, one that does not run, or whose output is no map; for images that are not floating (N, C, H, W);
    and with `attention` for a model that has none over all tokens.
    """
    model, seen = ready(model), pictures(images)
    check_grid(grid)
    inputs = inputs or attention
    asked, optional = calls(model, layers), calls(model, optional)
    wanted = {**optional, **asked}
    outputs: dict[nn.Module, list[tuple[Tensor, int]]] = {module: [] for module, _ in wanted.values()}
    names = {module: name for name, (module, _) in wanted.items()}
    owner = threading.get_ident()
    cut = not inputs

    def keep(module: nn.Module, _: Any, output: Any) -> Tensor | None:
        nonlocal cut
        if threading.get_ident() != owner:  # another thread runs the same model
            return None
        layout = layout_of(output, seen, grid, model, module)
        if layout is None or output.is_inference():
            raise refused(names[module], output, seen)
        if not inputs and (cut or not output.requires_grad):
            output = output.detach()
            feature = layout.fold(output).requires_grad_()
            torch.set_grad_enabled(True)  # until the block around the forward pass ends
            cut = False
        else:
            feature = layout.fold(output)
        outputs[module].append((feature, feature._version))
        return layout.unfold(feature, output)  # a copy: an in-place operation that follows overwrites it

    matrices = KeepAttention(len(seen))
    with hooked(outputs, keep), torch.inference_mode(False):
        images = (seen.clone() if seen.is_inference() else seen.detach()).requires_grad_(inputs)
        with torch.set_grad_enabled(inputs), matrices if attention else nullcontext():
            logits = run(model, images, {**_inference_tensors(model), **(parameters or {})})
    told = set() if told is None else told
    absent = frozenset(name for name, (module, _) in wanted.items() if name not in asked and not outputs[module])
    wanted = {name: place for name, place in wanted.items() if name not in absent}
    features = _ByLayer({name: _chosen(name, outputs[module], call, told) for name, (module, call) in wanted.items()})
    if attention and not matrices.kept:
        raise ClearwingError("attention", f"{type(model).__name__} has no self-attention", "ask for grad-cam instead")
    if (wanted or inputs) and not logits.requires_grad:
        mend = "the forward pass disables gradients inside, or does not use the layer's output; name a later layer"
        raise ClearwingError("model", f"the logits of {type(model).__name__} have no graph", mend)
    kept = {f"(attention {i})": A for i, A in enumerate(matrices.kept)}
    places = {name: (m, range(len(outputs[m]))[-1 if call is None else call]) for name, (m, call) in wanted.items()}
    return Trace(model, images, logits, features, inputs, kept, grid, told, places, absent)


def run(
    model: nn.Module, images: Tensor, parameters: Mapping[str, Tensor] | None = None, answers: int | None = None
) -> Tensor:
    """The logits (N, K) of one forward pass that leaves the images and the state of the random generators alone.

    answers: how many logits there must be, where a hook makes another number of the N pictures.
    """
    layout = torch.contiguous_format if model in _CONTIGUOUS else _layout(images)
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        given = images.clone(memory_format=layout)  # a model that writes on its input writes on this one
        try:
            with _StandIns(model, parameters) if parameters else nullcontext():
                logits = model(given)
        except RuntimeError as error:
            if layout == torch.contiguous_format or "view size is not compatible" not in str(error):
                raise
            _CONTIGUOUS.add(model)  # it calls x.view(n, -1), as many do
            raise _OtherLayoutError(str(error)) from error
    n = len(images) if answers is None else answers
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        what = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        mend = "clearwing.wrap(module, output=...) makes a Classifier of networks with other outputs"
        raise ClearwingError("model", f"it gives {what}, not logits ({n}, K)", mend)
    return logits


_CONTIGUOUS: WeakSet[nn.Module] = WeakSet()
"""Networks that fail on channels-last pictures."""


class _StandIns(TorchFunctionMode):
    """Give every operation of this thread other tensors for the model's own of these names.

    `torch.func.functional_call` would put them into the model, where other threads meet them.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        own = chain(model.named_parameters(), model.named_buffers())
        self.instead = {id(tensor): parameters[name] for name, tensor in own if name in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._of(args), **{name: self._of(value) for name, value in (kwargs or {}).items()})

    def _of(self, value: Any) -> Any:
        if type(value) in (tuple, list):  # torch.cat([token, x])
            return type(value)(map(self._of, value))
        return self.instead.get(id(value), value)


def _layout(images: Tensor) -> torch.memory_format:
    """The memory format in which convolutions are fastest, and which they hand on: channels last.

    But for float64, and for one to three float32 pictures on a CPU: there a ResNet-18 took 14 to 30 % longer in it.
    """
    half = images.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(images.device.type)
    few = images.device.type == "cpu" and len(images) < 4 and not half
    return torch.contiguous_format if few or images.dtype == torch.float64 else torch.channels_last


def _chosen(name: str, outputs: list[tuple[Tensor, int]], call: int | None, told: set[str]) -> Tensor:
    """The output of the call that is asked for, checked against writes on it."""
    if not outputs:
        mend = "it did not run in the forward pass; name a module whose call gives a tensor"
        raise ClearwingError("layer", name, mend)
    last = len(outputs) - 1
    if call is None and last > 0:
        line = f"layer {name} runs {last + 1} times in a forward pass; its last call is explained: {name}#0 to "
        _tell(f"{line}{name}#{last} choose one", told)
    if call is not None and not -len(outputs) <= call <= last:
        base = name.rpartition("#")[0]
        raise ClearwingError("layer", name, f"the module runs {last + 1} times: {base}#0 to {base}#{last}")
    output, version = outputs[last if call is None else call]
    if output._version != version:  # the model holds on to the same memory, as nn.Identity gives its input
        raise ClearwingError("layer", name, "its output is overwritten in place elsewhere; name another module")
    return output


def _tell(line: str, told: set[str]) -> None:
    if line not in told:
        told.add(line)
        warnings.warn(line, UserWarning, stacklevel=4)


def _inference_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Clones of the parameters and buffers made under inference_mode, which autograd refuses to save."""
    of_modules = (chain(module._parameters.values(), module._buffers.values()) for module in model.modules())
    if not any(tensor is not None and tensor.is_inference() for tensor in chain.from_iterable(of_modules)):
        return {}  # as nearly always; to name them all takes a hundredth of a small forward pass
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.clone() for name, tensor in tensors if tensor.is_inference()}
