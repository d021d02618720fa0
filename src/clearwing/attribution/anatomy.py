"""What a network is made of, seen while it runs: its activations, its strided convolutions, how far its layers see."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clearwing.attribution.backward import between, unruled
from clearwing.attribution.layers import find_layer
from clearwing.attribution.modules import INPUT, hooked, shown_name
from clearwing.attribution.network import exact
from clearwing.attribution.trace import Trace, record, run
from clearwing.types import ClearwingError

# fmt: off
_ACTIVATIONS = frozenset((  # operators of torch; an underscore behind the name says in place
    "_prelu_kernel", "abs", "clamp", "clamp_max", "clamp_min", "elu", "erf", "fmax", "fmin", "gelu", "glu",
    "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid_forward", "masked_fill", "maximum",
    "minimum", "mish", "relu", "rrelu_with_noise", "sigmoid", "silu", "sin", "softplus", "softshrink", "tanh",
    "threshold", "where",
))
# fmt: on
_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")  # tagged random for their dropout
ITSELF = "the network itself"
SICK = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError)
"""What a network that is not in order may raise when it runs."""


@dataclass(frozen=True)
class Activation:
    """A non-linearity, and the module that runs it."""

    operator: str  # of torch: relu, gelu, hardtanh ...
    module: str
    kind: str  # the class of that module
    in_place: bool
    functional: bool  # called by a module that does more than this: hooks on modules do not see it
    calls: int


@dataclass(frozen=True)
class Strided:
    """A convolution with a stride, or a slice with a step, which is a kernel of 1."""

    module: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    reads: tuple[int, int]  # (h, w) of the map before it

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """How often it reads the rows, and the columns, of a cell of stride x stride places."""
        axes = zip(self.kernel, self.stride, self.dilation, strict=True)
        rows, columns = ([sum(j * d % s == i for j in range(k)) for i in range(s)] for k, s, d in axes)
        return rows, columns

    @property
    def even(self) -> bool:
        return all(min(counts) == max(counts) for counts in self.counts)

    @property
    def unread(self) -> float:
        """The share of places that it never reads."""
        rows, columns = (sum(count > 0 for count in counts) / len(counts) for counts in self.counts)
        return 1 - rows * columns


@dataclass(frozen=True)
class Seen:
    """What one forward and backward pass showed; modules in the order in which they ran."""

    logits: Tensor  # (N, K)
    graph: bool  # they depend on the pictures by one
    activations: tuple[Activation, ...]
    strided: tuple[Strided, ...]
    random: tuple[str, ...]  # operators that draw numbers, and where
    calls: dict[str, int]  # of modules
    nonfinite_outputs: tuple[str, ...]
    nonfinite_gradients: tuple[str, ...]  # from the logits down


class _Operators(TorchDispatchMode):
    """Note the operators of a forward pass together with the module that runs them."""

    def __init__(self, names: dict[nn.Module, str], model: nn.Module) -> None:
        super().__init__()
        self.names, self.inside = names, [model]
        self.activations = Counter[tuple[str, str, nn.Module]]()
        self.strided: list[Strided] = []
        self.random: dict[str, None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to skip the compiler torch first imports it, for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, module = func.overloadpacket.__name__, self.inside[-1]
        if name.removesuffix("_") in _ACTIVATIONS:
            self.activations[name, self.names[module], module] += 1
        elif name == "convolution" and args[0].ndim == 4 and not args[6]:
            self._strided(args[0], args[1].shape[2:], args[3], args[5])
        elif name == "slice" and len(args) == 5 and args[0].ndim == 4 and args[1] in (2, 3):
            self._strided(args[0], (1, 1), (args[4], 1) if args[1] == 2 else (1, args[4]), (1, 1))
        elif torch.Tag.nondeterministic_seeded in func.tags and not name.startswith(_ATTENTION):
            self.random[f"{name} in {self.names[module]}"] = None
        return func(*args, **(kwargs or {}))

    def _strided(self, read: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        if max(stride) == 1:
            return
        (kh, kw), (sh, sw), (dh, dw), (h, w) = kernel, stride, dilation, read.shape[2:]
        found = Strided(self.names[self.inside[-1]], (kh, kw), (sh, sw), (dh, dw), (h, w))
        last = self.strided[-1] if self.strided else found
        if sh == 1 and last.stride[1] == 1 and last.module == found.module:  # x[:, :, ::2, ::2] is two slices
            self.strided[-1] = replace(last, stride=(last.stride[0], sw))
        else:
            self.strided.append(found)


def watch(model: nn.Module, images: Tensor) -> Seen:
    """Run images (N, C, H, W) forward, and the largest logits back, once, and note what happens.

    Raises ClearwingError where the network does not give logits (N, K), or fails.
    """
    names = {module: shown_name(model, name) or ITSELF for name, module in model.named_modules()}
    operators, owner = _Operators(names, model), threading.get_ident()
    calls = Counter[str]()
    outputs, gradients = list[str](), list[str]()  # that are not finite

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == owner:
            operators.inside.append(module)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        if threading.get_ident() != owner:
            return
        operators.inside.pop()
        name = names[module]
        calls[name] += 1
        if isinstance(output, Tensor) and output.is_floating_point():
            if not _finite(output):
                outputs.append(name)
            if output.requires_grad:
                output.register_hook(lambda G: None if _finite(G) else gradients.append(name))

    images = images.detach().clone().requires_grad_()
    with exact(images.device.type), torch.inference_mode(False), torch.enable_grad(), _told(images):
        with hooked(names, leave, enter), operators:
            logits = run(model, images)
        if graph := logits.requires_grad:
            (found,) = torch.autograd.grad(logits.amax(1).sum(), images, allow_unused=True)
            graph = found is not None
    return Seen(
        logits.detach(),
        graph,
        tuple(_activation(*one, calls) for one, calls in operators.activations.items()),
        tuple(operators.strided),
        tuple(operators.random),
        dict(calls),
        tuple(dict.fromkeys(outputs)),
        tuple(dict.fromkeys(gradients)),
    )


@contextmanager
def _told(images: Tensor) -> Iterator[None]:
    """What the network raises, as a ClearwingError."""
    try:
        yield
    except ClearwingError:
        raise
    except SICK as error:
        said = str(error).partition(" Hint: ")[0].partition("\n")[0]
        what = f"its forward or backward pass raises {type(error).__name__}: {said}"
        mend = f"give pictures that it takes, these are {' x '.join(map(str, images.shape[1:]))}; else mend its forward"
        raise ClearwingError("model", what, mend) from error


def _activation(operator: str, name: str, module: nn.Module, calls: int) -> Activation:
    plain, kind = operator.removesuffix("_"), type(module)
    more = any(True for _ in module.children()) or any(True for _ in module.parameters(False))
    functional = more and not kind.__module__.startswith("torch.nn.modules.activation")
    return Activation(plain, name, kind.__name__, plain != operator, functional, calls)


def _finite(tensor: Tensor) -> bool:
    return not tensor.numel() or all(isfinite(float(end)) for end in tensor.detach().aminmax())


# ---------------------------------------------------------------------------------------------------------------
# Layers


@dataclass(frozen=True)
class Layer:
    """A layer that can be explained, and what there is to know of its maps."""

    name: str
    channels: int
    map: tuple[int, int]  # (h, w)
    stride: tuple[float, float]  # pixels of the picture to a place of the map
    field: tuple[int, int]  # the receptive field, rows and columns, of the place in the middle
    field_at_least: bool  # it reaches the border of the picture: the field is at least so large
    before: tuple[str, ...] = ()  # convolutions with a stride that read it unevenly
    grid: float | None = None  # then: mean |gradient| on the places read most, over that on those read least


def candidates(model: nn.Module, images: Tensor) -> tuple[list[str], dict[str, str]]:
    """The default layer at every resolution, the first in the network first, and why others of them are refused."""
    found: list[str] = []
    refused: dict[str, str] = {}
    size: int | None = None
    while True:
        try:
            layer = find_layer(model, images[:1], size)
        except ClearwingError as error:
            return found[::-1], refused if found or refused else {"": f"{error.value}; {error.mend}"}
        try:
            trace = record(model, images[:1], layer)
        except ClearwingError as error:
            refused[layer] = f"{error.value}; {error.mend}"
            return found[::-1], refused
        size = min(trace.features[layer].shape[2:])
        try:
            trace.gradients(trace.scores(trace.logits.argmax(1)), of=[layer])
            found.append(layer)
        except ClearwingError as error:  # a branch that the logits do not hang on
            refused[layer] = error.mend
            found += _reaching(model, images[:1], size)


def _reaching(model: nn.Module, images: Tensor, size: int) -> list[str]:
    """The last module with a map of this size that the logits depend on, or none; where `find_layer` named another."""
    names = {module: shown_name(model, name) for name, module in model.named_modules() if name}
    finished, reached = Counter[str](), set[str]()

    def see(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) == size and output.requires_grad:
            finished[names[module]] += 1
            output.register_hook(lambda _: reached.add(names[module]))

    images = images.detach().clone().requires_grad_()
    with exact(images.device.type), torch.inference_mode(False), torch.enable_grad(), hooked(names, see):
        torch.autograd.grad(run(model, images).amax(1).sum(), images, allow_unused=True)
    once = [name for name, calls in finished.items() if calls == 1 and name in reached]
    return once[-1:]


def layer_facts(trace: Trace, strided: Sequence[Strided]) -> list[Layer]:
    """The facts on the layers of a trace that reaches its pictures, which come first."""
    G = trace.gradients(trace.scores(trace.logits.argmax(1)))
    one = record(trace.model, trace.images[:1], list(trace.features), told=trace.told)
    facts = []
    for name, A in {INPUT: one.images, **one.features}.items():
        h, w = A.shape[2:]
        last = name != INPUT or all(feature.shape[2:] != (h, w) for feature in one.features.values())
        uneven = [conv for conv in strided if last and conv.reads == (h, w) and not conv.even]
        stride = one.images.shape[2] / h, one.images.shape[3] / w
        facts.append(
            Layer(
                name,
                A.shape[1],
                (h, w),
                stride,
                *((1, 1), False) if name == INPUT else receptive_field(one.images, A),
                tuple(dict.fromkeys(conv.module for conv in uneven)),
                _grid(G[name], uneven[0].stride) if uneven else None,
            )
        )
    return facts


def _grid(G: Tensor, stride: tuple[int, int]) -> float | None:
    """The mean |G| on each place of a cell of stride x stride, the largest over the smallest."""
    size = G.detach().abs().double().mean((0, 1))
    cells = torch.stack(
        [size[i :: stride[0], j :: stride[1]].mean() for i in range(stride[0]) for j in range(stride[1])]
    )
    return float(cells.max() / cells.min()) if cells.max() > 0 else None  # no gradient, or none that is finite


def receptive_field(images: Tensor, A: Tensor) -> tuple[tuple[int, int], bool]:
    """The rows and columns of a picture on which the middle place of A depends, and whether they reach its border.

    A (1, C, h, w) has a graph down to the picture. The theoretical field: what a place can depend on by the wiring of
    the network, whatever its weights (Luo et al. 2016 call what the weights leave of it effective).
    """
    seed = torch.zeros_like(A)
    seed[:, :, A.shape[2] // 2, A.shape[3] // 2] = 1
    with _Reach():
        (reached,) = torch.autograd.grad(A, images, seed, retain_graph=True, allow_unused=True)
    if reached is None:
        return (0, 0), False
    spans, border = [], False
    for axis in (1, 0):
        at = (reached[0] != 0).any(0).any(axis).nonzero()[:, 0].tolist() or [0, -1]
        spans.append(at[-1] - at[0] + 1)
        border |= at[0] == 0 or at[-1] == images.shape[3 - axis] - 1
    return (spans[0], spans[1]), border


class _Reach(TorchDispatchMode):
    """Carry back through a graph which values count, not how much: one where a value is reached, else zero.

    A convolution passes it on with a weight of one everywhere, an activation and batch norm as it is, max-pooling to
    the whole of its window. Other operators keep their gradient, which is zero only where they do not look.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see above

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "convolution_backward":
            grad, read, weight, groups = _reached(args[0]), args[1], args[2], args[9]
            if groups == 1:  # every channel reaches every other: one stands for all
                grad, read, weight = grad.amax(1, keepdim=True), read[:, :1], weight[:1, :1]
            found = func(grad, read, torch.ones_like(weight), None, *args[4:10], [True, False, False])
            return _reached(found[0]).expand_as(args[1]), None, None
        if name == "native_batch_norm_backward" and not args[7]:
            return _reached(args[0]), None, None
        if name == "max_pool2d_with_indices_backward" and max(args[5]) == 1:
            grad, read, kernel, stride, padding, _, ceil = args[:7]
            whole = torch.ops.aten.avg_pool2d_backward(_reached(grad), read, kernel, stride, padding, ceil, True, 1)
            return _reached(whole)
        if name.endswith("_backward") and name.removesuffix("_backward") in _PASSED:
            return _reached(args[0])
        return func(*args, **(kwargs or {}))


_PASSED = _ACTIVATIONS - {"glu", "_prelu_kernel"}  # those whose backward takes the gradient first and gives one alone


def _reached(gradient: Tensor) -> Tensor:
    return (gradient != 0).to(gradient.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Guided backpropagation


@dataclass(frozen=True)
class Guided:
    """What the guided rule meets between the logits and the pictures."""

    replaced: int  # ReLUs
    kept: dict[str, int]  # other non-linearities, by the names of their nodes in the graph
    refused: str = ""  # why guided backpropagation is refused


def guided(trace: Trace) -> Guided:
    """What guided backpropagation will meet on the way from the logits to the pictures of a trace."""
    scores = trace.scores(trace.logits.argmax(1))
    nodes = between(scores.sum(), [trace.images])
    kept = Counter(name for node in nodes if (name := unruled(node)))
    relus = sum(node.name().startswith(("Relu", "Threshold")) and not unruled(node) for node in nodes)
    try:
        trace.gradients(scores, "guided", of=(INPUT,))
    except ClearwingError as error:
        return Guided(relus, dict(kept), f"{error.value}; {error.mend}")
    return Guided(relus, dict(kept))
