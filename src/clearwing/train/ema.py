"""The exponential moving average of a network over its training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.types import ClearwingError


class EMA:
    """The average of all parameters and floating buffers, in `module`: a copy in eval mode that asks for no gradient.

    After step t: average <- d average + (1 - d) value (Polyak and Juditsky 1992, in its exponential form), with
    d = min(decay, (1 + t) / (10 + t)) as in TensorFlow's ExponentialMovingAverage, so that the first weights are
    soon forgotten. Other buffers are copied. The average goes to the device that the network is on.

    every: average at each `every`-th step alone, with d^every.

    >>> ema = EMA(model, 0.99)
    >>> ema.update(model)  # after each step of the optimiser
    >>> logits = ema.module(images)

    Raises ClearwingError for a decay that is not in [0, 1) and for `every` below 1.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ClearwingError("ema", decay, "give a decay of at least 0 and below 1, such as 0.99")
        if every < 1:
            raise ClearwingError("every", every, "give a number of steps of at least 1")
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.every, self.t = decay, every, 0
        self._averages = _places(self.module)
        self._values: tuple[nn.Module, list[_Place]] = self.module, self._averages  # of the module updated from last

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the values of `module`, the network or what Fabric, DDP or the compiler made of it, after a step."""
        self.t += 1
        if self.t % self.every:
            return
        d = min(self.decay, (1 + self.t) / (10 + self.t)) ** self.every
        if module is not self._values[0]:  # going through all modules would take longer than the averaging
            self._values = module, _places(module)
        (averages, kept), (values, counts) = _tensors(self._averages), _tensors(self._values[1])
        if values and values[0].device != averages[0].device:
            self.module.to(values[0].device)
            averages, kept = _tensors(self._averages)
        if values:
            torch._foreach_lerp_(averages, values, 1 - d)
        if counts:
            torch._foreach_copy_(kept, counts)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on to the bit; the tensors are shared, as those of a module's are."""
        return {"module": self.module.state_dict(), "t": self.t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.t = int(state["t"])


_Place = tuple[dict[str, Tensor | None], str]


def _places(module: nn.Module) -> list[_Place]:
    """Where the parameters and buffers of a module are held, each once: the tensor there may be another one later."""
    held: list[Any] = [held for part in module.modules() for held in (part._parameters, part._buffers)]
    found = {id(tensor): (tensors, name) for tensors in held for name, tensor in tensors.items() if tensor is not None}
    return list(found.values())


def _tensors(places: list[_Place]) -> tuple[list[Tensor], list[Tensor]]:
    """Floating parameters and buffers, to be averaged; the others."""
    every = [tensor for held, name in places if (tensor := held[name]) is not None]
    return [x for x in every if x.is_floating_point()], [x for x in every if not x.is_floating_point()]
