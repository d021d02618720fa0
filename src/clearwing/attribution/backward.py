"""ReLU rules: the backward pass of any network with the plain, the guided or the deconvnet rule at its ReLUs.

The model is not changed. `nn.ReLU`, `F.relu`, `torch.relu` and their in-place forms all leave the same node in the
graph of a recorded pass, and a hook on these nodes applies the rule while `torch.autograd.grad` runs. So the spelling
does not matter, nor does a module that is used twice, and a rule that found no ReLU is known and refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from clearwing.types import ClearwingError, near

RELU_RULES = ("plain", "guided", "deconvnet")

# Elementwise non-linearities to which the rules do not apply, by the names of their nodes in the graph. Not
# max-pooling: it chooses a place and has no sign; not softmax: it stands in the head.
# fmt: off
_OTHERS = frozenset((
    "Abs", "Celu", "Clamp", "ClampMax", "ClampMin", "Elu", "Erf", "Fmax", "Fmin", "Gelu", "Glu", "Hardshrink",
    "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "LogSigmoid", "MaskedFill", "Maximum", "Minimum", "Mish",
    "PreluKernel", "RreluWithNoise", "Sigmoid", "Silu", "Sin", "Softplus", "Softshrink", "Tanh", "Where",
))
# fmt: on
_COMPILED = ("CompiledFunction", "DifferentiableGraph")  # torch.compile and torch.jit: ReLUs fused out of sight


def differentiate(
    scores: Tensor, sources: Sequence[Tensor], relu_rule: str = "plain", keep: bool = True
) -> tuple[tuple[Tensor | None, ...], str]:
    """The gradients of the sum of the scores at the sources, and a line on what the rule left alone ("" if nothing).

    The graph stays alive, unless `keep` is False, which makes room on the way down; no `.grad` is touched. None stands
    for a source that the scores do not depend on.

    Raises ClearwingError for an unknown rule, and under the guided and deconvnet rules where no ReLU lies between the
    scores and the sources, or a compiled function that may hide some.
    """
    if relu_rule not in RELU_RULES:
        raise ClearwingError("relu_rule", relu_rule, near(relu_rule, RELU_RULES))
    total = scores.sum()
    if relu_rule == "plain":
        return torch.autograd.grad(total, sources, retain_graph=keep, allow_unused=True), ""
    path = between(total, sources)
    relus = [node for node in path if _is_relu(node)]
    others = Counter(name for node in path if (name := unruled(node)))
    counted = ", ".join(f"{name} x {count}" for name, count in sorted(others.items()))
    if any(name.startswith(_COMPILED) for name in others):
        mend = "its ReLUs are out of sight of the rule; explain the network as it is before compiling"
        raise ClearwingError("model", f"compiled functions ({counted})", mend)
    if not relus:
        met = f"no ReLU between the scores and what is explained{f', but {counted}' if counted else ''}"
        raise ClearwingError("model", met, f"the {relu_rule} rule would be the plain gradient; ask for saliency")
    handles = [node.register_hook(_RULES[relu_rule]) for node in relus]
    try:
        found = torch.autograd.grad(total, sources, retain_graph=keep, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    left = f"the {relu_rule} rule changed {len(relus)} ReLUs; other non-linearities keep their gradient: {counted}"
    return found, left if counted else ""


def _guided(passed: tuple[Tensor, ...], R: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Springenberg et al. 2015 section 3.4: max(R, 0) passes where the activation is positive."""
    return (passed[0].clamp_(min=0),)  # what the plain rule let pass, in place: the node has just made it


def _deconvnet(passed: tuple[Tensor, ...], R: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Zeiler and Fergus 2014 section 2.1: max(R, 0) passes everywhere."""
    return (R[0].clamp(min=0),)


_RULES = {"guided": _guided, "deconvnet": _deconvnet}


def _is_relu(node: Node) -> bool:
    name = _name(node)
    return name == "Relu" or (name == "Threshold" and getattr(node, "_saved_threshold", 0) == 0)


def between(scores: Tensor, sources: Sequence[Tensor]) -> set[Node]:
    """The nodes of the graph that a gradient passes from the scores to a source; not the one that made the source."""
    users: dict[Node, list[Node]] = {get_gradient_edge(scores).node: []}
    waiting = list(users)
    while waiting:
        user = waiting.pop()
        for node, _ in user.next_functions:
            if node is not None:
                if node not in users:
                    users[node] = []
                    waiting.append(node)
                users[node].append(user)
    path: set[Node] = set()
    ends = [node for source in sources if (node := get_gradient_edge(source).node) in users]
    waiting = [user for node in ends for user in users[node]]
    while waiting:
        node = waiting.pop()
        if node not in path:
            path.add(node)
            waiting += users[node]
    return path


def unruled(node: Node) -> str:
    """The name of a non-linearity that the rules leave as it is; "" for every other node."""
    name = _name(node)
    own = isinstance(node, torch.autograd.function.BackwardCFunction)  # a custom autograd.Function: opaque
    shifted = name == "Threshold" and not _is_relu(node)
    return name if own or shifted or name in _OTHERS or name.startswith(_COMPILED) else ""


def _name(node: Node) -> str:
    """What a node differentiates: "Relu" of "torch::autograd::ReluBackward0"."""
    return node.name().rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")
