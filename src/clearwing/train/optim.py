"""Optimisers with their parameter groups."""

from __future__ import annotations

from torch import nn, optim

from clearwing.types import ClearwingError, near

OPTIMIZERS = ("sgd", "adamw", "adam")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: weights that decay; biases and norms (one dimension or none) that do not."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed, free = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    groups: list[dict[str, object]] = []
    if decayed:
        groups.append({"params": decayed, "weight_decay": weight_decay})
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return groups


def optimizer(
    module: nn.Module, name: str, lr: float, *, momentum: float = 0.9, weight_decay: float = 5e-4
) -> optim.Optimizer:
    """SGD with Nesterov momentum (Sutskever et al. 2013), AdamW (Loshchilov and Hutter 2019) or Adam.

    Raises ClearwingError for another name, and where nothing is trainable.
    """
    groups = parameter_groups(module, weight_decay)
    if not groups:
        raise ClearwingError("module", "no trainable parameter", "set requires_grad on what shall be trained")
    if name == "sgd":
        return optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=True)
    if name == "adamw":
        return optim.AdamW(groups, lr=lr, foreach=True)
    if name == "adam":
        return optim.Adam(groups, lr=lr, foreach=True)
    raise ClearwingError("optimizer", name, near(name, OPTIMIZERS))
