"""Record one forward pass with its graph alive: `record`, the `Trace` it gives, and `find_layer`.

All hooks of the library are here. The model is left as it was found, after exceptions too.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from clearwing.attribution.backward import differentiate
from clearwing.types import Batch, ClearwingError, near

INPUT = "input"
"""Stands for the pictures among the names of layers."""


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
    attention: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (N, heads, T, T), where it was asked for
    told: set[str] = field(default_factory=set)  # warnings given: each is said once
    _kept: dict[tuple[int, str], tuple[Tensor, _ByLayer]] = field(default_factory=dict)

    def scores(self, classes: Tensor | int, against: Tensor | int | None = None) -> Tensor:
        """The logits (N,) of one class a picture, less those of `against` for a contrast; also under `no_grad`.

        classes, against: (N,) or one number for all. Raises ClearwingError for a class that the model does not have.
        """
        with torch.inference_mode(False), torch.enable_grad():
            picked = self._logits_of("classes", classes)
            return picked if against is None else picked - self._logits_of("against", against)

    def gradients(
        self, scores: Tensor, relu_rule: str = "plain", of: Sequence[str] | None = None
    ) -> Mapping[str, Tensor]:
        """The gradient of the scores at the input and at every layer: {"input": (N, C, H, W), layer: (N, C, h, w)}.

        scores: (N,) or a scalar, made of this trace's `logits` (`scores()` does it); their sum is differentiated.
        relu_rule: "plain"; "guided" (Springenberg et al. 2015); "deconvnet" (Zeiler and Fergus 2014), on the way down.
        of: compute these names alone. Without it, all, in one backward pass.
        What was computed for the same tensor and rule is kept and not computed again.

        >>> trace = record(model, images, layers=["layer3"])
        >>> trace.gradients(trace.scores(2))["layer3"].shape == trace.features["layer3"].shape
        True

        Warns once where the rule met non-linearities other than ReLU.
        Raises ClearwingError where the scores are not connected to a layer, the rule is unknown, or no ReLU was met.
        """
        sources = _ByLayer(self.features)
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
            kept.update(self._differentiate(scores, relu_rule, {name: sources[name] for name in missing}))
        return kept

    def _differentiate(self, scores: Tensor, relu_rule: str, sources: dict[str, Tensor]) -> dict[str, Tensor]:
        plainly = torch.autocast(scores.device.type, enabled=False)  # the forward pass alone is autocast
        with torch.inference_mode(False), torch.enable_grad(), plainly:
            found, left = differentiate(scores, list(sources.values()), relu_rule)
        gradients = {}
        for name, gradient in zip(sources, found, strict=True):
            if gradient is None:
                raise ClearwingError("layer", name, "the scores do not depend on its output; name another layer")
            gradients[name] = gradient
        if left:
            _tell(left, self.told)
        return gradients

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


def record(
    model: nn.Module,
    images: Tensor | Batch,
    layers: str | nn.Module | Iterable[str | nn.Module] = (),
    inputs: bool = True,
    parameters: Mapping[str, Tensor] | None = None,
    grid: tuple[int, int] | None = None,
    attention: bool = False,
    told: set[str] | None = None,
) -> Trace:
    """Run the model once on images (N, C, H, W) and keep the logits, the layers' outputs and the graph between them.

    layers: names as in `model.named_modules()` (of a Classifier without "backbone."), or the modules themselves. Each
    must give a 4-D tensor. What is recorded is what left the layer, even where an in-place operation follows. Of a
    module that runs several times, "relu#0" is the first call, "relu#-1" the last; "relu" is the last, with a warning.
    inputs: False cuts the graph: everything before the first of the layers runs without autograd, and no gradient at
    the input can be asked for. Faster and smaller, for CAM methods.
    parameters: tensors to stand in for the model's own of these names during this pass.
    told: warnings that were given already, and are not given again; grows.

    Works on frozen networks, under the caller's `no_grad` and `inference_mode`, and inside `autocast`. Nothing of the
    caller's changes: not `.grad`, `requires_grad`, modes, buffers, hooks, the state of the random generators, images.

    >>> trace = record(torchvision.models.resnet18().eval(), torch.rand(2, 3, 64, 64), ["layer4"], inputs=False)
    >>> trace.features["layer4"].shape
    torch.Size([2, 512, 2, 2])

    Raises ClearwingError for a model in training mode, compiled inside, or that does not give logits (N, K); for
    an unknown layer, one that does not run, or whose output is no 4-D tensor; for images that are not floating
    (N, C, H, W).
    """
    model, images = ready(model), pictures(images)
    wanted = _calls(model, layers)
    outputs: dict[nn.Module, list[tuple[Tensor, int]]] = {module: [] for module, _ in wanted.values()}
    names = {module: name for name, (module, _) in wanted.items()}
    owner = threading.get_ident()
    cut = not inputs

    def keep(module: nn.Module, _: Any, output: Any) -> Tensor | None:
        nonlocal cut
        if threading.get_ident() != owner:  # another thread runs the same model
            return None
        _check_output(names[module], output)
        if not inputs and (cut or not output.requires_grad):
            output = output.detach().requires_grad_()
            torch.set_grad_enabled(True)  # until the block around the forward pass ends
            cut = False
        outputs[module].append((output, output._version))
        return output.clone()  # an in-place operation that follows overwrites this one

    with hooked(outputs, keep), torch.inference_mode(False):
        images = (images.clone() if images.is_inference() else images.detach()).requires_grad_(inputs)
        with torch.set_grad_enabled(inputs):
            logits = run(model, images, {**_inference_tensors(model), **(parameters or {})})
    told = set() if told is None else told
    features = _ByLayer({name: _chosen(name, outputs[module], call, told) for name, (module, call) in wanted.items()})
    if (wanted or inputs) and not logits.requires_grad:
        mend = "the forward pass disables gradients inside, or does not use the layer's output; name a later layer"
        raise ClearwingError("model", f"the logits of {type(model).__name__} have no graph", mend)
    return Trace(model, images, logits, features, inputs, told=told)


def run(model: nn.Module, images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits (N, K) of one forward pass that leaves the images and the state of the random generators alone."""
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        given = images.clone()  # a model that writes on its input writes on this one
        logits = torch.func.functional_call(model, dict(parameters), (given,)) if parameters else model(given)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        what = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        mend = "clearwing.wrap(module, output=...) makes a Classifier of networks with other outputs"
        raise ClearwingError("model", f"it gives {what}, not logits ({len(images)}, K)", mend)
    return logits


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


def find_layer(model: nn.Module, images: Tensor | Batch, larger_than: int | None = None) -> str:
    """The default layer: the last module to finish whose output is 4-D with more than one place in space.

    larger_than: ask for maps larger than this on both sides; 7 gives `layer3` of the CIFAR ResNet-18 at 32 pixels.
    The first picture is run once. Pooling, dropout and identity modules are passed over, and so are modules that run
    twice. Where the pick lies halfway through a block whose own output is too small, and the module that finished
    before the block has a map of the same size, it is that module: `layer3`, not `layer4.0.bn1` of a ResNet-50.

    >>> find_layer(torchvision.models.resnet18().eval(), torch.rand(1, 3, 64, 64))
    'layer4'

    Raises ClearwingError where no layer qualifies.
    """
    model, images = ready(model), pictures(images)
    smallest = 0 if larger_than is None else larger_than
    names = {module: name for name, module in model.named_modules() if name}
    sizes: dict[str, tuple[int, int] | None] = {}  # in the order in which the modules finish; None where no 4-D tensor
    unfit, owner = set[str](), threading.get_ident()

    def see(module: nn.Module, _: Any, output: Any) -> None:
        if threading.get_ident() == owner:
            name = names[module]
            if name in sizes or isinstance(module, _PASSED_OVER):
                unfit.add(name)
            spatial = isinstance(output, Tensor) and output.ndim == 4
            sizes.setdefault(name, (output.shape[2], output.shape[3]) if spatial else None)

    devices = [images.device] if images.is_cuda else []
    with hooked(names, see), torch.random.fork_rng(devices), torch.no_grad():
        model(images[:1].clone())
    large = {name: s for name, s in sizes.items() if s and min(s) > smallest and s[0] * s[1] > 1}
    order = list(sizes)
    fit = [name for name in order if name in large and name not in unfit]
    if not fit:
        wanted = "more than one place" if larger_than is None else f"a map larger than {larger_than} x {larger_than}"
        seen = sorted({s for s in sizes.values() if s}, reverse=True)
        found = ", ".join(f"{h} x {w}" for h, w in seen) or "no 4-D output at all"
        raise ClearwingError("layers", f"no layer has {wanted}", f"found {found}; give larger images, or name a layer")
    pick, before = fit[-1], ""
    while pick != before:
        before = pick
        for block in _around(pick):
            if sizes.get(block) and block not in large:
                began = next(i for i, name in enumerate(order) if name.startswith(f"{block}."))
                earlier = [name for name in fit if order.index(name) < began]
                if earlier and sizes[earlier[-1]] == sizes[pick]:
                    pick = earlier[-1]
                    break
    return _shown(model, pick)


_PASSED_OVER = (
    nn.Identity,
    _DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def ready(model: nn.Module) -> nn.Module:
    """The network inside wrappers (compiled, parallel, Fabric), refused where a recording would be quietly wrong."""
    if not isinstance(model, nn.Module):
        raise ClearwingError("model", type(model).__name__, "give a torch.nn.Module that maps (N, C, H, W) to (N, K)")
    inner: Any = model
    while inner is not None:
        model = inner
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        wrapped = parallel or type(model).__name__ == "_FabricModule"
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)  # torch.compile keeps the original there
    if model._compiled_call_impl is not None:  # model.compile(): a shallow copy shares everything but this
        model = copy.copy(model)
    for name, module in model.named_modules():
        if name and (module._compiled_call_impl is not None or hasattr(module, "_orig_mod")):
            mend = "hooks and ReLU rules do not reach into it; explain the network as it is before compiling"
            raise ClearwingError("model", f"{name} is compiled", mend)
        if _trains(module) or (module.training and not name):
            who = name or type(module).__name__
            raise ClearwingError("model", f"{who} is in training mode", "call model.eval() before explaining")
    return model


def _trains(module: nn.Module) -> bool:
    """Whether the module now behaves otherwise than in evaluation; of torch's own modules few do, of others any may."""
    if not module.training:
        return False
    if not type(module).__module__.startswith("torch.nn."):
        return True
    tracked = isinstance(module, _InstanceNorm) and module.track_running_stats
    return tracked or isinstance(module, _DIFFERENT_IN_TRAINING)


_DIFFERENT_IN_TRAINING = (_BatchNorm, _DropoutNd, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)


def pictures(images: Tensor | Batch) -> Tensor:
    """The images (N, C, H, W) of a batch or as they are; ClearwingError where they are no floating pictures."""
    if isinstance(images, Batch):
        images = images.images
    if not isinstance(images, Tensor):
        raise ClearwingError("images", type(images).__name__, "give a tensor (N, C, H, W) or a Batch")
    if images.ndim != 4 or len(images) == 0:
        mend = "give (N, C, H, W)" + (", images[None] for a single one" if images.ndim == 3 else ", N at least 1")
        raise ClearwingError("images", tuple(images.shape), mend)
    if not images.is_floating_point():
        raise ClearwingError("images", images.dtype, "give floating images in [0, 1]; divide bytes by 255")
    return images


def named_layers(model: nn.Module, layers: str | nn.Module | Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """The modules by the names that users see, in the order asked; ClearwingError for one that is not in the model."""
    return {name: module for name, (module, _) in _calls(model, layers).items()}


def _calls(
    model: nn.Module, layers: str | nn.Module | Iterable[str | nn.Module]
) -> dict[str, tuple[nn.Module, int | None]]:
    """The modules asked for, and which of its calls where a name says so: "relu#1" is the second."""
    if isinstance(layers, str | nn.Module):
        layers = [layers]
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    names = {module: name for name, module in reversed(modules.items())}
    found: dict[str, tuple[nn.Module, int | None]] = {}
    for layer in layers:
        asked, call = layer, re.search(r"#-?\d+$", layer) if isinstance(layer, str) else None
        if isinstance(layer, str) and call is not None:
            asked = layer[: call.start()]
        if isinstance(asked, nn.Module):
            full = names.get(asked)
        else:
            full = next((name for name in (asked, f"backbone.{asked}") if name in modules), None)
        if full == INPUT:
            raise ClearwingError("layer", INPUT, "the word stands for the pictures here; rename the module")
        if full is None:
            known = [_shown(model, name) for name in modules]
            shown = asked if isinstance(asked, str) else type(asked).__name__
            raise ClearwingError("layer", shown, near(shown, known) if known else "the model has no layers")
        name = _shown(model, names[modules[full]]) + (call[0] if call else "")
        found[name] = (modules[full], int(call[0][1:]) if call else None)
    return found


def _shown(model: nn.Module, name: str) -> str:
    """A layer's name without the "backbone." of a Classifier."""
    classifier = hasattr(model, "class_names") and isinstance(getattr(model, "backbone", None), nn.Module)
    return name.removeprefix("backbone.") if classifier else name


def _around(name: str) -> list[str]:
    """The names of the blocks around a module, the innermost first: "a.b.c" -> ["a.b", "a"]."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inference_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Clones of the parameters and buffers made under inference_mode, which autograd refuses to save."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.clone() for name, tensor in tensors if tensor.is_inference()}


def _check_output(name: str, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
        what = f"{tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ClearwingError("layer", name, f"it gives {what}; name one that gives a 4-D tensor (N, C, h, w)")
    if output.is_inference():
        raise ClearwingError("layer", name, "it runs inside an inference_mode of the model's own; name a later one")
