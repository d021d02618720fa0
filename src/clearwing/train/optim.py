"""Optimisers, the groups and rates of their parameters, freezing by stages, and sharpness-aware minimisation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _NormBase

from clearwing.models.classifier import Classifier
from clearwing.types import ClearwingError, near

OPTIMIZERS = ("sgd", "adamw", "adam")
FUSED = ("cpu", "cuda")  # where torch steps with one kernel: on a CPU 2.5 to 3 times as fast as foreach for ResNet-18


# ------------------------------------------------------------------------------------------------------------ stages


def stages(module: nn.Module) -> list[list[nn.Module]]:
    """The parts of a network from its stem to its head, each a list of its children.

    Of a residual network: the stem (all before layer1), layer1, layer2 ... (down2 goes with layer2), the head. Of
    another: every child with parameters. Children without any go with the one before them.

    >>> len(stages(build("resnet14", num_classes=10)))  # stem, layer1, layer2, layer3, fc
    5
    """
    return list(_stages(module).values())


def _stages(module: nn.Module) -> dict[str, list[nn.Module]]:
    backbone = module.backbone if isinstance(module, Classifier) else module
    children = dict(backbone.named_children())
    weighted = [name for name, child in children.items() if any(True for _ in child.parameters())]
    if not weighted:
        return {"all": [backbone]}
    residual = "layer1" in children
    stage, found = "stem" if residual else weighted[0], dict[str, list[nn.Module]]()
    for name, child in children.items():
        numbered = re.fullmatch(r"(?:layer|down)(\d+)", name)
        if numbered:
            stage = f"layer{numbered[1]}"
        elif name in weighted and not (residual and stage == "stem"):
            stage = name
        found.setdefault(stage, []).append(child)
    return found


def _stage_parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter once, by stage; what is in no stage, such as a class token, stands with the first."""
    left = dict.fromkeys(module.parameters())
    found: dict[str, list[nn.Parameter]] = {}
    for name, parts in _stages(module).items():
        found[name] = list(dict.fromkeys(p for part in parts for p in part.parameters() if p in left))
        for parameter in found[name]:
            del left[parameter]
    first = next(iter(found))
    found[first] = [*left, *found[first]]
    return found


def freeze(module: nn.Module, count: int) -> None:
    """Keep the first `count` stages as they are: no gradients for them; those from `count` on are trained.

    Make the optimizer first: it takes what can be trained then, and passes over what is frozen later, so that thawing
    needs no new groups. Call `train_mode` in place of `module.train()`, or the statistics of frozen norms move on.

    Raises ClearwingError where there are not so many stages, or no stage is left to train.
    """
    found = _stage_parameters(module)
    if not 0 <= count < len(found):
        mend = f"the stages are {', '.join(found)}; freeze 0 to {len(found) - 1} of them"
        raise ClearwingError("freeze", count, mend)
    for level, parameters in enumerate(found.values()):
        for parameter in parameters:
            parameter.requires_grad_(level >= count)
            if level < count:
                parameter.grad = None  # what is left of an earlier step would be stepped on again


def thawed(total_stages: int, epoch: int, every: int) -> int:
    """How many stages are still frozen in this epoch (from 0) when thawing gradually: the argument for `freeze`.

    Howard and Ruder 2018, section 3.3: the head is trained first, then one stage more, from the last to the first,
    each `every` epochs; with 0 no other is thawed. To begin with `count` frozen stages, give count + 1 as the total.

    >>> [thawed(5, epoch, every=1) for epoch in range(6)]
    [4, 3, 2, 1, 0, 0]
    """
    if every < 0:
        raise ClearwingError("thaw", every, "give a number of epochs, or 0 to thaw nothing")
    return max(0, total_stages - 1 - (epoch // every if every else 0))


def train_mode(module: nn.Module) -> None:
    """`module.train()`, but the norms of wholly frozen stages stay in eval, with the statistics that they have."""
    module.train()
    for parts in stages(module):
        parameters = [p for part in parts for p in part.parameters()]
        if parameters and not any(p.requires_grad for p in parameters):
            for layer in (layer for part in parts for layer in part.modules()):
                if isinstance(layer, _NormBase):  # batch norm, also over processes, and instance norm
                    layer.eval()


# -------------------------------------------------------------------------------------------------------- optimisers


def parameter_groups(
    module: nn.Module, weight_decay: float, *, lr: float, layer_decay: float = 1.0, head_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters in groups with their name, lr and weight_decay, from the stem to the head.

    Weights decay; biases and norms (one dimension or none) do not. The last stage has `head_factor` times the rate
    `lr`; the one before it has `layer_decay` times `lr`, and each further one `layer_decay` times that of the one
    above it: eta^(l-1) = eta^l / 2.6 with layer_decay = 1 / 2.6 in Howard and Ruder 2018, section 3.2. With both 1
    there are two groups, else two for each stage.

    Raises ClearwingError for factors out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ClearwingError("layer_decay", layer_decay, "give a factor above 0, at most 1")
    if not 0 < head_factor < float("inf"):
        raise ClearwingError("head_factor", head_factor, "give a factor above 0")
    found = _stage_parameters(module)
    if layer_decay == head_factor == 1:
        found = {"all": [p for parameters in found.values() for p in parameters]}
    groups: list[dict[str, Any]] = []
    for below, (stage, parameters) in zip(reversed(range(len(found))), found.items(), strict=True):
        rate = lr * (layer_decay**below if below else head_factor)
        trained = [p for p in parameters if p.requires_grad]
        weights, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        for name, chosen, decay in (("weights", weights, weight_decay), ("biases and norms", others, 0.0)):
            if chosen:
                groups.append({"name": f"{stage}: {name}", "params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def optimizer(
    module: nn.Module,
    name: str,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    layer_decay: float = 1.0,
    head_factor: float = 1.0,
    nesterov: bool = True,
) -> optim.Optimizer:
    """SGD with Nesterov momentum (Sutskever et al. 2013), AdamW (Loshchilov and Hutter 2019) or Adam.

    It holds all that can be trained when it is made; see `parameter_groups` for the rates and `freeze` for the order.

    >>> optimizer(model, "sgd", 0.01, layer_decay=1 / 2.6, head_factor=10)

    Raises ClearwingError for another name, factors out of range, and where nothing is trainable.
    """
    if name not in OPTIMIZERS:
        raise ClearwingError("optimizer", name, near(name, OPTIMIZERS))
    groups = parameter_groups(module, weight_decay, lr=lr, layer_decay=layer_decay, head_factor=head_factor)
    if not groups:
        raise ClearwingError("module", "no trainable parameter", "set requires_grad on what shall be trained")
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters)
    kernel: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    made: optim.Optimizer
    if name == "sgd":
        made = optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, **kernel)
    else:
        made = (optim.AdamW if name == "adamw" else optim.Adam)(groups, lr=lr, **kernel)
    made.register_step_pre_hook(_for_fused)
    return made


def _for_fused(optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Make true what the fused kernels take for granted (torch 2.15).

    They walk a parameter, its gradient and its state in the order of memory: with other strides, as after a change to
    channels_last, the step is wrong without a word. And SGD fails where some parameters of a group have momentum and
    others, thawed later, have none; from zero the first step is that without momentum.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.stride() != p.stride():
                p.grad = _laid_out(p.grad, p)
            state = optimizer.state[p]
            if group.get("momentum") and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.stride() != p.stride() and value.shape == p.shape:
                    state[key] = _laid_out(value, p)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory layout of another of its shape; itself where it has it."""
    if all(n == 1 or a == b for n, a, b in zip(like.shape, tensor.stride(), like.stride(), strict=True)):
        return tensor
    return torch.empty_like(like).copy_(tensor)


class SAM:
    """Sharpness-aware minimisation: the gradient at the worst point within `rho` (Foret et al. 2021, eq. 2 and 3).

    adaptive: distances are relative to the size of each weight (Kwon et al. 2021, ASAM).

    >>> sam = SAM(0.05)
    >>> loss(model(images)).backward()
    >>> sam.climb(model.parameters())  # w + e, e = rho g / ||g||
    >>> optimizer.zero_grad()
    >>> loss(model(images)).backward()
    >>> sam.descend()  # w to the bit
    >>> optimizer.step()

    Raises ClearwingError for a radius out of range, and for calls out of this order.
    """

    def __init__(self, rho: float, adaptive: bool = False) -> None:
        if not 0 < rho < float("inf"):
            raise ClearwingError("sam", rho, "give a radius above 0, such as 0.05")
        self.rho, self.adaptive = rho, adaptive
        self._moved: list[Tensor] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def climb(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add e to the parameters that have a gradient."""
        if self._moved:
            raise ClearwingError("sam", "climb() twice", "call descend() in between")
        moved: list[Tensor] = [p for p in parameters if p.grad is not None]
        if not moved:
            raise ClearwingError("sam", "no gradients", "call backward() before climb()")
        e: Any = [p.grad for p in moved]
        size = torch._foreach_abs(moved) if self.adaptive else ()  # T_w of Kwon et al.
        if size:
            e = torch._foreach_mul(e, size)
        e = torch._foreach_mul(e, self.rho / (nn.utils.get_total_norm(e) + 1e-12))
        if size:
            torch._foreach_mul_(e, size)
        self._moved, self._before = moved, [p.detach().clone() for p in moved]
        torch._foreach_add_(moved, e)

    @torch.no_grad()
    def descend(self) -> None:
        """Give the parameters their values back as they were, to the bit."""
        if not self._moved:
            raise ClearwingError("sam", "descend() without climb()", "call climb() before")
        torch._foreach_copy_(self._moved, self._before)
        self._moved, self._before = [], []
