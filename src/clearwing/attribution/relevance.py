"""Layer-wise relevance propagation, Bach et al. 2015: a score shared out among the pixels, layer by layer.

Every rule is a modified gradient. Where R_j = z_j g_j is the relevance of a layer's output z, a rule shares it in the
proportions of a sum d_j(x) over the layer's input: R_i = x_i sum_j (dd_j / dx_i) z_j g_j / d_j. So the layer's output
is handed on with the gradient of d instead of its own, into which z_j g_j / d_j is fed, and R = x g holds at its input
again. The plain gradient of all else is a rule already: a ReLU passes relevance on, a sum or a mean shares it in
proportion, of a pool the largest takes it.

A batch norm after a convolution belongs to it: the rule sees the product of their weights, and the model stays as it
is. Elsewhere it is a linear layer of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from clearwing.attribution.backward import between
from clearwing.attribution.network import Network, wide
from clearwing.attribution.targets import Question
from clearwing.attribution.trace import Trace
from clearwing.types import ClearwingError


def lrp_epsilon(
    network: Network, images: Tensor, question: Question, generator: torch.Generator, epsilon: float = 1e-6
) -> Tensor:
    """R_i = sum_j x_i w_ij / (z_j + epsilon_j sign z_j) R_j at every layer, Bach et al. 2015 eq. 58: (N, C, H, W).

    epsilon: epsilon_j over the root mean square of the picture's z in the layer. What it and the biases hold is
        absorbed. A small one gives input x gradient on ReLU networks; 0.25 keeps to strong contributions.

    The relevance is that of the values that enter the first layer, in a Classifier the normalised pictures; where
    these have other channels than the pictures it is summed over them, (N, H, W). The relevance of the logits is
    logit x gradient of the score, which is the score where it is a sum of logits.

    Raises ClearwingError for a network with other parts than 2-d convolutions, linear layers, batch norm, ReLU, pools,
    sums and reshaping from the first layer to the logits, and where the first layer does not see the pictures' pixels.
    """
    return _relevance(network, images, question, lambda x, z, kernel: z, epsilon)


def lrp_gamma(
    network: Network,
    images: Tensor,
    question: Question,
    generator: torch.Generator,
    gamma: float = 0.25,
    epsilon: float = 1e-6,
) -> Tensor:
    """R_i = sum_j x_i (w_ij + gamma w_ij^+) / (z_j + gamma z_j^+) R_j at convolutions, Montavon et al. 2019 sec. 10.2.

    Contributions x_i w_ij of the sign of z_j count 1 + gamma times, which is the paper's rule where x >= 0 and z > 0.
    The bias is one of them, as in the paper, and absorbs its share: without it the divisor might vanish. Linear layers
    follow the epsilon rule, as there: the signs of the last weights tell the classes apart.

    gamma: how much the agreeing contributions are favoured; 0 is the epsilon rule.
    epsilon, shapes and what is raised: as `lrp_epsilon`.
    """
    _check("gamma", gamma, "of at least 0")

    def divisor(x: Tensor, z: Tensor, kernel: _Kernel) -> Tensor:
        positive = kernel.positive(x)
        if kernel.bias is not None:
            positive = positive + kernel.bias.clamp(min=0)[:, None, None]
        # of z > 0 the positive contributions agree, which are so many; of others the rest
        return z + gamma * torch.where(z > 0, positive, z - positive)

    return _relevance(network, images, question, divisor, epsilon)


def lrp_zplus(
    network: Network, images: Tensor, question: Question, generator: torch.Generator, epsilon: float = 1e-6
) -> Tensor:
    """R_i = sum_j (x_i w_ij)^+ / sum_i (x_i w_ij)^+ R_j at convolutions (alpha 1, beta 0), Bach et al. 2015 eq. 60.

    The bias is left out of the sum, so that all relevance is passed on but that of places to which nothing contributes
    positively. Linear layers follow the epsilon rule (Kohlbrenner et al. 2020): z+ would leave the classes' maps alike.

    epsilon, shapes and what is raised: as `lrp_epsilon`.
    """
    return _relevance(network, images, question, lambda x, z, kernel: kernel.positive(x), epsilon)


@dataclass(frozen=True, eq=False)
class _Kernel:
    """What a convolution computes, with the batch norm that follows it."""

    convolve: Callable[[Tensor, Tensor], Tensor]  # of an input with weights, without a bias
    weight: Tensor  # (K, C, h, w)
    bias: Tensor | None  # (K,)

    def positive(self, x: Tensor) -> Tensor:
        """sum_i (x_i w_ij)^+"""
        weight = self.weight.to(x.dtype)
        if not bool((x < 0).any()):  # behind a ReLU
            return self.convolve(x, weight.clamp(min=0))
        up = F.relu(x)
        return self.convolve(up, weight.clamp(min=0)) + self.convolve(x - up, weight.clamp(max=0))

    def scaled(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> _Kernel:
        """With the batch norm (z - mean) / sqrt(var + eps) * weight + bias, all (K,), behind it."""
        scale = (wide(var) + eps).rsqrt() * (1 if weight is None else wide(weight))
        shift = (0 if self.bias is None else self.bias) - wide(mean)
        shift = shift * scale + (0 if bias is None else wide(bias))
        return _Kernel(self.convolve, self.weight * scale[:, None, None, None], shift)


Divisor = Callable[[Tensor, Tensor, _Kernel], Tensor]
"""A rule for convolutions: (x, z, kernel) -> d, whose gradients at x share out the relevance."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer as it ran, in a graph of its own from x to z, beside the network's."""

    kind: str
    seen: Tensor  # the input in the network's graph
    x: Tensor  # the same as a leaf
    version: int  # of x; an in-place operation raises it
    z: Tensor
    weights: tuple[Tensor | None, ...]
    kernel: _Kernel | None = None  # of a convolution


class _Rule(torch.autograd.Function):
    """The output of a layer, with the gradient of the rule at what it saw."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, divisor: Divisor, epsilon: float, seen: Tensor, *_: Tensor | None) -> Tensor:
        ctx.layer, ctx.divisor, ctx.epsilon = layer, divisor, epsilon
        return layer.z.detach().clone()  # what is written on it in place leaves z alone

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        layer: _Layer = ctx.layer
        x, z, kernel = layer.x, layer.z, layer.kernel
        with torch.enable_grad():
            d = z if kernel is None else ctx.divisor(x, z, kernel)
        total = wide(d)
        size = total.square().mean(tuple(range(1, d.ndim)), keepdim=True).sqrt()  # (N, 1, ...)
        away = (ctx.epsilon * size).clamp(min=torch.finfo(total.dtype).tiny)
        s = wide(z) * wide(g) / (total + torch.where(total < 0, -away, away))
        with torch.enable_grad():  # a product, for grad_outputs would load sympy; the graph is kept: another batch
            # norm may follow the same convolution
            (shared,) = torch.autograd.grad((d * s.to(d.dtype)).sum(), x, retain_graph=True)
        return None, None, None, shared, *(None for _ in layer.weights)


class _Rules(TorchFunctionMode):
    """Gives every linear layer of a forward pass in this thread a rule, be it a module, a subclass or a function.

    The layer runs in a graph of its own, and its output goes on with the rule in the network's graph. There the weights
    are inputs of the rule too, so that those which depend on the pictures are seen.
    """

    def __init__(self, divisor: Divisor, epsilon: float) -> None:
        super().__init__()
        self.divisor, self.epsilon = divisor, epsilon
        self.first: Tensor | None = None  # the input of the first layer
        self.layers: list[_Layer] = []
        self.convolved: Any = WeakTensorKeyDictionary()  # the output of a convolution -> its _Layer and version

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = {torch.conv2d: self._convolution, F.linear: self._linear, F.batch_norm: self._norm}.get(func, func)
        return rule(*args, **(kwargs or {}))

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **named: Any
    ) -> Tensor:
        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            return torch.conv2d(x, weight, None, *settings, **named)

        seen, x = self._entered(input)
        z = torch.conv2d(x, weight, bias, *settings, **named)
        kernel = _Kernel(convolve, wide(weight), None if bias is None else wide(bias))
        return self._ruled(_Layer("convolution", seen, x, x._version, z, (weight, bias), kernel))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen, x = self._entered(input)
        z = F.linear(x, weight, bias)
        return self._ruled(_Layer("linear layer", seen, x, x._version, z, (weight, bias)))

    def _norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        settings = running_mean, running_var, weight, bias, training, momentum, eps
        if training or running_mean is None or running_var is None:
            return F.batch_norm(input, *settings)  # not linear; met in the graph, and refused
        before, version = self.convolved.get(input, (None, 0))
        if before is None or before.kernel is None or input._version != version:
            seen, x = self._entered(input)
            return self._ruled(_Layer("batch norm", seen, x, x._version, F.batch_norm(x, *settings), (weight, bias)))
        kernel = before.kernel.scaled(running_mean, running_var, weight, bias, eps)
        z, weights = F.batch_norm(before.z, *settings), (*before.weights, weight, bias)
        return self._ruled(replace(before, z=z, weights=weights, kernel=kernel))

    def _entered(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The input of a layer in the network's graph, and as a leaf."""
        if self.first is None:  # a leaf itself where the pictures were normalised without a graph
            self.first = seen = seen if seen.requires_grad else seen.detach().requires_grad_()
        return seen, seen.detach().requires_grad_()

    def _ruled(self, layer: _Layer) -> Tensor:
        if not (layer.seen.requires_grad and layer.z.requires_grad):
            mend = "relevance cannot pass where the forward pass disables gradients or detaches values"
            raise ClearwingError("model", f"a {layer.kind} without a graph", mend)
        output: Tensor = _Rule.apply(layer, self.divisor, self.epsilon, layer.seen, *layer.weights)
        self.layers.append(layer)
        if layer.kernel is not None and output.ndim == 4:
            self.convolved[output] = layer, output._version
        return output


def _relevance(network: Network, images: Tensor, question: Question, divisor: Divisor, epsilon: float) -> Tensor:
    """The relevance (N, C, H, W) of the values that enter the first layer, or its sum (N, H, W)."""
    _check("epsilon", epsilon, "above 0")
    rules = _Rules(divisor, epsilon)
    with rules:
        trace = network.record(images)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        first = _checked(trace, rules)
        (g,) = torch.autograd.grad(question.of(trace.logits).sum(), first)
    R = wide(first) * wide(g)
    return R if R.shape == images.shape else R.sum(1)


def _check(option: str, value: Any, least: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    if not number or value < 0 or (value == 0 and least == "above 0"):
        raise ClearwingError("options", f"{option}={value!r}", f"give a number {least}")


# What hands relevance on rightly by its plain gradient, by the names of the nodes in the graph: linear without a
# weight, a choice among its inputs, or in proportion to them.
# fmt: off
_SHARING = frozenset((
    "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "Add", "Alias", "Amax", "AsStrided", "AvgPool2D", "Cat", "ChannelShuffle",
    "Clone", "ConstantPadNd", "Diagonal", "Expand", "Flip", "Gather", "Index", "IndexSelect", "LeakyRelu", "Max",
    "MaxPool2DWithIndices", "Mean", "MkldnnAdaptiveAvgPool2D", "NativeChannelShuffle", "Neg", "Permute",
    "PixelShuffle", "PixelUnshuffle", "PreluKernel", "ReflectionPad2D", "Relu", "Repeat", "ReplicationPad2D",
    "ReshapeAlias", "Roll", "Rsub", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "Sub", "Sum",
    "T", "ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "UpsampleBilinear2D",
    "UpsampleNearest2D", "View",
))
# fmt: on


_KNOWS = "LRP is for networks of 2-d convolutions, linear layers, batch norm, ReLU, pooling, sums and reshaping"


def _checked(trace: Trace, rules: _Rules) -> Tensor:
    """The input of the first layer, where relevance is read; refused where some would be lost or wrongly shared."""
    first, (n, _, height, width) = rules.first, trace.images.shape
    path = set() if first is None else between(trace.logits, [first])
    if first is None or not path:
        raise ClearwingError("model", f"no layer of {type(trace.model).__name__} has a rule", _KNOWS)
    unruled = Counter(name for node in path - {get_gradient_edge(first).node} if (name := _unruled(node, path)))
    if unruled:
        raise ClearwingError("model", ", ".join(f"{name} x {unruled[name]}" for name in sorted(unruled)), _KNOWS)
    if first.ndim != 4 or len(first) != n or first.shape[2:] != (height, width):
        mend = f"relevance is read there, pixel by pixel; the pictures must enter it as {height} x {width}"
        raise ClearwingError("model", f"its first layer is given {tuple(first.shape)}", mend)
    if _passed_by(trace.logits, first, trace.images):
        mend = "relevance is read at that layer's input, and would miss the other way"
        raise ClearwingError("model", "the pictures reach the logits beside its first layer", mend)
    for layer in rules.layers:
        if layer.x._version != layer.version:
            mend = "relevance is shared by what it was; write the operation that follows out of place"
            raise ClearwingError("model", f"the input of a {layer.kind} is overwritten in place", mend)
    return first


def _unruled(node: Node, path: set[Node]) -> str:
    """The name of a node that neither has a rule nor shares relevance rightly by its gradient; "" for all others."""
    name = node.name().rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")
    on_path = [operand in path for operand, _ in node.next_functions]
    scaled = (name == "Mul" and sum(on_path) == 1) or (name == "Div" and not any(on_path[1:]))  # by a constant
    if getattr(node, "_forward_cls", None) is _Rule:
        return "weights made of activations" if any(on_path[1:]) else ""
    return "" if scaled or name in _SHARING else name


def _passed_by(logits: Tensor, first: Tensor, images: Tensor) -> bool:
    """Whether the graph has a way from the logits to the images that does not lead over `first`."""
    end, start, around = (get_gradient_edge(tensor) for tensor in (images, logits, first))
    seen: set[tuple[Node | None, int]] = {(around.node, around.output_nr)}
    waiting: list[tuple[Node | None, int]] = [(start.node, start.output_nr)]
    while waiting:
        edge = node, _ = waiting.pop()
        if node is end.node:
            return True
        if node is not None and edge not in seen:
            seen.add(edge)
            waiting += node.next_functions
    return False
